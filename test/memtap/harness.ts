// Test VMs: the helper program in guest.c under the real agent, as an unprivileged user.
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { loadAddon, projectRoot } from '../../src/common/native.js';
import {
  agentEnvironment,
  MemtapServer,
  type MemtapServerOptions,
  type ProviderHandle,
  type ReplicaHandle,
  readPages,
} from '../../src/memtap/memtap.js';

export const PAGE = 4096;
const NOBODY = 65534;

export interface ReplicaJs {
  fill(page: number, data: Buffer): void;
  fillZero(page: number, count: number): void;
  fail(code: string, message: string): void;
  stats(): { pages: number; present: number; zero: number; waiting: number };
  close(): void;
  readonly handle: ReplicaHandle;
  readonly provider: ProviderHandle;
}

interface Addon {
  Replica: new (path: string, generation: string, pages: number, medium: string) => ReplicaJs;
}

/** A directory on tmpfs and everything started in it; `end` ends and removes it all. */
export class Bench {
  /** On tmpfs: replicas and generations. */
  readonly directory: string;
  /** Where the unprivileged VMs may write. */
  readonly open: string;
  readonly #guestProgram: string;
  readonly #cleanups: (() => void | Promise<void>)[] = [];
  #count = 0;

  constructor() {
    this.directory = mkdtempSync('/dev/shm/memtap-test-');
    chmodSync(this.directory, 0o755);
    this.open = mkdtempSync(join(tmpdir(), 'memtap-test-'));
    chmodSync(this.open, 0o777);
    this.#guestProgram = join(this.open, 'guest');
    const source = join(projectRoot, 'test', 'memtap', 'guest.c');
    try {
      execFileSync('gcc', [
        ...['-std=gnu17', '-D_GNU_SOURCE', '-O2', '-Wall', '-Wextra', '-Werror', '-pthread'],
        ...['-I', join(projectRoot, 'native/agent')],
        ...['-o', this.#guestProgram, source],
      ]);
    } catch (error) {
      this.#removeDirectories();
      throw error;
    }
  }

  get guestProgram(): string {
    return this.#guestProgram;
  }

  onEnd(cleanup: () => void | Promise<void>): void {
    this.#cleanups.push(cleanup);
  }

  async end(): Promise<void> {
    const errors: unknown[] = [];
    for (const cleanup of this.#cleanups.reverse()) {
      try {
        await cleanup();
      } catch (error) {
        errors.push(error);
      }
    }
    this.#removeDirectories();
    if (errors.length > 0) throw errors[0];
  }

  #removeDirectories(): void {
    rmSync(this.directory, { recursive: true, force: true });
    rmSync(this.open, { recursive: true, force: true });
  }

  path(name: string): string {
    return join(this.directory, name);
  }

  unique(prefix: string): string {
    this.#count += 1;
    return `${prefix}${this.#count}`;
  }

  /** A generation id of the product's form. */
  generation(): string {
    this.#count += 1;
    return this.#count.toString(16).padStart(32, '0');
  }

  server(options: Partial<MemtapServerOptions> = {}): MemtapServer {
    const socketPath = join(this.open, this.unique('socket'));
    const server = new MemtapServer({ socketPath, socketMode: 0o666, ...options });
    this.onEnd(() => server.close());
    return Object.assign(server, { socketPath });
  }

  replica(pages: number, medium: 'memory' | 'disk' = 'memory', path?: string): ReplicaJs {
    const file = path ?? this.path(this.unique('replica'));
    const replica = new (loadAddon<Addon>('dataplane').Replica)(
      file,
      '0'.repeat(32),
      pages,
      medium,
    );
    this.onEnd(() => replica.close());
    return replica;
  }

  /** A process that is about to become a VM; it attaches with `map`. */
  guest(socketPath: string, id: string, token = 'secret'): Guest {
    const guest = new Guest(
      this.#guestProgram,
      agentEnvironment({ socketPath, id, token }),
      this.open,
    );
    this.onEnd(() => guest.kill());
    return guest;
  }

  /** A VM that is expected, attached and mapped. */
  async vm(
    server: MemtapServer,
    pages: number,
    replica?: ReplicaJs,
  ): Promise<{ id: string; guest: Guest }> {
    const id = this.unique('vm');
    const { socketPath } = server as MemtapServer & { socketPath: string };
    server.expect({
      id,
      token: 'secret',
      ramBytes: pages * PAGE,
      ...(replica === undefined ? {} : { replica: replica.handle }),
    });
    const guest = this.guest(socketPath, id);
    await guest.map(pages);
    await server.attached(id, 10_000);
    return { id, guest };
  }

  /** A fork of a VM that does not write at the moment. */
  async fork(server: MemtapServer, id: string, generation = this.generation()): Promise<string> {
    await server.forkBegin(id, { generation, directory: this.path(generation) });
    await server.forkCommit(id, generation);
    return generation;
  }

  async image(
    server: MemtapServer,
    id: string,
    generation: string,
    pages: number,
  ): Promise<Buffer> {
    return await readPages(server.provider(id, generation), 0, pages);
  }

  folder(name: string): string {
    const path = this.path(name);
    mkdirSync(path);
    return path;
  }
}

export class Guest {
  readonly #child: ChildProcess;
  readonly #open: string;
  readonly #answers: ((line: string) => void)[] = [];
  readonly exited: Promise<void>;
  #stderr = '';

  constructor(program: string, env: Record<string, string>, open: string) {
    this.#open = open;
    this.#child = spawn(program, [], { env, uid: NOBODY, gid: NOBODY, stdio: 'pipe' });
    this.exited = new Promise((resolve) => this.#child.once('close', () => resolve()));
    this.#child.stderr?.on('data', (data: Buffer) => {
      this.#stderr += data.toString();
    });
    this.#child.stdin?.on('error', () => {});
    if (this.#child.stdout === null) throw new Error('no stdout');
    createInterface({ input: this.#child.stdout }).on('line', (line) =>
      this.#answers.shift()?.(line),
    );
    this.exited.then(() => {
      for (const answer of this.#answers.splice(0)) answer('error exited');
    });
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error('the guest did not start');
    return this.#child.pid;
  }

  /** The answer without "ok"; an "error" answer throws. */
  async say(command: string): Promise<string> {
    const line = await new Promise<string>((resolve) => {
      this.#answers.push(resolve);
      this.#child.stdin?.write(`${command}\n`);
    });
    if (!line.startsWith('ok')) throw new Error(`${command}: ${line}`);
    return line.slice(3);
  }

  async map(pages: number): Promise<void> {
    await this.say(`map ${pages * PAGE}`);
  }

  /** The guest's memory as it sees it itself. */
  async dump(first: number, count: number): Promise<Buffer> {
    const path = join(this.#open, `dump-${this.pid}`);
    await this.say(`dump ${first} ${count} ${path}`);
    const data = readFileSync(path);
    rmSync(path);
    return data;
  }

  /** Ends it; what it and its agent wrote to stderr. */
  async lastWords(): Promise<string> {
    await this.kill();
    return this.#stderr;
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.exited;
  }
}

/** Waits for something only polling can see. */
export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise((resolve) => setTimeout(resolve, 2));
}

/** Indexes of pages in which two images differ; for messages one can read. */
export function differingPages(a: Buffer, b: Buffer): number[] {
  const pages: number[] = [];
  for (let at = 0; at < Math.max(a.length, b.length); at += PAGE) {
    if (!a.subarray(at, at + PAGE).equals(b.subarray(at, at + PAGE))) pages.push(at / PAGE);
  }
  return pages;
}

// Starts child.ts, under recorder.c or fault.c, and talks to it.
import { execFileSync, spawn } from 'node:child_process';
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { rolldown } from 'rolldown';
import { afterAll } from 'vitest';
import { cleanup, execute, newGeneration } from '../../blktap/support.js';
import type { Command, Reply } from './child.js';

const here = fileURLToPath(new URL('.', import.meta.url));

/** child.ts in one file: a test starts it a hundred times. Below the project, to find its addons. */
const bundles = fileURLToPath(new URL('../../../node_modules/.cache/', import.meta.url));
mkdirSync(bundles, { recursive: true });
const bundle = mkdtempSync(join(bundles, 'power-'));
const program = join(bundle, 'child.mjs');
afterAll(() => rmSync(bundle, { recursive: true, force: true }));
const made = await rolldown({
  input: join(here, 'child.ts'),
  platform: 'node',
  logLevel: 'silent',
});
await made.write({ file: program, format: 'esm' });
await made.close();

const libraries = mkdtempSync(join(tmpdir(), 'sf-libraries-'));
afterAll(() => rmSync(libraries, { recursive: true, force: true }));
const built = new Set<string>();

/** NAME.c of this folder, built for LD_PRELOAD. */
function library(name: string): string {
  const path = join(libraries, `${name}.so`);
  const options = ['-shared', '-fPIC', '-O2', '-Wall', '-Wextra', '-Werror'];
  if (!built.has(name)) {
    execFileSync('cc', [...options, '-o', path, join(here, `${name}.c`)], { stdio: 'inherit' });
    built.add(name);
  }
  return path;
}

/** A tmpfs of its own, gone at the end of the test. */
export async function memoryFolder(size = '1g'): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'sf-memory-'));
  await execute('mount', ['-t', 'tmpfs', '-o', `size=${size},mode=700`, 'tmpfs', folder]);
  cleanup(async () => {
    await execute('umount', ['--lazy', folder]);
    await execute('rmdir', [folder]);
  });
  return folder;
}

export interface Server {
  pid: number;
  call(op: Command['op'], rest?: Partial<Command>): Promise<Reply>;
  /** The id of the last call. */
  lastId(): number;
  kill(): Promise<void>;
  exited: Promise<void>;
}

/** Runs child.ts; `call` rejects once it has died. Ends with the test. */
export function startServer(directory: string, env: Record<string, string> = {}): Server {
  const child = spawn(process.execPath, [program, directory], {
    stdio: ['pipe', 'pipe', 'inherit'],
    env: { ...process.env, UV_USE_IO_URING: '0', ...env },
  });
  child.stdin.on('error', () => undefined); // it was killed
  const exited = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  const kill = async () => {
    child.kill('SIGKILL');
    await exited;
  };
  cleanup(kill);
  const waiting = new Map<number, { resolve(r: Reply): void; reject(e: Error): void }>();
  const lines = createInterface({ input: child.stdout });
  lines.on('line', (line) => {
    const reply = JSON.parse(line) as Reply;
    waiting.get(reply.id)?.resolve(reply);
    waiting.delete(reply.id);
  });
  let dead = false;
  lines.on('close', () => {
    dead = true;
    for (const each of waiting.values()) each.reject(new Error('the server died'));
    waiting.clear();
  });
  let id = 0;
  return {
    pid: child.pid ?? 0,
    call: (op, rest = {}) => {
      id++;
      if (dead) return Promise.reject(new Error('the server died'));
      const done = new Promise<Reply>((resolve, reject) => waiting.set(id, { resolve, reject }));
      child.stdin.write(`${JSON.stringify({ id, op, ...rest })}\n`);
      return done;
    },
    lastId: () => id,
    kill,
    exited,
  };
}

/** Records all servers started with `env` on what is below `root`. */
export class Recorder {
  readonly env: Record<string, string>;
  readonly log: string;
  readonly #control: number;

  /** `folder` is for the recorder's own files, outside of `root`. */
  constructor(folder: string, root: string) {
    this.log = join(folder, 'log');
    writeFileSync(this.log, '');
    const control = join(folder, 'control');
    writeFileSync(control, Buffer.alloc(8));
    this.#control = openSync(control, 'r+');
    cleanup(() => closeSync(this.#control));
    const boot = join(folder, 'boot');
    const id = newGeneration();
    writeFileSync(boot, `${id.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')}\n`);
    this.env = {
      LD_PRELOAD: library('recorder'),
      REC_ROOT: root,
      REC_LOG: this.log,
      REC_CONTROL: control,
      REC_BOOT_ID: boot,
    };
  }

  /** Kills the server right after so many more entries, or beginnings of syncs; 0: not at all. */
  killAfter(entries: number, of: 'entries' | 'syncs' = 'entries'): void {
    const data = Buffer.alloc(8);
    data.writeUInt32LE(entries, of === 'entries' ? 0 : 4);
    writeSync(this.#control, data, 0, 8, 0);
  }

  /** How much of the log there is: what is begun later stands behind. */
  bytes(): number {
    return statSync(this.log).size;
  }
}

/** The rules of fault.c; see there. */
export class Faults {
  readonly env: Record<string, string>;
  readonly #path: string;

  constructor(folder: string) {
    this.#path = join(folder, 'faults');
    writeFileSync(this.#path, '');
    this.env = { LD_PRELOAD: library('fault'), FAULT_RULE: this.#path };
  }

  /** From now on the `nth` and later calls of `call` on files whose path ends so fail. */
  fail(call: 'write' | 'sync' | 'read', suffix: string, nth: number, errno: number): void {
    writeFileSync(this.#path, `${call} ${suffix} ${nth} ${errno}`);
  }

  stop(): void {
    writeFileSync(this.#path, '');
  }
}

import { execFile, spawn } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { access, mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, expect } from 'vitest';
import { asSnowflockError } from '../../src/common/errors.js';
import { loadAddon } from '../../src/common/native.js';
import { Disk, type ReplicaHandle } from '../../src/cow-disk/disk.js';
import { addon, type SliceCheck } from '../../src/cow-disk/native.js';
import { type ListenOptions, NbdServer } from '../../src/cow-disk/nbd-server.js';
import { NbdClient } from './nbd-client.js';

export const PAGE = 4096;
export const execute = promisify(execFile);

const cleanups: (() => Promise<unknown> | unknown)[] = [];

/** Runs at the end of the test, last registered first, also when it failed. */
export function cleanup(work: () => Promise<unknown> | unknown): void {
  cleanups.push(work);
}

afterEach(async () => {
  const errors: unknown[] = [];
  while (cleanups.length > 0) {
    try {
      await cleanups.pop()?.();
    } catch (error) {
      errors.push(error);
    }
  }
  if (errors.length > 0) throw errors[0];
});

export async function temporary(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'sf-disk-'));
  cleanup(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

export function newGeneration(): string {
  return randomBytes(16).toString('hex');
}

/** What the data files of a disk's slices take. */
export async function allocatedBytes(directory: string): Promise<number> {
  let bytes = 0;
  for (const name of await readdir(directory)) {
    if (name.endsWith('.data')) bytes += (await stat(join(directory, name))).blocks * 512;
  }
  return bytes;
}

/** What the slice that is written to holds. */
export async function topSlice(disk: Disk): Promise<SliceCheck> {
  await disk.flush();
  const { sizeBytes, slices } = disk.info();
  const id = slices.at(-1)?.id ?? '';
  return addon().checkSlice({ directory: disk.directory, id, map: 0, sizeBytes });
}

export async function openDisk(
  directory: string,
  options: { replica?: ReplicaHandle } = {},
): Promise<Disk> {
  const disk = await Disk.open(directory, options);
  cleanup(() => disk.close().catch(() => undefined));
  return disk;
}

/** A new disk, open and served, with a client connected. */
export async function newDisk(
  sizeBytes: number,
  options: { base?: Parameters<typeof Disk.create>[1]['base']; replica?: ReplicaHandle } = {},
): Promise<{ folder: string; directory: string; socketPath: string; disk: Disk }> {
  const folder = await temporary();
  const directory = join(folder, 'disk');
  const base = options.base === undefined ? {} : { base: options.base };
  await Disk.create(directory, { sizeBytes, ...base });
  const disk = await openDisk(
    directory,
    options.replica === undefined ? {} : { replica: options.replica },
  );
  const socketPath = join(folder, 'nbd');
  await disk.serve({ socketPath, exportName: 'disk' });
  return { folder, directory, socketPath, disk };
}

/** A server without exports. */
export async function newServer(
  socketPath: string,
  options: Omit<ListenOptions, 'socketPath'> = {},
): Promise<NbdServer> {
  const server = await NbdServer.start({ socketPath, ...options });
  cleanup(() => server.close());
  return server;
}

export async function connectTo(socketPath: string, name = ''): Promise<NbdClient> {
  const client = await NbdClient.connect(socketPath, name);
  cleanup(() => client.close());
  return client;
}

export function uri(socketPath: string, name = 'disk'): string {
  return `nbd+unix:///${name}?socket=${socketPath}`;
}

/** The code of the error that `work` ends with. */
export async function codeOf(work: Promise<unknown>): Promise<string> {
  try {
    await work;
  } catch (error) {
    return asSnowflockError(error).code;
  }
  expect.unreachable('no error');
}

/** All pages of a provider; fails on absent ones. */
export function contents(provider: unknown, pages: number): Buffer {
  const out = Buffer.alloc(pages * PAGE);
  for (let page = 0; page < pages; page++) {
    const data = addon().readPage(provider, page);
    if (data === null) throw new Error(`page ${page} is absent`);
    data.copy(out, page * PAGE);
  }
  return out;
}

export function hash(data: Buffer): string {
  return createHash('sha256').update(data).digest('hex');
}

export interface TestReplica {
  handle: unknown;
  provider: unknown;
  fill(page: number, data: Buffer): void;
  fillZero(page: number, count: number): void;
  fail(code: string, message: string): void;
  stats(): { pages: number; present: number; zero: number; waiting: number };
  close(): void;
}

export function newReplica(path: string, generation: string, pages: number): TestReplica {
  const { Replica } = loadAddon<{
    Replica: new (path: string, generation: string, pages: number, medium: string) => TestReplica;
  }>('dataplane');
  const replica = new Replica(path, generation, pages, 'disk');
  cleanup(() => replica.close());
  return replica;
}

export function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

/** Waits, without a fixed time, until `ready` says so. The test's own time-out bounds it. */
export async function until(ready: () => boolean): Promise<void> {
  while (!ready()) await new Promise((resolve) => setTimeout(resolve, 1));
}

/** A process of its own that serves a disk; ends with the test. */
export async function serveInChild(
  directory: string,
  socketPath: string,
): Promise<{
  pid: number;
  generations: string[];
  fork(generation: string): Promise<{ durationUs: number }>;
  forkWithoutWaiting(generation: string): void;
  kill(): Promise<void>;
  /** Ends its input; resolves with the signal that ended it, if one did. */
  end(): Promise<NodeJS.Signals | null>;
}> {
  const here = fileURLToPath(new URL('.', import.meta.url));
  const command = [
    '--import',
    join(here, 'ts-loader.mjs'),
    join(here, 'serve-child.ts'),
    directory,
    socketPath,
  ];
  const child = spawn(process.execPath, command, { stdio: ['pipe', 'pipe', 'pipe'] });
  let errors = '';
  child.stderr.on('data', (chunk: Buffer) => {
    errors += chunk.toString();
  });
  child.stdin.on('error', () => undefined); // it was killed
  const exited = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async () => {
    const line = await lines.next();
    if (line.done === true) throw new Error(`the serving process ended: ${errors}`);
    return JSON.parse(line.value) as { pid: number; generations: string[]; durationUs: number };
  };
  const kill = async () => {
    child.kill('SIGKILL'); // does nothing if it has ended
    await exited;
  };
  cleanup(kill);
  const ready = await next();
  return {
    pid: ready.pid,
    generations: ready.generations,
    fork: async (generation) => {
      child.stdin.write(`${generation}\n`);
      return next();
    },
    forkWithoutWaiting: (generation) => {
      child.stdin.write(`${generation}\n`);
    },
    kill,
    end: async () => {
      child.stdin.end();
      await exited;
      return child.signalCode;
    },
  };
}

/** Traces a process until it ends; it is under control when this resolves. */
export async function strace(pid: number, options: string[]): Promise<{ ended: Promise<unknown> }> {
  const tracer = spawn('strace', ['-f', '-p', String(pid), ...options], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const ended = once(tracer, 'exit');
  cleanup(() => {
    tracer.kill('SIGKILL');
    return ended;
  });
  // With -o it still says on stderr that it has attached to the process and all its threads.
  await once(tracer.stderr, 'data');
  tracer.stderr.resume();
  return { ended };
}

/** Numbers in [0, 1) from a 32-bit seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A fresh seed, or SEED; printed so that a failure can be repeated. */
export function newSeed(name: string): number {
  const seed = Number(process.env.SEED ?? randomBytes(4).readUInt32BE(0));
  console.log(`${name}: SEED=${seed}`);
  return seed;
}

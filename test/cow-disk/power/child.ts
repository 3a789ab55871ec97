// A process that has a store open, serves its disks and does what it is told: DIRECTORY. Each line
// of input is a Command, each line of output its Reply; commands that are sent without waiting for
// the one before run at the same time.
import { createInterface } from 'node:readline';
import { asSnowflockError } from '../../../src/common/errors.js';
import type { Disk } from '../../../src/cow-disk/disk.js';
import { Store } from '../../../src/cow-disk/store.js';
import type { StoreListing } from '../../../src/cow-disk/store-api.js';

export interface Command {
  id: number;
  op: keyof typeof operations;
  disk?: string;
  generation?: string;
  /** Of a new disk, or one more for a new generation. */
  name?: string;
  size_bytes?: number;
  /** Where a disk or a generation is served. */
  socket?: string;
  gc_bytes_per_s?: number;
}

export interface Reply {
  id: number;
  error?: string;
  message?: string;
  listing?: StoreListing;
  /** Of a commit. */
  origin?: string;
  stats?: { errors: number; lastError: string | null };
  /** What failed in the background. */
  failures?: string[];
}

const [directory = ''] = process.argv.slice(2);
const disks = new Map<string, Disk>();
const views = new Map<string, { close(): Promise<void> }>();
let opened: Store | undefined;

function store(): Store {
  if (opened === undefined) throw new Error('no store is open');
  return opened;
}

function disk({ disk: name = '' }: Command): Disk {
  const found = disks.get(name);
  if (found === undefined) throw new Error(`disk ${name} is not served`);
  return found;
}

const operations = {
  createStore: () => Store.create(directory),
  open: async ({ gc_bytes_per_s = 2 ** 30 }: Command) => {
    opened = await Store.open(directory, { gc_bytes_per_s });
    return { listing: await opened.list() };
  },
  close: () => {
    disks.clear();
    return store().close();
  },
  list: async () => ({ listing: await store().list() }),
  create: async ({ name = '', size_bytes = 0 }: Command) => {
    await store().createDisk({ name, size_bytes });
  },
  serve: async ({ disk: name = '', socket = '' }: Command) => {
    const found = await store().openDisk(name);
    await found.serve({ socketPath: socket, exportName: 'disk' });
    disks.set(name, found);
  },
  unserve: async (command: Command) => {
    const found = disk(command);
    disks.delete(command.disk ?? '');
    await found.close();
  },
  fork: async (command: Command) => {
    await disk(command).fork(command.generation ?? '');
  },
  prepare: (command: Command) => disk(command).prepareFork(),
  stats: (command: Command) => {
    const { errors, lastError } = disk(command).stats();
    return { stats: { errors, lastError } };
  },
  serveGeneration: async (command: Command) => {
    const { socket = '', disk: name = '', generation = '' } = command;
    const view = await store().openGeneration(name, generation);
    try {
      views.set(socket, await view.serve({ socketPath: socket, exportName: 'disk' }));
    } finally {
      view.close(); // its server keeps it
    }
  },
  unserveGeneration: async ({ socket = '' }: Command) => {
    await views.get(socket)?.close();
    views.delete(socket);
  },
  drop: ({ disk: name = '', generation = '' }: Command) =>
    store().removeGeneration({ disk: name, generation }),
  clone: async ({ disk: name = '', generation = '', name: clone = '' }: Command) => {
    await store().clone({ disk: name, generation, name: clone });
  },
  remove: ({ disk: name = '' }: Command) => store().removeDisk({ disk: name }),
  rollback: ({ disk: name = '', generation = '' }: Command) =>
    store().rollback({ disk: name, generation }),
  flatten: ({ disk: name = '' }: Command) => store().flatten({ disk: name }),
  commit: ({ disk: name = '' }: Command) => store().commit({ disk: name, discard: true }),
  settled: () => store().settled(),
  failures: async () => {
    const failed = (await store().tasks()).filter((task) => task.error !== null);
    return { failures: failed.map((task) => `${task.kind}: ${task.error}`) };
  },
} satisfies Record<string, (command: Command) => unknown>;

async function answer(command: Command): Promise<void> {
  let reply: Reply = { id: command.id };
  try {
    const result: unknown = await operations[command.op](command);
    reply = { ...reply, ...(result as Partial<Reply> | undefined) };
  } catch (error) {
    const { code, message } = asSnowflockError(error);
    reply = { ...reply, error: code, message };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}

for await (const line of createInterface({ input: process.stdin })) {
  void answer(JSON.parse(line) as Command);
}
process.exit(0);

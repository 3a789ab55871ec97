// A process that serves a disk and does what it is told: DIRECTORY SOCKET. Each line of input is a
// Command, each line of output its Reply, in order.
import { createInterface } from 'node:readline';
import { asSnowflockError } from '../../../src/common/errors.js';
import { Disk } from '../../../src/cow-disk/disk.js';

export interface Command {
  id: number;
  op:
    | 'create'
    | 'open'
    | 'close'
    | 'fork'
    | 'prepare'
    | 'drop'
    | 'stats'
    | 'generations'
    | 'serve'
    | 'unserve';
  generation?: string;
  size_bytes?: number;
  /** Where a generation is served. */
  socket?: string;
}

export interface Reply {
  id: number;
  error?: string;
  message?: string;
  generations?: string[];
  stats?: { errors: number; lastError: string | null };
}

const [directory = '', socketPath = ''] = process.argv.slice(2);
let disk: Disk | undefined;
const views = new Map<string, { close(): Promise<void> }>();

async function run(command: Command): Promise<Partial<Reply>> {
  const { generation = '', socket = '' } = command;
  if (command.op === 'create') {
    await Disk.create(directory, { sizeBytes: command.size_bytes ?? 0 });
  } else if (command.op === 'open') {
    disk = await Disk.open(directory);
    await disk.serve({ socketPath, exportName: 'disk' });
  } else if (command.op === 'close') {
    await disk?.close();
  } else if (command.op === 'fork') {
    await disk?.fork(generation);
  } else if (command.op === 'prepare') {
    await disk?.prepareFork();
  } else if (command.op === 'drop') {
    await disk?.dropGeneration(generation);
  } else if (command.op === 'serve' && disk !== undefined) {
    views.set(socket, await disk.serveGeneration(generation, { socketPath: socket }));
  } else if (command.op === 'unserve') {
    await views.get(socket)?.close();
    views.delete(socket);
  } else if (command.op === 'stats' && disk !== undefined) {
    const { errors, lastError } = disk.stats();
    return { stats: { errors, lastError } };
  }
  const lists = command.op === 'open' || command.op === 'generations';
  return lists ? { generations: disk?.info().generations ?? [] } : {};
}

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line) as Command;
  let reply: Reply = { id: command.id };
  try {
    reply = { ...reply, ...(await run(command)) };
  } catch (error) {
    const { code, message } = asSnowflockError(error);
    reply = { ...reply, error: code, message };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}
process.exit(0);

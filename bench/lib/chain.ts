import { randomFillSync } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { NbdClient } from '../../test/blktap/nbd-client.js';
import { OwnProcess } from './nbd-process.js';

const PAGE = 4096;
const QUEUE = 32;

export interface ChainPlan {
  readonly directory: string;
  readonly socketPath: string;
  readonly size_bytes: number;
  /** Pages written in all, each once, spread evenly over the slices. */
  readonly pages: number;
  /** Sealed slices below the top, which is left empty; 0: the pages are in the top. */
  readonly depth: number;
  /** `scattered`: each slice has random pages; `dense`: one run of pages. */
  readonly layout: 'scattered' | 'dense';
}

/** Makes a disk by writes and forks over NBD. Its server still runs when this resolves. */
export async function makeChain(plan: ChainPlan, signal: AbortSignal): Promise<OwnProcess> {
  await rm(plan.directory, { recursive: true, force: true });
  const server = await OwnProcess.serve(plan.directory, plan.socketPath, plan.size_bytes);
  try {
    const client = await NbdClient.connect(plan.socketPath);
    try {
      const order = plan.layout === 'dense' ? ascending(plan.pages) : shuffled(plan.pages);
      const slices = Math.max(plan.depth, 1);
      for (let slice = 0; slice < slices; slice++) {
        signal.throwIfAborted();
        const from = Math.floor((slice * plan.pages) / slices);
        const to = Math.floor(((slice + 1) * plan.pages) / slices);
        await writePages(client, order.subarray(from, to));
        if (plan.depth > 0) await server.ask('fork 1');
      }
    } finally {
      await client.close();
    }
    return server;
  } catch (error) {
    await server.stop();
    throw error;
  }
}

/** Writes each page with contents of its own; neighbours in one request of up to 256 KiB. */
export async function writePages(client: NbdClient, pages: Uint32Array): Promise<void> {
  const runs: { first: number; count: number }[] = [];
  for (const page of pages) {
    const last = runs.at(-1);
    if (last !== undefined && last.first + last.count === page && last.count < 64) last.count++;
    else runs.push({ first: page, count: 1 });
  }
  let next = 0;
  const write = async (): Promise<void> => {
    for (let run = runs[next++]; run !== undefined; run = runs[next++]) {
      const data = noise(run.count * PAGE);
      for (let at = 0; at < run.count; at++) data.writeUInt32LE(run.first + at, at * PAGE);
      await client.write(run.first * PAGE, data);
    }
  };
  await Promise.all(Array.from({ length: QUEUE }, write));
}

const NOISE = randomFillSync(Buffer.alloc(64 * PAGE + 2 ** 16));

/** Bytes without zero pages; a view's copy, to be altered. */
function noise(bytes: number): Buffer {
  const at = Math.floor(Math.random() * 2 ** 16);
  return Buffer.from(NOISE.subarray(at, at + bytes));
}

function ascending(count: number): Uint32Array {
  return Uint32Array.from({ length: count }, (_, at) => at);
}

/** Fisher and Yates, with a fixed seed: every run of the bench has the same disks. */
export function shuffled(count: number): Uint32Array {
  const order = ascending(count);
  let state = 1;
  for (let at = count - 1; at > 0; at--) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    const other = Math.floor((state / 2 ** 32) * (at + 1));
    const page = order[at] ?? 0;
    order[at] = order[other] ?? 0;
    order[other] = page;
  }
  return order;
}

/**
 * The server process of the disk bench: opens the disk in DIRECTORY (made with SIZE_BYTES if there
 * is none), serves it on SOCKET, and answers one JSON line for each line of input. A process of its
 * own, as the peers' servers are: client and server share nothing.
 *
 *   fork COUNT   forks as often; `gate_us` and `whole_us` of each
 *   info         bytes of the index, sealed slices
 */
import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { Disk } from '../../src/cow-disk/disk.js';

/** Microseconds each: writes held off; from the call until the next fork could follow. */
export interface Forked {
  gate_us: number[];
  whole_us: number[];
}

export interface DiskSizes {
  index_bytes: number;
  sealed_slices: number;
}

const [directory = '', socketPath = '', size = ''] = process.argv.slice(2);
if (!existsSync(join(directory, 'store.journal'))) {
  await Disk.create(directory, { sizeBytes: Number(size) });
}
const disk = await Disk.open(directory);
await disk.serve({ socketPath, exportName: 'disk' });
console.log('{}');
for await (const line of createInterface({ input: process.stdin })) {
  const [command, argument] = line.split(' ');
  if (command === 'fork') console.log(JSON.stringify(await fork(Number(argument))));
  if (command === 'info') {
    const { indexBytes, slices } = disk.info();
    const sizes: DiskSizes = { index_bytes: indexBytes, sealed_slices: slices.length - 1 };
    console.log(JSON.stringify(sizes));
  }
}
await disk.close();

async function fork(count: number): Promise<Forked> {
  const done: Forked = { gate_us: [], whole_us: [] };
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    const { durationUs } = await disk.fork(randomBytes(16).toString('hex'));
    await disk.prepareFork();
    done.gate_us.push(durationUs);
    done.whole_us.push((performance.now() - start) * 1000);
  }
  return done;
}

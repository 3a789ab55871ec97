// What of a replica survives a power cut. The cut itself is told by the boot id in the map's header:
// under another one the bitmaps of that time are not to be believed.
import { open, truncate } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { openReplica, type Replica } from '../../src/pagestore/replica.js';
import { cleanup, codeOf, newGeneration, PAGE, temporary } from '../blktap/support.js';

const PAGES = 100;
/** Of MapHeader, native/pagestore/replica_map.h. */
const BOOT_AT = 88;

const page = (value: number) => Buffer.alloc(PAGE, value);

function opened(path: string, generation: string): Replica {
  const replica = openReplica(path, generation, PAGES, 'disk');
  cleanup(() => replica.close());
  return replica;
}

/** The file as after a restart of the machine. */
async function reboot(path: string): Promise<void> {
  const file = await open(`${path}.map`, 'r+');
  try {
    const boot = Buffer.alloc(32);
    await file.read(boot, 0, 32, BOOT_AT);
    expect(boot.toString('latin1')).toMatch(/^[0-9a-f]{32}$/);
    await file.write(Buffer.from('f'.repeat(32)), 0, 32, BOOT_AT);
  } finally {
    await file.close();
  }
}

test('after a power cut only what was synced is there; the rest is absent, never zeros', async () => {
  const path = join(await temporary(), 'replica');
  const generation = newGeneration();
  const first = opened(path, generation);
  first.fill(3, page(3));
  first.fillZero(70, 2);
  await first.sync();
  first.fill(4, page(4));
  first.fillZero(72, 1);
  first.close();
  await reboot(path);
  const second = opened(path, generation);
  expect(second.stats()).toMatchObject({ present: 1, zero: 2, complete: false });
  expect(second.read(3)?.equals(page(3))).toBe(true);
  expect(second.read(71)?.equals(page(0))).toBe(true);
  expect([second.read(4), second.read(72)]).toEqual([null, null]);
  // It goes on from there, and what comes now is synced as well.
  second.fill(4, page(4));
  await second.sync();
  second.close();
  await reboot(path);
  expect(opened(path, generation).stats()).toMatchObject({ present: 2, zero: 2 });
});

test('the death of a process loses nothing: the same boot', async () => {
  const path = join(await temporary(), 'replica');
  const generation = newGeneration();
  const first = opened(path, generation);
  first.fill(4, page(4));
  first.close();
  expect(opened(path, generation).read(4)?.equals(page(4))).toBe(true);
});

test('a replica is complete when the last page has come, once', async () => {
  const path = join(await temporary(), 'replica');
  const replica = opened(path, newGeneration());
  let calls = 0;
  const complete = new Promise<void>((resolve) => {
    replica.onComplete(() => {
      calls++;
      resolve();
    });
  });
  replica.fillZero(1, PAGES - 1);
  expect(replica.stats().complete).toBe(false);
  replica.fill(0, page(1));
  await complete;
  replica.fill(0, page(1));
  replica.fillZero(0, PAGES);
  const again = new Promise<void>((resolve) => replica.onComplete(resolve)); // is complete: at once
  await again;
  expect([calls, replica.stats().complete]).toEqual([1, true]);
});

test('a data file that lost pages its map has is an error', async () => {
  const path = join(await temporary(), 'replica');
  const generation = newGeneration();
  const first = opened(path, generation);
  first.fill(50, page(1));
  first.close();
  await truncate(path, 10 * PAGE);
  expect(await codeOf((async () => opened(path, generation))())).toBe('E_CORRUPT');
});

test('absent pages as runs: joined over words of the bitmap, and told if they are too many', async () => {
  const replica = opened(join(await temporary(), 'replica'), newGeneration());
  expect(replica.absentRuns(false, 1)).toEqual([0, PAGES]);
  replica.fill(3, page(3));
  replica.fillZero(10, 2);
  replica.fill(63, page(63));
  replica.fill(99, page(99));
  const runs = [0, 3, 4, 6, 12, 51, 64, 35];
  expect(replica.absentRuns(false, 4)).toEqual(runs);
  expect(replica.absentRuns(true, 4)).toEqual(runs); // nobody over it: all is needed
  expect(replica.absentRuns(false, 3)).toBeNull();
  replica.fillZero(0, PAGES);
  expect(replica.absentRuns(false, 0)).toEqual([]);
});

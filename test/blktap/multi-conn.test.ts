// NBD_FLAG_CAN_MULTI_CONN: what one connection flushes covers what others had acknowledged.
import { cp, readdir, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { CMD, type NbdClient } from './nbd-client.js';
import { connectTo, newDisk, openDisk, PAGE, temporary } from './support.js';

const PAGES = 64;
const FUA = 1;
const MULTI_CONN = 1 << 8;

/**
 * The disk's pages as after a power cut just now: without the live maps, whose content is not on the
 * device. (That data is synced before a map speaks of it is test/cow-disk/crash.test.ts.)
 */
async function afterPowerCut(directory: string): Promise<number[]> {
  const folder = await temporary();
  const cut = join(folder, 'cut');
  await cp(directory, cut, { recursive: true });
  for (const name of await readdir(cut)) {
    if (name.endsWith('.live')) await unlink(join(cut, name));
  }
  const disk = await openDisk(cut);
  const socketPath = join(folder, 'nbd');
  await disk.serve({ socketPath });
  const client = await connectTo(socketPath);
  const data = await client.read(0, PAGES * PAGE);
  return Array.from({ length: PAGES }, (_, page) => data[page * PAGE] as number);
}

async function clients(socketPath: string, count: number): Promise<NbdClient[]> {
  const all = [];
  for (let i = 0; i < count; i++) all.push(await connectTo(socketPath));
  expect(all.every((client) => (client.flags & MULTI_CONN) !== 0)).toBe(true);
  return all;
}

test('a flush on one connection covers what others had acknowledged, writes, zeroes and trims', async () => {
  const { directory, socketPath } = await newDisk(PAGES * PAGE);
  const [a, b, c, d] = (await clients(socketPath, 4)) as [
    NbdClient,
    NbdClient,
    NbdClient,
    NbdClient,
  ];
  await a.write(0, Buffer.alloc(32 * PAGE, 9));
  await d.flush();
  await a.write(PAGE, Buffer.alloc(PAGE, 1));
  await a.zero(4 * PAGE, PAGE);
  await b.trim(5 * PAGE, PAGE);
  await a.write(40 * PAGE, Buffer.alloc(PAGE, 2));
  await b.write(41 * PAGE + 100, Buffer.alloc(PAGE, 3)); // parts of two pages
  await a.request(CMD.zero, 43 * PAGE, PAGE, undefined, 2); // NO_HOLE
  await b.write(43 * PAGE, Buffer.alloc(10, 4));
  const before = await afterPowerCut(directory);
  expect(before.slice(40, 44)).toEqual([0, 0, 0, 0]); // the test can tell what was not flushed
  await c.flush();
  await a.write(50 * PAGE, Buffer.alloc(PAGE, 5));
  const after = await afterPowerCut(directory);
  expect(after.slice(0, 7)).toEqual([9, 1, 9, 9, 0, 0, 9]);
  expect(after.slice(40, 45)).toEqual([2, 0, 3, 4, 0]);
  expect(after[50]).toBe(0); // came after the flush
});

test('FUA covers its own request when it is answered, on whichever connection', async () => {
  const { directory, socketPath } = await newDisk(PAGES * PAGE);
  const all = await clients(socketPath, 4);
  await Promise.all(all.map((client, i) => client.write(i * PAGE, Buffer.alloc(PAGE, i + 1), FUA)));
  await all[0]?.request(CMD.zero, PAGE, PAGE, undefined, FUA);
  await all[1]?.request(CMD.trim, 2 * PAGE, PAGE, undefined, FUA);
  expect((await afterPowerCut(directory)).slice(0, 5)).toEqual([1, 0, 0, 4, 0]);
});

test('what one connection wrote, every other reads at once', async () => {
  const { socketPath } = await newDisk(PAGES * PAGE);
  const all = await clients(socketPath, 4);
  for (let i = 0; i < 200; i++) {
    const [writer, reader] = [all[i % 4], all[(i * 7 + 1) % 4]];
    const page = i % PAGES;
    await writer?.write(page * PAGE + 13, Buffer.alloc(700, i));
    const data = await reader?.read(page * PAGE + 13, 700);
    expect(data?.equals(Buffer.alloc(700, i)), `write ${i}`).toBe(true);
    if (i % 10 === 0) {
      await writer?.trim(page * PAGE, PAGE);
      expect((await reader?.read(page * PAGE, PAGE))?.equals(Buffer.alloc(PAGE))).toBe(true);
    }
  }
});

test('flushes of all connections under way at once, with writes between, are each kept', async () => {
  const { directory, socketPath } = await newDisk(PAGES * PAGE);
  const all = await clients(socketPath, 4);
  for (let round = 1; round <= 5; round++) {
    await Promise.all(
      all.map(async (client, i) => {
        for (let page = i; page < PAGES; page += 4) {
          await client.write(page * PAGE, Buffer.alloc(PAGE, round));
          if (page % 16 === i) await client.flush();
        }
      }),
    );
    await Promise.all(all.map((client) => client.flush()));
    expect(await afterPowerCut(directory)).toEqual(Array(PAGES).fill(round));
  }
});

import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { CMD, type NbdClient } from './nbd-client.js';
import {
  cleanup,
  connectTo,
  contents,
  execute,
  newDisk,
  newGeneration,
  newReplica,
  PAGE,
  temporary,
  topSlice,
  until,
} from './support.js';

const MIB = 2 ** 20;
const NO_HOLE = 2;
const FAST = 16;
const ENOTSUP = 95;

const zero = (client: NbdClient, offset: number, length: number, flags: number) =>
  client.request(CMD.zero, offset, length, undefined, flags);
const cache = (client: NbdClient, offset: number, length: number) =>
  client.request(CMD.cache, offset, length);

/** Like toEqual, which takes seconds for a MiB. */
function same(found: Buffer, expected: Buffer, what = ''): void {
  expect(found.equals(expected), what).toBe(true);
}

/** A served disk on a tmpfs of this many bytes, of which its files take a part. */
async function onSmallTmpfs(bytes: number): Promise<{ disk: Disk; client: NbdClient }> {
  const folder = await temporary();
  await execute('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'tmpfs', folder]);
  cleanup(() => execute('umount', [folder]));
  const directory = join(folder, 'disk');
  await Disk.create(directory, { sizeBytes: 64 * MIB });
  const disk = await Disk.open(directory);
  cleanup(() => disk.close());
  const socketPath = join(folder, 'nbd');
  await disk.serve({ socketPath });
  return { disk, client: await connectTo(socketPath) };
}

test('NO_HOLE takes the space: writes there succeed when the file system is full, and flush', async () => {
  const { client } = await onSmallTmpfs(4 * MIB);
  await client.write(10, Buffer.alloc(PAGE, 7));
  await zero(client, 0, MIB + 100, NO_HOLE); // its last page in part
  same(await client.read(0, MIB + PAGE), Buffer.alloc(MIB + PAGE));
  let full: unknown;
  for (let i = 8; full === undefined && i < 64; i++) {
    full = await client.write(i * MIB, Buffer.alloc(MIB, 1)).catch((error: unknown) => error);
  }
  expect(full).toMatchObject({ errno: 28 });
  // What was half done was given back; so fill that up too.
  for (let page = 0; page < 1024; page++) {
    const error = await client
      .write(2 * MIB + page * PAGE, Buffer.alloc(PAGE, 1))
      .catch((reason: unknown) => reason);
    if (error !== undefined) break;
  }
  await expect(client.write(40 * MIB, Buffer.alloc(PAGE, 1))).rejects.toMatchObject({ errno: 28 });
  for (let page = 0; page < 257; page++) await client.write(page * PAGE, Buffer.alloc(PAGE, page));
  for (const page of [0, 1, 255, 256]) {
    same(await client.read(page * PAGE, PAGE), Buffer.alloc(PAGE, page));
  }
  await client.flush();
});

test('NO_HOLE that finds no space is ENOSPC, and gives back what it took', async () => {
  const { client, disk } = await onSmallTmpfs(4 * MIB);
  await client.write(0, Buffer.alloc(PAGE, 7));
  await expect(zero(client, MIB, 32 * MIB, NO_HOLE)).rejects.toMatchObject({ errno: 28 });
  expect(disk.stats().noSpaceErrors).toBe(1);
  await client.trim(MIB, 32 * MIB);
  await client.write(MIB, Buffer.alloc(2 * MIB, 1));
  expect((await client.read(0, 1))[0]).toBe(7);
});

test('NO_HOLE makes data of the top out of pages from anywhere; older generations keep theirs', async () => {
  const { client, disk } = await newDisk(256 * PAGE).then(async (made) => ({
    ...made,
    client: await connectTo(made.socketPath),
  }));
  await client.write(0, Buffer.alloc(100 * PAGE, 1));
  const generation = newGeneration();
  await disk.fork(generation);
  await client.write(50 * PAGE, Buffer.alloc(20 * PAGE, 2));
  await client.trim(60 * PAGE, 5 * PAGE);
  const before = (await topSlice(disk)).dataBytes;
  await zero(client, 10 * PAGE + 1, 180 * PAGE, NO_HOLE | 1);
  const slice = await topSlice(disk);
  expect(slice.pages).toBe(181);
  expect(slice.dataBytes - before).toBeGreaterThanOrEqual((181 - 20) * PAGE);
  const expected = Buffer.alloc(256 * PAGE);
  expected.fill(1, 0, 10 * PAGE + 1);
  same(await client.read(0, 256 * PAGE), expected);
  const view = contents(await disk.provider(generation), 256);
  same(view.subarray(0, 100 * PAGE), Buffer.alloc(100 * PAGE, 1));
});

test('FAST_ZERO is refused, with nothing changed, exactly when bytes would have to be written', async () => {
  const { client, disk } = await newDisk(256 * PAGE).then(async (made) => ({
    ...made,
    client: await connectTo(made.socketPath),
  }));
  const cases: [string, number, number, number, boolean][] = [
    ['whole pages with data', 0, 10 * PAGE, FAST, true],
    ['whole pages of an older slice', 100 * PAGE, 5 * PAGE, FAST, true],
    ['pages never written, in part', 200 * PAGE + 5, 10 * PAGE, FAST, true],
    ['a trimmed page in part', 150 * PAGE + 5, 10, FAST, true],
    ['data of which the first page in part', 20 * PAGE + 1, 5 * PAGE - 1, FAST, false],
    ['data of which the last page in part', 20 * PAGE, 5 * PAGE - 1, FAST, false],
    ['inside of one page', 20 * PAGE + 100, 100, FAST, false],
    ['inside of one page of an older slice', 110 * PAGE + 100, 100, FAST, false],
    ['a hole and then half a page of data', 90 * PAGE, 10 * PAGE + 7, FAST, false],
    ['whole pages with NO_HOLE', 0, PAGE, FAST | NO_HOLE, false],
    ['a hole with NO_HOLE', 240 * PAGE, PAGE, FAST | NO_HOLE, false],
  ];
  for (const [what, offset, length, flags, fast] of cases) {
    await client.write(100 * PAGE, Buffer.alloc(20 * PAGE, 1));
    await disk.fork(newGeneration());
    await client.write(0, Buffer.alloc(50 * PAGE, 2));
    await client.write(150 * PAGE, Buffer.alloc(PAGE, 2));
    await client.trim(150 * PAGE, PAGE);
    await client.trim(50 * PAGE, 50 * PAGE);
    const before = await client.read(0, 256 * PAGE);
    const { pages } = await topSlice(disk);
    const answer = await zero(client, offset, length, flags).then(
      () => 0,
      (error: unknown) => (error as { errno: number }).errno,
    );
    expect(answer, what).toBe(fast ? 0 : ENOTSUP);
    if (!fast) {
      same(await client.read(0, 256 * PAGE), before, what);
      expect((await topSlice(disk)).pages, what).toBe(pages);
      await zero(client, offset, length, flags & ~FAST); // without the flag it must not be refused
    }
    before.fill(0, offset, offset + length);
    same(await client.read(0, 256 * PAGE), before, what);
  }
});

/** A clone over a replica that has none of its pages. */
async function clone(pages: number) {
  const generation = newGeneration();
  const replica = newReplica(join(await temporary(), 'replica'), generation, pages);
  const base = { kind: 'replica', generation } as const;
  const made = await newDisk(pages * PAGE, { base, replica: replica.handle });
  return { ...made, replica, client: await connectTo(made.socketPath) };
}

test('FAST_ZERO fetches nothing: whole pages need not, and pages in part are refused', async () => {
  const { client, replica, disk } = await clone(64);
  await zero(client, 0, 10 * PAGE, FAST);
  await expect(zero(client, 20 * PAGE, 10 * PAGE + 1, FAST)).rejects.toMatchObject({
    errno: ENOTSUP,
  });
  replica.fillZero(30, 1); // known to be zeros now
  await zero(client, 20 * PAGE, 10 * PAGE + 1, FAST);
  await zero(client, 40 * PAGE, PAGE, NO_HOLE);
  expect(replica.stats().waiting).toBe(0);
  expect(disk.stats().fetched).toBe(0);
  same(await client.read(20 * PAGE, 11 * PAGE), Buffer.alloc(11 * PAGE));
});

test('CACHE fetches what a clone lacks, at most 32 MiB of it, and is answered when it is there', async () => {
  const { client, replica, disk } = await clone(10_000);
  await client.write(PAGE, Buffer.alloc(PAGE, 1));
  replica.fill(2, Buffer.alloc(PAGE, 2));
  const small = cache(client, 0, 4 * PAGE);
  await until(() => replica.stats().waiting === 2);
  const large = cache(client, 0, 10_000 * PAGE);
  await until(() => replica.stats().waiting === 8192 - 2);
  expect(client.pending).toBe(2);
  replica.fillZero(0, 2);
  replica.fillZero(3, 1);
  await small;
  expect(client.pending).toBe(1);
  replica.fillZero(4, 8192 - 4);
  await large;
  expect(disk.stats().fetched).toBe(8192 - 2);
  expect((await client.read(0, 3 * PAGE))[2 * PAGE]).toBe(2);
});

test('CACHE of a source that is gone is an error; cached or not, the rest goes on', async () => {
  const { client, replica } = await clone(64);
  replica.fill(1, Buffer.alloc(PAGE, 1));
  const asked = cache(client, 0, 4 * PAGE);
  await until(() => replica.stats().waiting === 3);
  const failed = expect(asked).rejects.toMatchObject({ errno: 5 });
  replica.fail('E_SOURCE_LOST', 'gone');
  await failed;
  await cache(client, PAGE, PAGE);
  expect((await client.read(PAGE, 1))[0]).toBe(1);
});

test('CACHE changes nothing: data of all slices and an image base reads as before', async () => {
  const { client, disk } = await newDisk(64 * MIB).then(async (made) => ({
    ...made,
    client: await connectTo(made.socketPath),
  }));
  await client.write(0, Buffer.alloc(MIB, 1));
  await disk.fork(newGeneration());
  await client.write(MIB / 2, Buffer.alloc(MIB, 2));
  const before = await client.read(0, 4 * MIB);
  await cache(client, 0, 64 * MIB);
  await cache(client, 7, 64 * MIB - 7);
  same(await client.read(0, 4 * MIB), before);
});

import { appendFile, readdir, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { addon, type SliceRef } from '../../src/cow-disk/native.js';
import { serveDevice } from '../../src/cow-disk/nbd-server.js';
import { NbdClient } from '../blktap/nbd-client.js';
import {
  cleanup,
  codeOf,
  contents,
  newGeneration,
  newReplica,
  newSeed,
  PAGE,
  random,
  until,
} from '../blktap/support.js';
import { Bare, BareDisk, finish } from './native-support.js';

const PAGES = 256;
const BYTES = PAGES * PAGE;

/** Pages of one value each. */
function image(values: number[]): Buffer {
  return Buffer.concat(values.map((value) => Buffer.alloc(PAGE, value)));
}

test('disks on one slice share what lies below and nothing else', async () => {
  const bare = await Bare.make(BYTES);
  const first = await bare.disk();
  await first.write(0, 1, PAGES);
  const { chain } = await first.fork();
  const [a, b] = [await bare.disk(chain), await bare.disk(chain)];
  await a.write(0, 2);
  await b.write(1, 3);
  await first.write(2, 4);
  const read = async (disk: BareDisk) => {
    const data = await (await disk.client()).read(0, 3 * PAGE);
    return [data[0], data[PAGE], data[2 * PAGE]];
  };
  expect(await read(a)).toEqual([2, 1, 1]);
  expect(await read(b)).toEqual([1, 3, 1]);
  expect(await read(first)).toEqual([1, 1, 4]);
  // Each forks by itself, and the image below all of them is as it was.
  const forks = [await a.fork(false), await b.fork(), await first.fork()];
  expect((await bare.image(forks[0]?.chain ?? []))[0]).toBe(2);
  expect((await bare.image(chain)).equals(Buffer.alloc(BYTES, 1))).toBe(true);
  expect(a.native.info()).toMatchObject({ depth: 3 });
});

test('a hundred disks on a big slice cost little more index than one', async () => {
  const bare = await Bare.make(2 ** 30);
  const first = await bare.disk();
  const client = await first.client();
  for (let page = 0; page < 4000; page++) await client.write(page * 64 * PAGE, Buffer.alloc(PAGE));
  const { chain } = await first.fork();
  await first.close();
  const one = await bare.disk(chain);
  const alone = one.native.info().indexBytes;
  for (let i = 0; i < 100; i++) await bare.disk(chain);
  const last = await bare.disk(chain);
  expect(last.native.info().indexBytes).toBeLessThan(2 * alone);
});

test('a generation is read at any time: while it settles, later, after reopening', async () => {
  const bare = await Bare.make(BYTES);
  const disk = await bare.disk();
  const chains: SliceRef[][] = [];
  for (let i = 0; i < 5; i++) {
    await disk.write(i, i + 1, 2);
    const { chain } = await disk.fork(i % 2 === 0);
    chains.push(chain);
    if (i % 2 === 1) expect((await bare.image(chain))[i * PAGE]).toBe(i + 1);
  }
  await disk.native.settle();
  const values = (i: number) =>
    Array.from({ length: PAGES }, (_, page) => (page <= i ? page + 1 : page === i + 1 ? i + 1 : 0));
  for (const round of [0, 1]) {
    for (const [i, chain] of chains.entries()) {
      expect((await bare.image(chain)).equals(image(values(i))), `round ${round}`).toBe(true);
    }
    if (round === 1) break;
    await disk.close();
    await bare.reopen();
  }
});

test('generations nobody reads have no index', async () => {
  const bare = await Bare.make(2 ** 30);
  const disk = await bare.disk();
  const client = await disk.client();
  const write = async () => {
    for (let page = 0; page < 500; page++) {
      await client.write(page * 512 * PAGE, Buffer.alloc(PAGE, 1));
    }
  };
  await write();
  const chain = (await disk.fork()).chain;
  await write();
  await disk.fork();
  const few = disk.native.info().indexBytes;
  for (let i = 0; i < 10; i++) {
    await write();
    await disk.fork();
  }
  expect(disk.native.info().indexBytes).toBeLessThan(2 * few);
  // As long as somebody reads one it costs its own.
  const provider = (await bare.view(chain)).provider();
  const more = disk.native.info().indexBytes;
  expect(contents(provider, 1)[0]).toBe(1);
  expect(more).toBeGreaterThanOrEqual(few);
});

test('a slice has one disk, and a store one process', async () => {
  const bare = await Bare.make(BYTES);
  const disk = await bare.disk();
  expect(await codeOf(bare.openDisk(disk.chain))).toBe('E_IN_USE');
  expect(await codeOf(bare.view(disk.chain))).toBe('E_IN_USE');
  expect(await codeOf(addon().openStore(bare.directory))).toBe('E_IN_USE');
  expect(await codeOf(bare.store.close())).toBe('E_IN_USE');
  expect(bare.store.inUse(disk.chain[0]?.id ?? '')).toBe(true);
  const { chain } = await disk.fork();
  expect(bare.store.inUse(chain[0]?.id ?? '')).toBe(false);
  const view = await bare.view(chain);
  expect(bare.store.inUse(chain[0]?.id ?? '')).toBe(true);
  expect(await bare.store.removeSlices([chain[0]?.id ?? ''])).toEqual([]);
  expect(await readdir(bare.directory)).toContain(`${chain[0]?.id}.data`);
  view.close();
  expect(bare.store.inUse(chain[0]?.id ?? '')).toBe(false);
});

test('a reader left over from a closed store never sees what its next owner did', async () => {
  const bare = await Bare.make(BYTES);
  const disk = await bare.disk();
  await disk.write(0, 1, PAGES);
  const { chain } = await disk.fork();
  const provider = (await bare.view(chain)).provider();
  await disk.close();
  await bare.store.close();
  expect(contents(provider, PAGES).equals(Buffer.alloc(BYTES, 1))).toBe(true);
  bare.store = await addon().openStore(bare.directory);
  expect(() => addon().readPage(provider, 0)).toThrow(expect.objectContaining({ code: 'E_IO' }));
  expect((await bare.image(chain))[0]).toBe(1);
});

for (const bytes of [1, 511, PAGE - 1, PAGE + 1, 3 * PAGE + 100, 64 * PAGE + 4095]) {
  test(`a disk of ${bytes} bytes ends there, and its last page is zeros beyond`, async () => {
    const bare = await Bare.make(bytes);
    const path = join(bare.directory, 'image');
    await writeFile(path, Buffer.alloc(bytes + 10000, 9));
    for (const base of [bare.base, { kind: 'image', path, imageBytes: bytes + 10000 }]) {
      const over = base === bare.base ? 0 : 9;
      const chain = [await bare.slice()];
      const native = await bare.store.openDisk({ ...bare.chain(chain, base), spare: '' });
      const socketPath = join(bare.directory, `s${over}`);
      const server = await serveDevice(native.device(), { socketPath });
      cleanup(() => server.close());
      const client = await NbdClient.connect(socketPath);
      cleanup(() => client.close());
      const expected = Buffer.alloc(bare.pages * PAGE);
      expected.fill(over, 0, bytes);
      const check = async () => {
        expect((await client.read(0, bytes)).equals(expected.subarray(0, bytes))).toBe(true);
        const spare = await bare.slice(true);
        await native.attachSpare(spare.id);
        await native.fork(newGeneration());
        await native.settle();
        const view = await bare.store.openView(bare.chain(chain, base));
        expect(contents(view.provider(), bare.pages).equals(expected)).toBe(true);
        view.close();
        chain.push(spare);
      };
      await check();
      await client.write(bytes - 1, Buffer.alloc(1, 5));
      expected[bytes - 1] = 5;
      await check();
      const from = Math.max(0, bytes - PAGE - 7);
      await client.write(from, Buffer.alloc(bytes - from, 6));
      expected.fill(6, from, bytes);
      await check();
      await client.zero(Math.max(0, bytes - 50), Math.min(50, bytes));
      expected.fill(0, Math.max(0, bytes - 50), bytes);
      await check();
      await client.write(Math.floor((bytes - 1) / PAGE) * PAGE, Buffer.alloc(1, 7));
      expected[Math.floor((bytes - 1) / PAGE) * PAGE] = 7;
      await check();
      await client.trim(0, bytes);
      expected.fill(0);
      await check();
      await expect(client.read(bytes, 1)).rejects.toMatchObject({ errno: 22 });
      await client.close();
      await native.close();
    }
  });
}

test('a spoiled slice fails its own disk; others of the store go on', async () => {
  const bare = await Bare.make(BYTES);
  const root = await bare.disk();
  await root.write(0, 1, PAGES);
  const { chain } = await root.fork();
  const [bad, good] = [await bare.disk(chain), await bare.disk(chain)];
  await bad.write(0, 2, 10);
  await bad.fork();
  await good.write(0, 3, 10);
  await truncate(join(bare.directory, `${bad.below.at(-1)?.id}.data`), PAGE);
  const reading = (await bad.client()).read(5 * PAGE, PAGE);
  await expect(reading).rejects.toMatchObject({ errno: 5 });
  expect((await (await bad.client()).read(0, PAGE))[0]).toBe(2);
  expect((await (await good.client()).read(5 * PAGE, PAGE))[0]).toBe(3);
  expect((await good.fork()).chain.length).toBe(2);
  const id = bad.below.at(-1)?.id ?? '';
  const found = await addon().checkSlice({
    directory: bare.directory,
    id,
    map: 0,
    sizeBytes: BYTES,
  });
  expect(found.errors.join()).toContain('wrong size');
});

test('a replica below arrives on demand, also for views and clones', async () => {
  const generation = newGeneration();
  const bare = await Bare.make(BYTES, { kind: 'replica', generation });
  const replica = newReplica(join(bare.directory, 'replica'), generation, PAGES);
  const disk = await bare.disk([], replica.handle);
  await disk.write(0, 1);
  const { chain } = await disk.fork();
  const clone = await bare.disk(chain, replica.handle);
  const reading = (await clone.client()).read(0, 2 * PAGE);
  await until(() => replica.stats().waiting > 0);
  replica.fill(1, Buffer.alloc(PAGE, 8));
  const data = await reading;
  expect([data[0], data[PAGE]]).toEqual([1, 8]);
});

test('pulling gives a disk its own copy of all it reads, and lets the rest go', async () => {
  const bare = await Bare.make(BYTES + 300);
  const path = join(bare.directory, 'image');
  await writeFile(path, Buffer.alloc(100 * PAGE, 9));
  const base = { kind: 'image', path, imageBytes: 100 * PAGE };
  const lower = await bare.slice();
  const native = await bare.store.openDisk({ ...bare.chain([lower], base), spare: '' });
  const disk = new BareDisk(bare, native, [lower]);
  await disk.write(10, 1, 20);
  await (await disk.client()).zero(15 * PAGE, 5 * PAGE);
  await disk.fork();
  await disk.write(40, 2, 20);
  const client = await disk.client();
  const before = await client.read(0, BYTES + 300);
  const forkedPull = await native.pullBegin();
  await finish(forkedPull);
  await disk.fork();
  expect(await forkedPull.detach()).toEqual({ forked: true });
  const pull = await native.pullBegin();
  expect(pull.totalBytes).toBeGreaterThan(0);
  await disk.write(200, 3);
  before.fill(3, 200 * PAGE, 201 * PAGE);
  await finish(pull);
  expect(await pull.detach()).toEqual({ forked: false });
  expect(native.info().depth).toBe(1);
  const below = disk.below.map(({ id }) => id);
  expect(await bare.store.removeSlices(below)).toEqual(below);
  const names = await readdir(bare.directory);
  expect(names.filter((name) => below.some((id) => name.startsWith(id)))).toEqual([]);
  await truncate(path, 0);
  expect((await client.read(0, BYTES + 300)).equals(before)).toBe(true);
  const top = disk.chain.at(-1) as SliceRef;
  await disk.close();
  const again = await bare.store.openDisk({ ...bare.chain([top]), spare: '' });
  const last = new BareDisk(bare, again, [top]);
  expect((await (await last.client()).read(0, BYTES + 300)).equals(before)).toBe(true);
  await last.close();
});

test('pulling over a replica asks for its pages and comes back while it waits', async () => {
  const generation = newGeneration();
  const bare = await Bare.make(BYTES, { kind: 'replica', generation });
  const replica = newReplica(join(bare.directory, 'replica'), generation, PAGES);
  replica.fillZero(0, 100);
  const disk = await bare.disk([], replica.handle);
  const pull = await disk.native.pullBegin();
  expect((await pull.step(2 ** 20)).done).toBe(false);
  expect(replica.stats().waiting).toBe(PAGES - 100);
  for (let page = 100; page < PAGES; page++) replica.fill(page, Buffer.alloc(PAGE, page % 255));
  await finish(pull);
  expect(await pull.detach()).toEqual({ forked: false });
  const data = await (await disk.client()).read(0, BYTES);
  expect(data.subarray(0, 100 * PAGE).every((byte) => byte === 0)).toBe(true);
  for (let page = 100; page < PAGES; page++) expect(data[page * PAGE]).toBe(page % 255);
});

test('files that are not what they should be are told, never believed', async () => {
  const rand = random(newSeed('hostile'));
  const bare = await Bare.make(BYTES);
  const disk = await bare.disk();
  await disk.write(0, 1, 50);
  const { chain } = await disk.fork();
  await disk.close();
  const [{ id = '' } = {}] = chain;
  const check = () =>
    addon().checkSlice({ directory: bare.directory, id, map: 0, sizeBytes: BYTES });
  expect(await check()).toMatchObject({ state: 'sealed', pages: 50, leakedBytes: 0, errors: [] });
  for (let round = 0; round < 20; round++) {
    const junk = Buffer.from(Array.from({ length: 4096 }, () => Math.floor(rand() * 256)));
    await writeFile(join(bare.directory, `${id}.0.map`), junk.subarray(0, rand() * 4096));
    if (rand() < 0.5) await appendFile(join(bare.directory, `${id}.0.map`), Buffer.alloc(4096));
    expect((await check()).errors.length).toBeGreaterThan(0);
    expect(await codeOf(bare.view(chain))).toBe('E_CORRUPT');
  }
  expect(
    await codeOf(addon().checkSlice({ directory: bare.directory, id, map: 0, sizeBytes: 2 ** 60 })),
  ).toBe('E_ARGUMENT');
  expect((await readdir(bare.directory)).length).toBeGreaterThan(0);
});

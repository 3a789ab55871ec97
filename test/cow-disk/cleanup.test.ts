import { readdir } from 'node:fs/promises';
import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import { Disk } from '../../src/cow-disk/disk.js';
import { Store } from '../../src/cow-disk/store.js';
import { connectTo, execute, newDisk, newGeneration, PAGE, until } from '../blktap/support.js';
import {
  fill,
  image,
  newStore,
  openStore,
  pagesOf,
  pagesOfDisk,
  serving,
} from './store-support.js';

async function dataFiles(directory: string): Promise<number> {
  return (await readdir(directory)).filter((name) => name.endsWith('.data')).length;
}

async function takenBytes(directory: string): Promise<number> {
  return Number.parseInt((await execute('du', ['-s', '--block-size=1', directory])).stdout, 10);
}

test('fork and drop, 200 times: the chain stays short and the space bounded', async () => {
  const { directory, socketPath, disk } = await newDisk(2 ** 20);
  const client = await connectTo(socketPath);
  let longest = 0;
  let most = 0;
  for (let i = 0; i < 200; i++) {
    await client.write((i % 32) * PAGE, Buffer.alloc(8 * PAGE, 1 + (i % 255)));
    const generation = newGeneration();
    await disk.fork(generation);
    await disk.dropGeneration(generation);
    longest = Math.max(longest, disk.info().slices.length);
    if (i % 20 === 19) most = Math.max(most, await takenBytes(directory));
  }
  console.log(`longest chain ${longest} slices, most space ${most} bytes`);
  expect(longest).toBeLessThan(60); // without clean-up it is 201
  expect(most).toBeLessThan(16 * 2 ** 20);
  const model = await client.read(0, 2 ** 20);
  await until(() => disk.info().slices.length <= 3);
  expect(await client.read(0, 2 ** 20)).toEqual(model);
  await client.close();
  await disk.close();
  expect((await checkStore(directory)).filter((each) => each.severity === 'error')).toEqual([]);
});

test('dropped generations between kept ones are merged; the kept ones read the same', async () => {
  const { folder, directory, store } = await newStore();
  for (let i = 0; i < 10; i++) {
    await fill(store, 'web', folder, i + 1, [i, i + 1]);
    await store.snapshot({ disk: 'web', name: `g${i}` });
  }
  const kept = new Map<string, number[]>();
  for (const name of ['g2', 'g5', 'g9']) kept.set(name, await pagesOf(store, 'web', name));
  const before = await pagesOfDisk(store, 'web', folder);
  for (let i = 0; i < 10; i++) {
    if (!kept.has(`g${i}`)) await store.removeGeneration({ disk: 'web', generation: `g${i}` });
  }
  await store.settled();
  expect(await store.tasks()).toEqual([]);
  expect(await dataFiles(directory)).toBe(5); // three, the top, and its spare
  const check = async (of: Store) => {
    for (const [name, pages] of kept) expect(await pagesOf(of, 'web', name)).toEqual(pages);
    expect(await pagesOfDisk(of, 'web', folder)).toEqual(before);
  };
  await check(store);
  await store.close();
  expect(await checkStore(directory)).toEqual([]);
  await check(await openStore(directory));
});

test('a chain of 300 dropped slices collapses in a few transactions', async () => {
  const { folder, directory, store } = await newStore({ gc_bytes_per_s: 0 });
  const { disk, client } = await serving(store, 'web', folder);
  for (let i = 0; i < 300; i++) {
    await client.write((i % 60) * PAGE, Buffer.alloc(PAGE, 1 + (i % 255)));
    const generation = newGeneration();
    await disk.fork(generation);
    await disk.dropGeneration(generation);
  }
  const model = await client.read(0, 60 * PAGE);
  expect(disk.info().slices).toHaveLength(301);
  store.setCleanupRate(2 ** 30);
  await store.settled();
  expect(disk.info().slices).toHaveLength(2);
  expect(await client.read(0, 60 * PAGE)).toEqual(model);
  await client.close();
  await disk.close();
  await store.close();
  expect(await checkStore(directory)).toEqual([]);
});

test('what waits for clean-up is what it will do, not what a disk still reads', async () => {
  const { folder, store } = await newStore({ gc_bytes_per_s: 0 });
  await fill(store, 'web', folder, 1, [0, 1, 2, 3]);
  for (const name of ['a', 'b']) {
    await store.snapshot({ disk: 'web', name });
    await fill(store, 'web', folder, 2, [0]);
  }
  const waiting = async () => (await store.usage()).unreferenced_bytes;
  await store.removeGeneration({ disk: 'web', generation: 'b' });
  // Below the top alone: it holds a page that the disk reads, and is merged when the top is sealed.
  expect(await waiting()).toBe(0);
  await store.removeGeneration({ disk: 'web', generation: 'a' });
  expect(await waiting()).toBeGreaterThanOrEqual(4 * PAGE);
  store.setCleanupRate(2 ** 30);
  await store.settled();
  expect(await waiting()).toBe(0);
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(2, 1, 1, 1));
});

test('a closed store ends its clean-up at once; the next one goes on', async () => {
  const { folder, directory, store } = await newStore({ gc_bytes_per_s: 1 });
  for (let i = 0; i < 6; i++) {
    await fill(store, 'web', folder, i + 1, [i, i + 10, i + 20]);
    await store.snapshot({ disk: 'web', name: `g${i}` });
  }
  const last = await pagesOf(store, 'web', 'g5');
  for (let i = 0; i < 5; i++) await store.removeGeneration({ disk: 'web', generation: `g${i}` });
  while ((await store.tasks()).length === 0) await new Promise((resolve) => setImmediate(resolve));
  await store.close(); // at one byte a second it would take hours
  const again = await openStore(directory);
  await again.settled();
  expect(await dataFiles(directory)).toBe(3);
  expect(await pagesOf(again, 'web', 'g5')).toEqual(last);
});

test('pages of a dropped fork point that all above cover are given back', async () => {
  const { folder, directory, store } = await newStore();
  const pages = Array.from({ length: 32 }, (_, i) => i);
  await fill(store, 'web', folder, 1, pages);
  await store.snapshot({ disk: 'web', name: 'point' });
  await store.clone({ disk: 'web', generation: 'point', name: 'test' });
  await fill(store, 'web', folder, 2, pages);
  await fill(store, 'test', folder, 3, pages.slice(0, 31));
  const before = await takenBytes(directory);
  await store.removeGeneration({ disk: 'web', generation: 'point' });
  await store.settled();
  expect(before - (await takenBytes(directory))).toBeGreaterThanOrEqual(31 * PAGE);
  expect(await pagesOfDisk(store, 'test', folder)).toEqual(image(...Array(31).fill(3), 1));
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(...Array(32).fill(2)));
});

test('flatten: a served disk is cut loose from what is below, which then goes', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1, 2, 3]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await store.clone({ disk: 'web', generation: 'one', name: 'test' });
  const { disk, client } = await serving(store, 'test', folder);
  await client.write(PAGE, Buffer.alloc(PAGE, 2));
  const flattening = store.flatten({ disk: 'test', rate_bytes_per_s: 4 * PAGE });
  for (let i = 0; i < 3; i++) await disk.fork(newGeneration()); // it begins again
  await flattening;
  await client.write(2 * PAGE, Buffer.alloc(PAGE, 5));
  await client.close();
  await disk.close();
  expect((await store.list()).disks[1]).toMatchObject({ name: 'test', parent: null, depth: 1 });
  await store.removeDisk({ disk: 'web' });
  await store.settled();
  expect(await pagesOfDisk(store, 'test', folder)).toEqual(image(1, 2, 5, 1));
  await store.close();
  expect(await checkStore(directory)).toEqual([]);
  expect(await pagesOfDisk(await openStore(directory), 'test', folder)).toEqual(image(1, 2, 5, 1));
});

test('a disk that is closed while it is flattened stays as it was', async () => {
  const { folder, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1, 2, 3]);
  await store.snapshot({ disk: 'web', name: 'one' });
  const disk = await store.openDisk('web');
  const flattening = store.flatten({ disk: 'web', rate_bytes_per_s: 1 });
  flattening.catch(() => undefined);
  const of = async () => (await store.tasks()).find((task) => task.kind === 'flatten');
  while (((await of())?.done_bytes ?? 0) === 0) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  expect(await store.flatten({ disk: 'web' }).catch((error) => error.code)).toBe('E_STATE');
  await disk.close();
  await expect(flattening).rejects.toMatchObject({ code: 'E_CLOSED' });
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1, 1, 1, 1));
  expect((await store.list()).disks[0]).toMatchObject({ depth: 2 });
});

test('a disk of its own folder is a store: clean-up goes on where it was left', async () => {
  const { directory, disk } = await newDisk(2 ** 20);
  const generation = newGeneration();
  await disk.fork(generation);
  await disk.fork(newGeneration());
  await disk.dropGeneration(generation);
  await disk.close();
  const store = await Store.open(directory);
  await store.settled();
  await store.close();
  const again = await Disk.open(directory);
  expect(again.info().slices).toHaveLength(2);
  await again.close();
});

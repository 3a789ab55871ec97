import { readdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import { Store } from '../../src/cow-disk/store.js';
import { codeOf, execute, newGeneration, PAGE, temporary } from '../blktap/support.js';
import {
  BYTES,
  fill,
  image,
  newStore,
  openStore,
  pagesOf,
  pagesOfDisk,
  serving,
} from './store-support.js';

test('disks, clones and snapshots, each with its own pages, also after reopening', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1]);
  const before = await store.snapshot({ disk: 'web', name: 'before' });
  expect(before).toMatchObject({ name: 'before', disk: 'web', parent: null, size_bytes: BYTES });
  await fill(store, 'web', folder, 2, [1, 2]);
  const clone = await store.clone({ disk: 'web', generation: 'before', name: 'test' });
  expect(clone).toMatchObject({ name: 'test', parent: before.id, depth: 2, open: false });
  await fill(store, 'test', folder, 3, [3]);
  const later = await store.snapshot({ disk: 'test' });
  expect(later.parent).toBe(before.id);
  const check = async (of: Store) => {
    expect(await pagesOf(of, 'web', 'before')).toEqual(image(1, 1));
    expect(await pagesOf(of, 'test', before.id)).toEqual(image(1, 1)); // it lies on it
    expect(await pagesOf(of, 'test', later.id)).toEqual(image(1, 1, 0, 3));
    expect(await pagesOfDisk(of, 'web', folder)).toEqual(image(1, 2, 2));
    expect(await pagesOfDisk(of, 'test', folder)).toEqual(image(1, 1, 0, 3));
  };
  await check(store);
  const listed = await store.list();
  expect(listed.disks.map((disk) => disk.name)).toEqual(['web', 'test']);
  expect(listed.generations.map((generation) => generation.id)).toEqual([before.id, later.id]);
  await store.close();
  expect(await checkStore(directory)).toEqual([]);
  const again = await openStore(directory);
  expect(await again.list()).toEqual(listed);
  await check(again);
});

test('bad names and unknown things are refused, and nothing is left behind', async () => {
  const { directory, store } = await newStore();
  const files = (await readdir(directory)).sort();
  for (const name of ['', '.hidden', '-x', 'a/b', 'x'.repeat(65), 'ü', 'a b']) {
    expect(await codeOf(store.createDisk({ name, size_bytes: BYTES })), name).toBe('E_ARGUMENT');
  }
  for (const size_bytes of [0, -1, 1.5, 2 ** 46 + 1, Number.NaN]) {
    expect(await codeOf(store.createDisk({ name: 'x', size_bytes }))).toBe('E_ARGUMENT');
  }
  expect(await codeOf(store.createDisk({ name: 'web', size_bytes: BYTES }))).toBe('E_EXISTS');
  const two = await Promise.allSettled([
    store.createDisk({ name: 'x', size_bytes: BYTES }),
    store.createDisk({ name: 'x', size_bytes: BYTES }),
  ]);
  expect(two.map((each) => each.status).sort()).toEqual(['fulfilled', 'rejected']);
  await store.removeDisk({ disk: 'x' });
  await store.settled();
  expect(await codeOf(store.snapshot({ disk: 'none' }))).toBe('E_NOT_FOUND');
  const name = newGeneration(); // looks like an id
  expect(await codeOf(store.snapshot({ disk: 'web', name }))).toBe('E_ARGUMENT');
  expect(await codeOf(store.clone({ disk: 'web', generation: 'none', name: 'y' }))).toBe(
    'E_NOT_FOUND',
  );
  expect(await codeOf(store.removeGeneration({ disk: 'web', generation: newGeneration() }))).toBe(
    'E_NOT_FOUND',
  );
  expect(await codeOf(store.openDisk('none'))).toBe('E_NOT_FOUND');
  const base = { kind: 'image', path: 'relative' } as const;
  expect(await codeOf(store.createDisk({ name: 'y', size_bytes: BYTES, base }))).toBe('E_ARGUMENT');
  // A spare more than before, made by the failed snapshots.
  expect((await readdir(directory)).length).toBeLessThanOrEqual(files.length + 3);
  expect(await codeOf(Store.open(await temporary()))).toBe('E_NOT_FOUND');
});

test('a name is given once in a disk, also by two snapshots at a time', async () => {
  const { store } = await newStore();
  const both = await Promise.allSettled([
    store.snapshot({ disk: 'web', name: 'same' }),
    store.snapshot({ disk: 'web', name: 'same' }),
  ]);
  const failed = both.filter((each) => each.status === 'rejected');
  expect(failed.map((each) => each.reason.code)).toEqual(['E_EXISTS']);
  await store.clone({ disk: 'web', generation: 'same', name: 'test' });
  await store.snapshot({ disk: 'test', name: 'same' }); // another disk's
  await store.removeGeneration({ disk: 'web', generation: 'same' });
  await store.snapshot({ disk: 'web', name: 'same' });
});

test('a store has one owner, a disk one user', async () => {
  const { directory, store } = await newStore();
  expect(await codeOf(Store.open(directory))).toBe('E_IN_USE');
  expect(await codeOf(checkStore(directory))).toBe('E_IN_USE');
  const disk = await store.openDisk('web');
  expect(await codeOf(store.openDisk('web'))).toBe('E_IN_USE');
  const { id } = await store.snapshot({ disk: 'web' });
  expect(disk.info().generations).toEqual([id]);
  for (const refused of [
    store.removeDisk({ disk: 'web' }),
    store.rollback({ disk: 'web', generation: id }),
  ]) {
    expect(await codeOf(refused)).toBe('E_IN_USE');
  }
  expect((await store.list()).disks[0]).toMatchObject({ open: true });
  await disk.close();
  await store.close();
  expect(await codeOf(store.list())).toBe('E_CLOSED');
});

test('rollback: the disk holds again what the generation holds, newer ones stay', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await fill(store, 'web', folder, 2, [0, 1]);
  await store.snapshot({ disk: 'web', name: 'two' });
  await fill(store, 'web', folder, 3, [2]);
  await store.rollback({ disk: 'web', generation: 'one' });
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1));
  expect(await pagesOf(store, 'web', 'two')).toEqual(image(2, 2));
  await fill(store, 'web', folder, 4, [5]);
  await store.rollback({ disk: 'web', generation: 'two' });
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(2, 2));
  await store.settled();
  await store.close();
  expect(await checkStore(directory)).toEqual([]);
});

test('rename: the disk, its pages and its generations have the other name', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0]);
  const { id } = await store.snapshot({ disk: 'web', name: 'one' });
  await store.createDisk({ name: 'taken', size_bytes: BYTES });
  const rename = (disk: string, name: string) => codeOf(store.renameDisk({ disk, name }));
  expect(await rename('web', 'taken')).toBe('E_EXISTS');
  expect(await rename('none', 'free')).toBe('E_NOT_FOUND');
  expect(await rename('web', '.free')).toBe('E_ARGUMENT');
  const disk = await store.openDisk('web');
  expect(await rename('web', 'free')).toBe('E_IN_USE');
  await disk.close();
  expect(await store.renameDisk({ disk: 'web', name: 'free' })).toMatchObject({ name: 'free' });
  await store.close();
  const again = await openStore(directory);
  const { disks, generations } = await again.list();
  expect(disks.map(({ name }) => name).sort()).toEqual(['free', 'taken']);
  expect(generations).toMatchObject([{ id, disk: 'free', name: 'one' }]);
  expect(await pagesOf(again, 'free', 'one')).toEqual(image(1));
  expect(await pagesOfDisk(again, 'free', folder)).toEqual(image(1));
  await again.createDisk({ name: 'web', size_bytes: BYTES });
  await again.removeDisk({ disk: 'free' });
  await again.settled();
  await again.close();
  expect(await checkStore(directory)).toEqual([]);
});

test('commit: the origin holds what the clone holds, and the clone is gone', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await store.clone({ disk: 'web', generation: 'one', name: 'test' });
  await fill(store, 'test', folder, 2, [1]);
  await store.snapshot({ disk: 'test', name: 'own' });
  await fill(store, 'test', folder, 3, [2]);
  await fill(store, 'web', folder, 9, [7]);
  expect(await codeOf(store.commit({ disk: 'test' }))).toBe('E_STATE');
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1, 0, 0, 0, 0, 0, 0, 9));
  expect(await store.commit({ disk: 'test', discard: true })).toEqual({ origin: 'web' });
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1, 2, 3));
  expect((await store.list()).disks.map((disk) => disk.name)).toEqual(['web']);
  expect((await store.list()).generations.map((each) => each.name)).toEqual(['one']);
  expect(await codeOf(store.commit({ disk: 'web' }))).toBe('E_STATE'); // nobody's clone
  // A second one, whose origin was not written.
  await store.snapshot({ disk: 'web', name: 'two' });
  await store.clone({ disk: 'web', generation: 'two', name: 'test' });
  await fill(store, 'test', folder, 4, [3]);
  await store.commit({ disk: 'test' });
  expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1, 2, 3, 4));
  await store.close();
  const again = await openStore(directory);
  expect(await pagesOfDisk(again, 'web', folder)).toEqual(image(1, 2, 3, 4));
});

test('clones keep working when the disk and the generation they were made from are gone', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await store.clone({ disk: 'web', generation: 'one', name: 'test' });
  await fill(store, 'test', folder, 2, [1]);
  await store.removeDisk({ disk: 'web' });
  expect(await pagesOfDisk(store, 'test', folder)).toEqual(image(1, 2));
  expect(await codeOf(store.openGeneration('test', 'one'))).toBe('E_NOT_FOUND');
  await store.settled();
  await store.close();
  const again = await openStore(directory);
  expect(await again.list()).toMatchObject({ disks: [{ name: 'test' }], generations: [] });
  expect(await pagesOfDisk(again, 'test', folder)).toEqual(image(1, 2));
  await again.removeDisk({ disk: 'test' });
  await again.settled();
  await again.close();
  expect((await readdir(directory)).sort()).toEqual(['store.journal', 'store.lock']);
});

test('a dropped generation that somebody reads is readable until they let go, then it goes', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await fill(store, 'web', folder, 2, [0]);
  const two = await store.snapshot({ disk: 'web', name: 'two' });
  await store.rollback({ disk: 'web', generation: 'one' });
  const slices = async () =>
    (await readdir(directory)).filter((name) => name.endsWith('.data')).length;
  const view = await store.openGeneration('web', 'two');
  await store.removeGeneration({ disk: 'web', generation: 'two' });
  await store.settled();
  const held = await slices();
  const served = join(folder, 'two');
  const server = await view.serve({ socketPath: served, exportName: two.id });
  view.close();
  await store.settled();
  expect(await slices()).toBe(held); // the server reads it
  expect(
    (await execute('nbdinfo', ['--size', `nbd+unix:///${two.id}?socket=${served}`])).stdout,
  ).toBe(`${BYTES}\n`);
  await server.close();
  await store.settled();
  expect(await slices()).toBe(held - 1);
});

test('several disks of a store are written and forked at the same time', async () => {
  const { folder, directory, store } = await newStore();
  await store.createDisk({ name: 'db', size_bytes: 3 * BYTES });
  const work = async (name: string, value: number) => {
    const { disk, client } = await serving(store, name, folder);
    const made: string[] = [];
    for (let i = 0; i < 20; i++) {
      await client.write(i * PAGE, Buffer.alloc(PAGE, value + i));
      const generation = newGeneration();
      await disk.fork(generation);
      made.push(generation);
    }
    await client.close();
    await disk.close();
    return made;
  };
  const [web, db] = await Promise.all([work('web', 1), work('db', 101)]);
  await store.close();
  const again = await openStore(directory);
  const { generations } = await again.list();
  expect(generations.filter((each) => each.disk === 'web').map((each) => each.id)).toEqual(web);
  expect(generations.filter((each) => each.disk === 'db').map((each) => each.id)).toEqual(db);
  const expected = Array.from({ length: 10 }, (_, i) => 1 + i);
  expect(await pagesOf(again, 'web', web[9] ?? '')).toEqual(image(...expected));
});

test('a disk of any size, and one over an image', async () => {
  const { folder, store } = await newStore();
  const path = join(folder, 'image');
  await writeFile(path, Buffer.alloc(5000, 7));
  const base = { kind: 'image', path } as const;
  await store.createDisk({ name: 'odd', size_bytes: 12_345, base });
  const { client, disk } = await serving(store, 'odd', folder);
  const data = await client.read(0, 12_345);
  expect(data).toEqual(Buffer.concat([Buffer.alloc(5000, 7), Buffer.alloc(7345)]));
  expect(disk.info()).toMatchObject({ sizeBytes: 12_345, pages: 4, base });
  const { id } = await store.snapshot({ disk: 'odd' });
  expect((await store.list()).generations).toMatchObject([{ id, size_bytes: 12_345 }]);
});

test('usage adds up to what the files take', async () => {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1, 2, 3, 4, 5, 6, 7]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await store.clone({ disk: 'web', generation: 'one', name: 'test' });
  await fill(store, 'web', folder, 2, [0, 1]);
  await fill(store, 'test', folder, 3, [0, 1, 2, 3]);
  const two = await store.snapshot({ disk: 'test', name: 'two' });
  const usage = await store.usage();
  const { stdout } = await execute('sh', [
    '-c',
    `du -c --block-size=1 ${directory}/*.data ${directory}/*.map ${directory}/*.live | tail -n1`,
  ]);
  expect(usage.total_bytes).toBe(Number.parseInt(stdout, 10));
  const disk = (name: string) => usage.disks.find((each) => each.name === name);
  const within = (bytes: number | undefined, pages: number) => {
    expect(bytes).toBeGreaterThanOrEqual(pages * PAGE);
    expect(bytes).toBeLessThan((pages + 24) * PAGE); // maps, headers and the spare
  };
  within(disk('web')?.own_bytes, 2);
  within(disk('web')?.shared_bytes, 8);
  within(disk('test')?.own_bytes, 4);
  within(disk('test')?.shared_bytes, 8);
  expect(disk('web')?.shared_bytes).toBe(disk('test')?.shared_bytes);
  expect(usage.generations.find((each) => each.id === two.id)?.own_bytes).toBe(0);
  expect(usage.unreferenced_bytes).toBe(0);
  // What a disk owns is what removing it gives back.
  const own = disk('test')?.own_bytes ?? 0;
  await store.removeDisk({ disk: 'test' });
  await store.settled();
  expect(usage.total_bytes - (await store.usage()).total_bytes).toBe(own);
});

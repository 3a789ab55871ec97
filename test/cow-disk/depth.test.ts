// A disk of 10,000 generations: what it takes to make, open and read it.
import { mkdtemp, readdir, readlink, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { setFileCacheCapacity } from '../../src/cow-disk/file-cache.js';
import { addon } from '../../src/cow-disk/native.js';
import { Store } from '../../src/cow-disk/store.js';
import { cleanup, connectTo, newGeneration, newSeed, PAGE, random } from '../blktap/support.js';
import { openStore } from './store-support.js';

const SLICES = 10_000;
const PAGES = 512;
const FILES = 64;
/** Of the top, a spare and a slice that settles: .data, .map and .live each. */
const OWN_FILES = 9;

afterEach(() => setFileCacheCapacity(256));

async function openFiles(directory: string): Promise<number> {
  let count = 0;
  for (const fd of await readdir('/proc/self/fd')) {
    const path = await readlink(join('/proc/self/fd', fd)).catch(() => '');
    if (/\.(data|map|live)$/.test(path) && path.startsWith(directory)) count++;
  }
  return count;
}

/** What slice `slice` writes, to page `slice % PAGES`. */
function written(slice: number): Buffer {
  const page = Buffer.alloc(PAGE, 1 + (slice % 251));
  page.writeUInt32LE(slice);
  return page;
}

/** What a page holds when slices 0 to `last` are below. */
function expected(page: number, last: number): Buffer {
  if (page > last) return Buffer.alloc(PAGE);
  return written(last - ((last - page) % PAGES));
}

test('10,000 slices: few files are open, and the top and old generations read right', async () => {
  const rand = random(newSeed('depth'));
  const folder = await mkdtemp('/dev/shm/sf-depth-');
  cleanup(() => rm(folder, { recursive: true, force: true }));
  const directory = join(folder, 'store');
  const socketPath = join(folder, 'nbd');
  await Store.create(directory);
  const started = performance.now();
  const first = await openStore(directory, { max_open_files: FILES });
  await first.createDisk({ name: 'web', size_bytes: PAGES * PAGE });
  const generations: string[] = [];
  {
    const disk = await first.openDisk('web');
    await disk.serve({ socketPath, exportName: 'disk' });
    const client = await connectTo(socketPath);
    for (let slice = 0; slice < SLICES; slice++) {
      await client.write((slice % PAGES) * PAGE, written(slice));
      const generation = newGeneration();
      generations.push(generation);
      await disk.fork(generation);
    }
    await client.close();
    await first.close();
  }
  const made = performance.now();

  const store = await openStore(directory, { max_open_files: FILES });
  const disk = await store.openDisk('web');
  const opened = performance.now();
  expect(disk.info().slices).toHaveLength(SLICES + 1);
  expect(await openFiles(directory)).toBeLessThanOrEqual(FILES + OWN_FILES);

  await disk.serve({ socketPath, exportName: 'disk' });
  const clients = await Promise.all([0, 1, 2, 3].map(() => connectTo(socketPath)));
  let open = 0;
  const most = async () => {
    open = Math.max(open, await openFiles(directory));
  };
  const readers = clients.map(async (client) => {
    for (let n = 0; n < 500; n++) {
      const page = Math.floor(rand() * PAGES);
      const data = await client.read(page * PAGE, PAGE);
      expect(data.equals(expected(page, SLICES - 1)), `page ${page}`).toBe(true);
      if (n % 50 === 0) await most();
    }
    const whole = await client.read(0, PAGES * PAGE);
    for (let page = 0; page < PAGES; page++) {
      const data = whole.subarray(page * PAGE, (page + 1) * PAGE);
      expect(data.equals(expected(page, SLICES - 1)), `page ${page}`).toBe(true);
    }
    await most();
  });
  await Promise.all(readers);
  const read = performance.now();
  for (const last of [0, 1, 5000, SLICES - 1, Math.floor(rand() * SLICES)]) {
    const view = await disk.provider(generations[last] as string);
    for (let n = 0; n < 50; n++) {
      const page = Math.floor(rand() * PAGES);
      const data = addon().readPage(view, page);
      expect(data?.equals(expected(page, last)), `page ${page} of generation ${last}`).toBe(true);
    }
  }
  const viewed = performance.now();
  expect(open).toBeGreaterThan(FILES / 2);
  expect(open).toBeLessThanOrEqual(2 * FILES + OWN_FILES);
  expect(store.openFiles()).toMatchObject({ capacity: FILES });
  expect(store.openFiles().open).toBeLessThanOrEqual(FILES);
  console.log(
    `made in ${Math.round(made - started)} ms, opened in ${Math.round(opened - made)} ms, ` +
      `2,000 reads in ${Math.round(read - opened)} ms, 5 generations in ${Math.round(viewed - read)} ms, ` +
      `at most ${open} files open`,
  );
}, 300_000);

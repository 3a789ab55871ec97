import { copyFile, mkdtemp, readdir, readlink, rename, rm, truncate } from 'node:fs/promises';
import { constants } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { asSnowflockError } from '../../src/common/errors.js';
import { Disk } from '../../src/cow-disk/disk.js';
import {
  fileCacheStats,
  raceFileCache,
  setFileCacheCapacity,
} from '../../src/cow-disk/file-cache.js';
import { addon } from '../../src/cow-disk/native.js';
import type { NbdClient } from './nbd-client.js';
import {
  cleanup,
  connectTo,
  execute,
  newDisk,
  newGeneration,
  newSeed,
  openDisk,
  PAGE,
  random,
  temporary,
  until,
} from './support.js';

afterEach(() => setFileCacheCapacity(256));

/** Descriptors of this process for data files in `directory`. */
async function openFiles(directory: string): Promise<string[]> {
  const found: string[] = [];
  for (const fd of await readdir('/proc/self/fd')) {
    const path = await readlink(join('/proc/self/fd', fd)).catch(() => '');
    if (path.startsWith(directory) && path.includes('.data')) found.push(path);
  }
  return found;
}

/** Forks `depth` times, each slice with the page of its number: byte 1 + number % 251. */
async function grow(disk: Disk, client: NbdClient, depth: number): Promise<string[]> {
  const generations: string[] = [];
  for (let slice = 0; slice < depth; slice++) {
    await client.write(slice * PAGE, Buffer.alloc(PAGE, 1 + (slice % 251)));
    generations.push(newGeneration());
    await disk.fork(generations.at(-1) as string);
  }
  await disk.prepareFork();
  return generations;
}

async function check(client: NbdClient, slice: number): Promise<void> {
  const page = await client.read(slice * PAGE, PAGE);
  expect(page.equals(Buffer.alloc(PAGE, 1 + (slice % 251))), `slice ${slice}`).toBe(true);
}

test('2,000 slices are read right by several clients with 64 descriptors', async () => {
  const depth = 2000;
  setFileCacheCapacity(64);
  const rand = random(newSeed('file cache'));
  // Made in memory, where 2,000 forks take seconds; read from where disks are.
  const memory = await mkdtemp('/dev/shm/sf-disk-');
  cleanup(() => rm(memory, { recursive: true, force: true }));
  const made = join(memory, 'disk');
  await Disk.create(made, { sizeBytes: depth * PAGE });
  const disk = await openDisk(made);
  await disk.serve({ socketPath: join(memory, 'nbd'), exportName: 'disk' });
  const writer = await connectTo(join(memory, 'nbd'));
  const generations = await grow(disk, writer, depth);
  // The top and the spare have one each.
  expect((await openFiles(made)).length).toBeLessThanOrEqual(64 + 2);
  await writer.close();
  await disk.close();
  const folder = await temporary();
  await execute('cp', ['-r', '--sparse=always', made, folder]);
  const directory = join(folder, 'disk');
  const socketPath = join(folder, 'nbd');

  const again = await openDisk(directory);
  expect((await openFiles(directory)).length).toBeLessThanOrEqual(64 + 2);
  await again.serve({ socketPath, exportName: 'disk' });
  const before = fileCacheStats();
  const clients = await Promise.all([0, 1, 2, 3].map(() => connectTo(socketPath)));
  let most = 0;
  let reading = clients.length;
  const readers = clients.map(async (client) => {
    for (let i = 0; i < 2000; i++) await check(client, Math.floor(rand() * depth));
    reading--;
  });
  while (reading > 0) {
    most = Math.max(most, (await openFiles(directory)).length);
    await new Promise((resolve) => setImmediate(resolve));
  }
  await Promise.all(readers);
  expect(most).toBeLessThanOrEqual(2 * 64 + 2);
  expect(most).toBeGreaterThan(32);
  expect(fileCacheStats().opened - before.opened).toBeGreaterThan(1000);
  // Whole requests over all slices, and a generation half-way.
  const whole = await (clients[0] as NbdClient).read(0, depth * PAGE);
  for (let slice = 0; slice < depth; slice++) expect(whole[slice * PAGE]).toBe(1 + (slice % 251));
  const view = await again.provider(generations[1000] as string);
  expect(addon().readPage(view, 1000)?.[5]).toBe(1 + (1000 % 251));
  expect(addon().readPage(view, 1001)).toEqual(Buffer.alloc(PAGE));
  expect(fileCacheStats().open).toBeLessThanOrEqual(64);
  for (const client of clients) await client.close();
  await again.close();
}, 120_000);

test('one descriptor for all readers: they take turns, and none is left behind', async () => {
  const depth = 40;
  const { disk, directory, socketPath } = await newDisk(depth * PAGE);
  const clients = await Promise.all([...Array(8)].map(() => connectTo(socketPath)));
  await grow(disk, clients[0] as NbdClient, depth);
  setFileCacheCapacity(1);
  await Promise.all(
    clients.map(async (client, i) => {
      for (let n = 0; n < 200; n++) await check(client, (n * (2 * i + 1)) % depth);
    }),
  );
  expect(fileCacheStats().open).toBeLessThanOrEqual(2);
  setFileCacheCapacity(1);
  expect((await openFiles(directory)).length).toBeLessThanOrEqual(1 + 2);
  expect(disk.stats().errors).toBe(0);
});

/** A disk of three sealed slices whose files are all closed; paths of their data, oldest first. */
async function closedSlices() {
  const made = await newDisk(8 * PAGE);
  const client = await connectTo(made.socketPath);
  await grow(made.disk, client, 3);
  setFileCacheCapacity(1);
  await check(client, 2); // in the only place
  const paths = made.disk.info().slices.map((slice) => join(made.directory, `${slice.id}.data`));
  expect(await openFiles(made.directory)).not.toContain(paths[0]);
  return { ...made, client, path: paths[0] as string };
}

async function readFails(client: NbdClient): Promise<void> {
  await expect(client.read(0, PAGE)).rejects.toMatchObject({ errno: 5 });
}

test('a file replaced behind the disk is EIO to the client, said once; others go on', async () => {
  const { client, disk, path } = await closedSlices();
  await rename(path, `${path}.first`);
  await copyFile(`${path}.first`, path); // the same bytes and size: still not the same file
  await readFails(client);
  await readFails(client);
  expect(disk.stats().lastError).toContain(`${path} was replaced by another file`);
  expect(disk.stats().errors).toBeGreaterThanOrEqual(2);
  await check(client, 1);
  await check(client, 2);
  await rm(path);
  await rename(`${path}.first`, path);
  await check(client, 0);
});

test('a file cut short or gone is EIO to the client, with the reason', async () => {
  const first = await closedSlices();
  await truncate(first.path, PAGE);
  await readFails(first.client);
  expect(first.disk.stats().lastError).toMatch(/changed its size from 32768 to 4096 bytes/);
  await check(first.client, 1);

  const second = await closedSlices();
  await rm(second.path);
  await readFails(second.client);
  expect(second.disk.stats().lastError).toContain(`${second.path} vanished`);
  await check(second.client, 1);
  expect(first.disk.stats().lastError).not.toContain('vanished');
});

test('threads that read, hold, release and remove files get their bytes or a clear errno', async () => {
  const seed = newSeed('file cache race');
  const race = raceFileCache(await temporary(), 300, 16, 5000, seed);
  expect(race.wrong).toBe(0);
  expect(race.stale).toBeGreaterThan(0);
  expect(race.most).toBeLessThanOrEqual(2 * 16);
  expect(race.pinned).toBe(2 * 16); // and not one more
  expect(race.full).toBe(constants.errno.EMFILE);
  expect(race.letGo).toBe(0);
});

test('a capacity of nothing is refused', () => {
  let code = '';
  try {
    setFileCacheCapacity(0);
  } catch (error) {
    code = asSnowflockError(error).code;
  }
  expect(code).toBe('E_ARGUMENT');
});

test('a settled slice gives its descriptor up, a closed disk all of them', async () => {
  const { disk, directory, socketPath } = await newDisk(8 * PAGE);
  const client = await connectTo(socketPath);
  const [generation] = await grow(disk, client, 4);
  const held = await disk.provider(generation as string);
  await client.close();
  await disk.close();
  // What is handed out stays readable; it keeps its files in the cache's hands.
  expect(addon().readPage(held, 0)).toEqual(Buffer.alloc(PAGE, 1));
  setFileCacheCapacity(1);
  await until(() => fileCacheStats().open <= 1);
  expect(addon().readPage(held, 0)).toEqual(Buffer.alloc(PAGE, 1));
  expect((await openFiles(directory)).filter((path) => path.includes(' (deleted)'))).toEqual([]);
});

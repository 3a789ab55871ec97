// What fails below a disk is an error to the client and the operator, never a wrong byte; the rest,
// also of the same store, keeps working.
import { readdir, readFile, stat, truncate, unlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import { Store } from '../../src/cow-disk/store.js';
import type { NbdClient } from '../blktap/nbd-client.js';
import { codeOf, connectTo, contents, newGeneration, PAGE } from '../blktap/support.js';
import type { Command } from './power/child.js';
import { Faults, memoryFolder, type Server, startServer } from './power/server.js';
import { openStore, serving } from './store-support.js';

const PAGES = 256;
const EIO = 5;
const ENOSPC = 28;
const filled = (value: number, pages = 1) => Buffer.alloc(pages * PAGE, value);

async function done(server: Server, op: Command['op'], rest: Partial<Command> = {}) {
  const reply = await server.call(op, rest);
  expect(reply.error, `${op}: ${reply.message}`).toBeUndefined();
  return reply;
}

/**
 * Two served disks, `web` and `other`, in a process whose calls can be made to fail; the first page
 * of each holds ones, flushed. `client` and `second` are connected to `web`.
 */
async function faultyStore() {
  const folder = await memoryFolder('64m');
  const directory = join(folder, 'store');
  const faults = new Faults(folder);
  const server = startServer(directory, faults.env);
  await done(server, 'createStore');
  await done(server, 'open');
  const connect: Record<string, () => Promise<NbdClient>> = {};
  for (const name of ['web', 'other']) {
    const socket = join(folder, name);
    await done(server, 'create', { name, size_bytes: PAGES * PAGE });
    await done(server, 'serve', { disk: name, socket });
    await done(server, 'prepare', { disk: name });
    connect[name] = () => connectTo(socket);
    const client = await connectTo(socket);
    await client.write(0, filled(1));
    await client.flush();
    await client.close();
  }
  const web = connect.web as () => Promise<NbdClient>;
  const [client, second] = [await web(), await web()];
  const other = await (connect.other as () => Promise<NbdClient>)();
  return { folder, directory, faults, server, client, second, other };
}

/** The slice that is the disk's top, as the journal says. */
async function topOf(directory: string, disk: string): Promise<string> {
  let top = '';
  for (const line of (await readFile(join(directory, 'store.journal'), 'utf8')).split('\n')) {
    if (line === '') continue;
    const { disks } = JSON.parse(line.slice(line.indexOf('{'))) as {
      disks?: Record<string, { top: string }>;
    };
    top = disks?.[disk]?.top ?? top;
  }
  expect(top).toMatch(/^[0-9a-f]{32}$/);
  return top;
}

/** Until background work, which is tried again by itself, has no error any more. */
async function recovered(failures: () => Promise<unknown[]>): Promise<void> {
  while ((await failures()).length > 0) await new Promise((resolve) => setTimeout(resolve, 20));
}

async function works(client: NbdClient): Promise<void> {
  await client.write(PAGE, filled(9));
  await client.flush();
  expect(await client.read(0, 3 * PAGE)).toEqual(Buffer.concat([filled(1), filled(9), filled(0)]));
}

/** The disk's first pages as another process finds them. */
async function imageAfterKill(server: Server, directory: string, pages: number): Promise<Buffer> {
  await server.kill();
  const store = await openStore(directory);
  const { id } = await store.snapshot({ disk: 'web' });
  const view = await store.openGeneration('web', id);
  const image = contents(view.provider(), PAGES).subarray(0, pages * PAGE);
  view.close();
  await store.close();
  return image;
}

test('a page that cannot be written is EIO to its writer; the disk goes on', async () => {
  const { directory, faults, server, client, second, other } = await faultyStore();
  faults.fail('write', `${await topOf(directory, 'web')}.data`, 1, EIO);
  await expect(client.write(PAGE, filled(2))).rejects.toMatchObject({ errno: EIO });
  expect(await second.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  const { stats } = await done(server, 'stats', { disk: 'web' });
  expect(stats?.errors).toBeGreaterThan(0);
  expect(stats?.lastError).toMatch(/write .*\.data: Input\/output error/);
  expect((await done(server, 'stats', { disk: 'other' })).stats?.errors).toBe(0);
  await works(other);
  faults.stop();
  await client.write(PAGE, filled(3));
  await second.flush();
  const image = await imageAfterKill(server, directory, 2);
  expect(image).toEqual(Buffer.concat([filled(1), filled(3)]));
});

test('a page that cannot be read is EIO, never zeros; other pages are read', async () => {
  const { directory, faults, client, second, other } = await faultyStore();
  faults.fail('read', `${await topOf(directory, 'web')}.data`, 1, EIO);
  await expect(client.read(0, PAGE)).rejects.toMatchObject({ errno: EIO });
  await expect(client.read(0, 3 * PAGE)).rejects.toMatchObject({ errno: EIO });
  expect(await second.read(PAGE, PAGE)).toEqual(filled(0));
  await works(other);
  faults.stop();
  expect(await client.read(0, PAGE)).toEqual(filled(1));
});

for (const file of ['.data', '.0.map']) {
  test(`after a failed sync of ${file} no flush succeeds until the disk is opened again`, async () => {
    const { folder, directory, faults, server, client, second, other } = await faultyStore();
    await client.write(PAGE, filled(2));
    faults.fail('sync', `${await topOf(directory, 'web')}${file}`, 1, EIO);
    await expect(client.flush()).rejects.toMatchObject({ errno: EIO });
    // The kernel has forgotten which pages did not arrive: a flush that succeeds now would lie.
    faults.stop();
    await expect(second.flush()).rejects.toMatchObject({ errno: EIO });
    await expect(client.write(2 * PAGE, filled(3), 1)).rejects.toMatchObject({ errno: EIO });
    const { stats } = await done(server, 'stats', { disk: 'web' });
    expect(stats?.lastError).toMatch(/sync .*: Input\/output error/);
    expect(await second.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(2)]));
    await works(other);
    await client.close();
    await second.close();
    expect(await server.call('unserve', { disk: 'web' })).toMatchObject({ error: 'E_IO' });
    await done(server, 'serve', { disk: 'web', socket: join(folder, 'again') });
    await (await connectTo(join(folder, 'again'))).flush();
  });
}

test('a map that cannot be written fails the write; what was flushed stays', async () => {
  const { faults, client, second } = await faultyStore();
  faults.fail('write', '.live', 1, EIO);
  await expect(client.write(PAGE, filled(2))).rejects.toMatchObject({ errno: EIO });
  expect(await second.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  faults.stop();
  await client.write(PAGE, filled(3));
  await client.flush();
  expect(await second.read(PAGE, PAGE)).toEqual(filled(3));
});

test('a journal that cannot be written: what needs it says so and is done later; disks go on', async () => {
  const { faults, server, client, other } = await faultyStore();
  const generation = newGeneration();
  faults.fail('write', 'store.journal', 1, EIO);
  await done(server, 'fork', { disk: 'web', generation });
  const refused = await server.call('prepare', { disk: 'web' });
  expect(refused).toMatchObject({ error: 'E_IO' });
  expect(refused.message).toContain('store.journal: EIO');
  const clone = { disk: 'web', generation, name: 'clone' };
  expect(await server.call('clone', clone)).toMatchObject({ error: 'E_IO' });
  await client.write(0, filled(2));
  await client.flush();
  expect(await client.read(0, PAGE)).toEqual(filled(2));
  await works(other);
  faults.stop();
  await done(server, 'prepare', { disk: 'web' });
  await done(server, 'clone', clone);
  const { listing } = await done(server, 'list');
  expect(listing?.generations.map(({ id }) => id)).toEqual([generation]);
  expect(listing?.disks.map(({ name }) => name)).toEqual(['web', 'other', 'clone']);
});

test('a journal that cannot be synced is not written any more until the store is opened again', async () => {
  const { directory, faults, server, client, other } = await faultyStore();
  const generation = newGeneration();
  faults.fail('sync', 'store.journal', 1, EIO);
  await done(server, 'fork', { disk: 'web', generation });
  expect(await server.call('prepare', { disk: 'web' })).toMatchObject({ error: 'E_IO' });
  faults.stop();
  const refused = await server.call('prepare', { disk: 'web' });
  expect(refused).toMatchObject({ error: 'E_IO' });
  expect(refused.message).toContain('open the store again');
  await works(other);
  await client.write(PAGE, filled(2));
  await client.flush();
  await server.kill();
  const store = await openStore(directory);
  expect((await store.list()).generations).toMatchObject([{ id: generation, disk: 'web' }]);
  const view = await store.openGeneration('web', generation);
  expect(contents(view.provider(), PAGES).subarray(0, 2 * PAGE)).toEqual(
    Buffer.concat([filled(1), filled(0)]),
  );
  view.close();
  await store.close();
  expect((await checkStore(directory)).filter((each) => each.severity === 'error')).toEqual([]);
});

test('a merge whose pages cannot be synced is given up and begun anew; nothing is lost', async () => {
  const { folder, directory, faults, server, client, other } = await faultyStore();
  const generations: string[] = [];
  for (const value of [1, 2, 3]) {
    await client.write(value * PAGE, filled(value));
    const generation = newGeneration();
    await done(server, 'fork', { disk: 'web', generation });
    await done(server, 'prepare', { disk: 'web' });
    generations.push(generation);
  }
  const [first = '', second = ''] = generations;
  const expected = Buffer.concat([filled(1), filled(1), filled(2), filled(0)]);
  const socket = join(folder, 'view');
  const same = async () => {
    await done(server, 'serveGeneration', { disk: 'web', generation: second, socket });
    const view = await connectTo(socket);
    expect(await view.read(0, 4 * PAGE)).toEqual(expected);
    await view.close();
    await done(server, 'unserveGeneration', { socket });
  };
  faults.fail('sync', '.data', 1, EIO);
  await done(server, 'drop', { disk: 'web', generation: first });
  await done(server, 'settled');
  const { failures = [] } = await done(server, 'failures');
  expect(failures).toHaveLength(1);
  expect(failures[0]).toMatch(/^merge: E_IO: .*sync .*\.data: Input\/output error/);
  await same();
  faults.stop();
  await recovered(async () => (await done(server, 'failures')).failures ?? []);
  await done(server, 'settled');
  await same();
  await works(other);
  await server.kill();
  expect((await checkStore(directory)).filter((each) => each.severity !== 'note')).toEqual([]);
  const store = await openStore(directory);
  expect((await store.usage()).unreferenced_bytes).toBe(0);
  await store.close();
});

test('a slice cut short while it is served is EIO where bytes are missing, and then E_CORRUPT', async () => {
  const { folder, directory, client, second, other, server } = await faultyStore();
  await client.write(200 * PAGE, filled(7));
  await client.flush();
  await truncate(join(directory, `${await topOf(directory, 'web')}.data`), 100 * PAGE);
  await expect(client.read(200 * PAGE, PAGE)).rejects.toMatchObject({ errno: EIO });
  expect(await second.read(0, PAGE)).toEqual(filled(1));
  await works(other);
  await client.close();
  await second.close();
  await server.call('unserve', { disk: 'web' });
  const reply = await server.call('serve', { disk: 'web', socket: join(folder, 'again') });
  expect(reply).toMatchObject({ error: 'E_CORRUPT' });
  expect(reply.message).toMatch(/\.data has the wrong size/);
  await works(other);
});

test('a second server of a store is refused and the first one goes on', async () => {
  const { directory, client, other } = await faultyStore();
  const reply = await startServer(directory).call('open');
  expect(reply).toMatchObject({ error: 'E_IN_USE' });
  expect(reply.message).toContain(directory);
  expect(await codeOf(Store.open(directory))).toBe('E_IN_USE');
  await works(client);
  await works(other);
});

/** A store on a small file system that can be filled to the last page. */
async function smallStore(size: string) {
  const memory = await memoryFolder(size);
  const directory = join(memory, 'store');
  await Store.create(directory);
  const store = await openStore(directory, { gc_bytes_per_s: 2 ** 30 });
  await store.createDisk({ name: 'web', size_bytes: 64 * 2 ** 20 });
  const { disk, client } = await serving(store, 'web', memory);
  await disk.prepareFork();
  const ballast = join(memory, 'ballast');
  const fill = async () => {
    await expect(writeFile(ballast, Buffer.alloc(32 * 2 ** 20))).rejects.toMatchObject({
      code: 'ENOSPC',
    });
  };
  return { memory, directory, store, disk, client, fill, empty: () => unlink(ballast) };
}

async function firstPages(store: Store, generation: string, count: number): Promise<Buffer> {
  const view = await store.openGeneration('web', generation);
  try {
    return contents(view.provider(), count);
  } finally {
    view.close();
  }
}

test('a fork on a full file system is E_NO_SPACE; with room again all goes on', async () => {
  const { store, disk, client, fill, empty } = await smallStore('2m');
  await client.write(0, filled(1));
  await fill();
  await expect(client.write(PAGE, filled(2, 64))).rejects.toMatchObject({ errno: ENOSPC });
  const first = newGeneration();
  // The spare is there already; what is written after the fork is not.
  const forked = await disk.fork(first).then(
    () => true,
    () => false,
  );
  expect(await codeOf(disk.prepareFork())).toBe('E_NO_SPACE');
  expect(await client.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  await empty();
  await disk.prepareFork();
  await client.write(PAGE, filled(2));
  await client.flush();
  if (!forked) await disk.fork(first);
  const second = newGeneration();
  await disk.fork(second);
  await disk.prepareFork();
  const expected = Buffer.concat([filled(1), filled(forked ? 0 : 2)]);
  expect(await firstPages(store, first, 2)).toEqual(expected);
  expect(await firstPages(store, second, 2)).toEqual(Buffer.concat([filled(1), filled(2)]));
});

/** The code of its error, or '' if there is none. */
const answer = (work: Promise<unknown>) =>
  work.then(
    () => '',
    (error: { code: string }) => error.code,
  );

test('a snapshot on a file system that is full is there if and only if that was answered', async () => {
  const { memory, store, client, empty } = await smallStore('2m');
  await client.write(0, filled(1));
  const ballast = join(memory, 'ballast');
  await expect(writeFile(ballast, Buffer.alloc(32 * 2 ** 20))).rejects.toMatchObject({
    code: 'ENOSPC',
  });
  const { size } = await stat(ballast);
  const named = async () => (await store.list()).generations.map(({ name }) => name);
  const answered: string[] = [];
  let refused = 0;
  // A page more of room each time: it fails at one file after the other, at last at none.
  for (let pages = 0; refused === pages; pages++) {
    await truncate(ballast, size - pages * PAGE);
    const code = await answer(store.snapshot({ disk: 'web', name: 'same' }));
    if (code === '') answered.push('same');
    else refused++;
    expect(code, `${pages} pages`).toMatch(/^(E_NO_SPACE)?$/);
    expect(await named(), `${pages} pages`).toEqual(answered);
  }
  expect(refused).toBeGreaterThan(0);
  await empty();
  await store.snapshot({ disk: 'web', name: 'next' });
  expect(await named()).toEqual(['same', 'next']);
  expect(await client.read(0, PAGE)).toEqual(filled(1));
});

test('a snapshot of a disk that nobody has open is there if and only if that was answered', async () => {
  const { memory, store, disk, client, fill, directory } = await smallStore('2m');
  await client.close();
  await disk.close();
  await fill();
  const ballast = join(memory, 'ballast');
  const { size } = await stat(ballast);
  for (let pages = 0, code = '?'; code !== ''; pages++) {
    await truncate(ballast, size - pages * PAGE);
    code = await answer(store.snapshot({ disk: 'web', name: 'one' }));
    expect(code).toMatch(/^(E_NO_SPACE)?$/);
    expect((await store.list()).generations).toHaveLength(code === '' ? 1 : 0);
  }
  expect((await store.list()).generations.map(({ name }) => name)).toEqual(['one']);
  await store.close();
  expect((await checkStore(directory)).filter(({ severity }) => severity === 'error')).toEqual([]);
});

test('a merge on a full file system is given up, loses nothing, and goes on when there is room', async () => {
  const { directory, store, disk, client, fill, empty } = await smallStore('8m');
  const image = Buffer.concat([filled(1, 64), filled(2, 200)]);
  await client.write(0, image.subarray(0, 64 * PAGE));
  const { id: first } = await store.snapshot({ disk: 'web' });
  await client.write(64 * PAGE, image.subarray(64 * PAGE));
  const { id: second } = await store.snapshot({ disk: 'web' });
  await client.write(0, filled(3));
  await client.flush();
  await fill();
  await store.removeGeneration({ disk: 'web', generation: first });
  await store.settled();
  const failed = async () => (await store.tasks()).filter(({ error }) => error !== null);
  const failures = await failed();
  expect(failures.map(({ kind }) => kind)).toEqual(['merge']);
  expect(failures[0]?.error).toMatch(/^E_NO_SPACE: copy pages from slice/);
  const read = async () => {
    expect((await firstPages(store, second, 264)).equals(image)).toBe(true);
    expect((await client.read(0, PAGE)).equals(filled(3))).toBe(true);
    expect((await client.read(PAGE, 263 * PAGE)).equals(image.subarray(PAGE))).toBe(true);
  };
  await read();
  await client.write(0, filled(4)); // in place
  await client.write(0, filled(3));
  expect((await store.usage()).unreferenced_bytes).toBeGreaterThan(0);
  await empty();
  await recovered(failed);
  await store.settled();
  await read();
  expect((await store.usage()).unreferenced_bytes).toBe(0);
  await client.close();
  await disk.close();
  await store.close();
  expect((await checkStore(directory)).filter((each) => each.severity !== 'note')).toEqual([]);
  const slices = (await readdir(directory)).filter((name) => name.endsWith('.data'));
  expect(slices).toHaveLength(3); // the merged one, the top, the spare
});

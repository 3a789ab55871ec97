// What fails below a disk is an error to the client and the operator, never a wrong byte; the rest
// keeps working.
import { readdir, truncate, unlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import {
  codeOf,
  connectTo,
  contents,
  newGeneration,
  openDisk,
  PAGE,
  temporary,
} from '../blktap/support.js';
import { Faults, memoryFolder, type Server, startServer } from './power/server.js';

const PAGES = 256;
const EIO = 5;
const ENOSPC = 28;
const filled = (value: number, pages = 1) => Buffer.alloc(pages * PAGE, value);

/** A served disk in a process whose calls can be made to fail; page 0 holds ones, flushed. */
async function faultyDisk() {
  const folder = await memoryFolder('64m');
  const directory = join(folder, 'disk');
  const socketPath = join(folder, 'nbd');
  const faults = new Faults(folder);
  const server = startServer(directory, socketPath, faults.env);
  expect(await server.call('create', { size_bytes: PAGES * PAGE })).toEqual({ id: 1 });
  expect(await server.call('open')).toEqual({ id: 2, generations: [] });
  const client = await connectTo(socketPath);
  const other = await connectTo(socketPath);
  await client.write(0, filled(1));
  await client.flush();
  return { directory, faults, server, client, other };
}

async function lastError(server: Server): Promise<string> {
  return (await server.call('stats')).stats?.lastError ?? '';
}

test('a page that cannot be written is EIO to its writer; the disk goes on', async () => {
  const { directory, faults, server, client, other } = await faultyDisk();
  faults.fail('write', '.data', 1, EIO);
  await expect(client.write(PAGE, filled(2))).rejects.toMatchObject({ errno: EIO });
  expect(await other.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  expect((await server.call('stats')).stats?.errors).toBeGreaterThan(0);
  faults.stop();
  await client.write(PAGE, filled(3));
  await other.flush();
  await server.kill();
  const disk = await openDisk(directory);
  const generation = newGeneration();
  await disk.fork(generation);
  const image = contents(await disk.provider(generation), PAGES);
  expect(image.subarray(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(3)]));
});

test('a page that cannot be read is EIO, never zeros; other pages are read', async () => {
  const { faults, client, other } = await faultyDisk();
  faults.fail('read', '.data', 1, EIO);
  await expect(client.read(0, PAGE)).rejects.toMatchObject({ errno: EIO });
  await expect(client.read(0, 3 * PAGE)).rejects.toMatchObject({ errno: EIO });
  expect(await other.read(PAGE, PAGE)).toEqual(filled(0));
  faults.stop();
  expect(await client.read(0, PAGE)).toEqual(filled(1));
});

for (const file of ['.data', '.map']) {
  test(`after a failed sync of ${file} no flush succeeds until the disk is opened again`, async () => {
    const { faults, server, client, other } = await faultyDisk();
    await client.write(PAGE, filled(2));
    faults.fail('sync', file, 1, EIO);
    await expect(client.flush()).rejects.toMatchObject({ errno: EIO });
    // The kernel has forgotten which pages did not arrive: a flush that succeeds now would lie.
    faults.stop();
    await expect(other.flush()).rejects.toMatchObject({ errno: EIO });
    await expect(client.write(2 * PAGE, filled(3), 1)).rejects.toMatchObject({ errno: EIO });
    expect(await lastError(server)).toMatch(/sync .*: Input\/output error/);
    expect(await other.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(2)]));
    await client.close();
    await other.close();
    expect(await server.call('close')).toMatchObject({ error: 'E_IO' });
    expect((await server.call('open')).error).toBeUndefined();
  });
}

test('a map that cannot be written fails the write; what was flushed stays', async () => {
  const { faults, client, other } = await faultyDisk();
  faults.fail('write', '.live', 1, EIO);
  await expect(client.write(PAGE, filled(2))).rejects.toMatchObject({ errno: EIO });
  expect(await other.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  faults.stop();
  await client.write(PAGE, filled(3));
  await client.flush();
  expect(await other.read(PAGE, PAGE)).toEqual(filled(3));
});

test('a fork whose records cannot be written says so, and is made good when they can', async () => {
  const { faults, server, client } = await faultyDisk();
  const generation = newGeneration();
  expect((await server.call('prepare')).error).toBeUndefined(); // the spare of this fork is there
  faults.fail('write', 'store.journal', 1, EIO);
  expect((await server.call('fork', { generation })).error).toBeUndefined();
  const refused = await server.call('prepare');
  expect(refused).toMatchObject({ error: 'E_IO' });
  expect(refused.message).toContain('store.journal');
  await client.write(0, filled(2));
  await client.flush();
  expect(await client.read(0, PAGE)).toEqual(filled(2));
  faults.stop();
  expect((await server.call('prepare')).error).toBeUndefined();
  expect((await server.call('fork', { generation: newGeneration() })).error).toBeUndefined();
});

test('a slice cut short while it is served is EIO where bytes are missing, and then E_CORRUPT', async () => {
  const { directory, client, other, server } = await faultyDisk();
  await client.write(200 * PAGE, filled(7));
  await client.flush();
  for (const name of await readdir(directory)) {
    if (name.endsWith('.data')) await truncate(join(directory, name), 100 * PAGE);
  }
  await expect(client.read(200 * PAGE, PAGE)).rejects.toMatchObject({ errno: EIO });
  expect(await other.read(0, PAGE)).toEqual(filled(1));
  await client.close();
  await other.close();
  await server.call('close');
  const reply = await server.call('open');
  expect(reply).toMatchObject({ error: 'E_CORRUPT' });
  expect(reply.message).toMatch(/\.data has the wrong size/);
});

test('a second server on a disk is refused and the first one goes on', async () => {
  const { directory, client } = await faultyDisk();
  const second = startServer(directory, join(await temporary(), 'nbd'), {});
  const reply = await second.call('open');
  expect(reply).toMatchObject({ error: 'E_IN_USE' });
  expect(reply.message).toContain(directory);
  expect(await codeOf(Disk.open(directory))).toBe('E_IN_USE');
  await client.write(PAGE, filled(2));
  await client.flush();
  expect(await client.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(2)]));
});

test('a fork on a full file system is E_NO_SPACE; with room again all goes on', async () => {
  const memory = await memoryFolder('2m');
  const directory = join(memory, 'disk');
  await Disk.create(directory, { sizeBytes: 64 * 2 ** 20 });
  const disk = await openDisk(directory);
  const socketPath = join(memory, 'nbd');
  await disk.serve({ socketPath });
  const client = await connectTo(socketPath);
  await client.write(0, filled(1));
  const ballast = join(memory, 'ballast');
  await writeFile(ballast, Buffer.alloc(4 * 2 ** 20)).catch((error: unknown) =>
    expect(error).toMatchObject({ code: 'ENOSPC' }),
  );
  await expect(client.write(PAGE, filled(2, 64))).rejects.toMatchObject({ errno: ENOSPC });
  const first = newGeneration();
  // The spare is there already; what is written after the fork is not.
  const forked = await disk.fork(first).then(
    () => true,
    () => false,
  );
  expect(await codeOf(disk.prepareFork())).toBe('E_NO_SPACE');
  expect(await client.read(0, 2 * PAGE)).toEqual(Buffer.concat([filled(1), filled(0)]));
  await unlink(ballast);
  await disk.prepareFork();
  await client.write(PAGE, filled(2));
  await client.flush();
  if (!forked) await disk.fork(first);
  const second = newGeneration();
  await disk.fork(second);
  expect(contents(await disk.provider(first), 2)).toEqual(
    Buffer.concat([filled(1), filled(forked ? 0 : 2)]),
  );
  expect(contents(await disk.provider(second), 2)).toEqual(Buffer.concat([filled(1), filled(2)]));
});

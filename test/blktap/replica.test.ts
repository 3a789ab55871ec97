import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { addon } from '../../src/cow-disk/native.js';
import { serveGeneration } from '../../src/disk-server/disk-server.js';
import {
  codeOf,
  connectTo,
  newDisk,
  newGeneration,
  newReplica,
  PAGE,
  temporary,
  until,
} from './support.js';

const PAGES = 1024;
const BYTES = PAGES * PAGE;

async function clone() {
  const generation = newGeneration();
  const replica = newReplica(join(await temporary(), 'replica'), generation, PAGES);
  const base = { kind: 'replica', generation } as const;
  const made = await newDisk(BYTES, { base, replica: replica.handle });
  return { ...made, replica, generation, client: await connectTo(made.socketPath) };
}

test('a read of an absent page waits for it; others go on', async () => {
  const { client, replica, disk } = await clone();
  replica.fillZero(0, 100);
  const waiting = client.read(200 * PAGE + 10, 2 * PAGE);
  await until(() => replica.stats().waiting === 3);
  // Far more than there are workers.
  const others = Array.from({ length: 40 }, (_, i) => client.read((300 + i) * PAGE, PAGE));
  await until(() => replica.stats().waiting === 43);
  expect(await client.read(0, 100 * PAGE)).toEqual(Buffer.alloc(100 * PAGE));
  await client.write(400 * PAGE, Buffer.alloc(PAGE, 4));
  await client.flush();
  for (let i = 39; i >= 0; i--) {
    replica.fill(300 + i, Buffer.alloc(PAGE, i));
    expect((await others[i])?.[0]).toBe(i);
  }
  expect(client.pending).toBe(1);
  replica.fill(201, Buffer.alloc(PAGE, 2));
  replica.fill(202, Buffer.alloc(PAGE, 3));
  replica.fillZero(200, 1);
  const data = await waiting;
  expect([data[0], data[PAGE], data[2 * PAGE - 1]]).toEqual([0, 2, 3]);
  expect(disk.stats().fetched).toBe(43);
});

test('a page written whole before it was read is never asked for', async () => {
  const { client, replica, disk } = await clone();
  await client.write(10 * PAGE, Buffer.alloc(100 * PAGE, 1));
  await client.zero(200 * PAGE, 10 * PAGE);
  await client.trim(300 * PAGE - 1, 10 * PAGE + 2);
  await client.write(20 * PAGE + 100, Buffer.alloc(100, 2));
  expect((await client.read(20 * PAGE, PAGE))[150]).toBe(2);
  expect(await client.read(300 * PAGE, 10 * PAGE)).toEqual(Buffer.alloc(10 * PAGE));
  expect(replica.stats().waiting).toBe(0);
  expect(disk.stats().fetched).toBe(0);
});

test('a page written in part is fetched and filled up', async () => {
  const { client, replica, disk } = await clone();
  const write = client.write(10 * PAGE + 100, Buffer.alloc(3 * PAGE, 1));
  await until(() => replica.stats().waiting === 2); // its first and last page, not the middle
  replica.fill(10, Buffer.alloc(PAGE, 7));
  replica.fill(13, Buffer.alloc(PAGE, 8));
  await write;
  const data = await client.read(10 * PAGE, 4 * PAGE);
  expect(data.subarray(0, 100)).toEqual(Buffer.alloc(100, 7));
  expect(data.subarray(100, 100 + 3 * PAGE)).toEqual(Buffer.alloc(3 * PAGE, 1));
  expect(data.subarray(100 + 3 * PAGE)).toEqual(Buffer.alloc(PAGE - 100, 8));
  expect(disk.stats().fetched).toBe(2);
  expect(replica.stats().present).toBe(2); // the clone's own writes stay out of it
});

test('two writes of parts of one absent page both take', async () => {
  const { client, replica } = await clone();
  const writes = [0, 1, 2, 3, 4, 5, 6, 7].map((i) =>
    client.write(5 * PAGE + i * 512, Buffer.alloc(256, i + 1)),
  );
  await until(() => replica.stats().waiting === 1);
  replica.fill(5, Buffer.alloc(PAGE, 0xff));
  await Promise.all(writes);
  const page = await client.read(5 * PAGE, PAGE);
  for (let i = 0; i < 8; i++) {
    expect([page[i * 512], page[i * 512 + 256]]).toEqual([i + 1, 0xff]);
  }
});

test('parts of the same pages written at once from two connections all take', async () => {
  const { client, replica, socketPath } = await clone();
  const clients = [client, await connectTo(socketPath)];
  for (let page = 0; page < PAGES; page++) replica.fill(page, Buffer.alloc(PAGE, 0xff));
  const writes: Promise<void>[] = [];
  for (let page = 0; page < PAGES; page++) {
    for (let i = 0; i < 8; i++) {
      const write = clients[i % 2]?.write(page * PAGE + i * 512, Buffer.alloc(256, i + 1));
      if (write !== undefined) writes.push(write);
    }
  }
  await Promise.all(writes);
  const expected = Buffer.alloc(PAGE, 0xff);
  for (let i = 0; i < 8; i++) expected.fill(i + 1, i * 512, i * 512 + 256);
  const all = await client.read(0, BYTES);
  for (let page = 0; page < PAGES; page++) {
    expect(all.subarray(page * PAGE, (page + 1) * PAGE).equals(expected), `page ${page}`).toBe(
      true,
    );
  }
});

test('a source that is gone is EIO for what waits, never zeros; the rest goes on', async () => {
  const { client, replica } = await clone();
  replica.fill(1, Buffer.alloc(PAGE, 1));
  const read = client.read(0, 2 * PAGE);
  const write = client.write(7 * PAGE + 1, Buffer.alloc(1, 1));
  await until(() => replica.stats().waiting === 2);
  const ends = [
    expect(read).rejects.toMatchObject({ errno: 5 }),
    expect(write).rejects.toMatchObject({ errno: 5 }),
  ];
  replica.fail('E_SOURCE_LOST', 'gone');
  await Promise.all(ends);
  await expect(client.read(9 * PAGE, 1)).rejects.toMatchObject({ errno: 5 });
  expect((await client.read(PAGE, PAGE))[0]).toBe(1);
  await client.write(0, Buffer.alloc(PAGE, 5));
  expect((await client.read(0, PAGE))[0]).toBe(5);
});

test('a client that leaves while its request waits takes nothing with it', async () => {
  const { client, replica, disk, socketPath } = await clone();
  client.read(50 * PAGE, PAGE).catch(() => undefined);
  client.write(51 * PAGE + 1, Buffer.alloc(1, 1)).catch(() => undefined);
  await until(() => replica.stats().waiting === 2);
  await client.close();
  await until(() => disk.stats().connections === 0);
  const second = await connectTo(socketPath);
  const read = second.read(50 * PAGE, PAGE);
  await until(() => second.pending === 1);
  replica.fill(50, Buffer.alloc(PAGE, 5));
  replica.fill(51, Buffer.alloc(PAGE, 6));
  expect((await read)[0]).toBe(5);
  // Its write was never carried out: it was never acknowledged.
  expect((await second.read(51 * PAGE, PAGE))[1]).toBe(6);
});

test('closing a disk does not wait for pages that do not come', async () => {
  const { client, replica, disk } = await clone();
  const read = client.read(0, PAGE);
  const failed = expect(read).rejects.toThrow();
  await until(() => replica.stats().waiting === 1);
  await disk.close();
  await failed;
  replica.fill(0, Buffer.alloc(PAGE, 1)); // nobody is left; nothing breaks
});

test('a clone of a clone: its generation holds its own pages, absent ones wait', async () => {
  const { client, replica, disk, folder } = await clone();
  await client.write(3 * PAGE, Buffer.alloc(PAGE, 3));
  replica.fill(4, Buffer.alloc(PAGE, 4));
  const generation = newGeneration();
  await disk.fork(generation);
  await client.write(3 * PAGE, Buffer.alloc(2 * PAGE, 9));
  const provider = await disk.provider(generation);
  expect(addon().readPage(provider, 3)?.[0]).toBe(3);
  expect(addon().readPage(provider, 4)?.[0]).toBe(4);
  expect(addon().readPage(provider, 5)).toBe(null);
  const socketPath = join(folder, 'view');
  await serveGeneration(disk, generation, { socketPath });
  const view = await connectTo(socketPath);
  const read = view.read(3 * PAGE, 3 * PAGE);
  await until(() => replica.stats().waiting === 1);
  replica.fill(5, Buffer.alloc(PAGE, 5));
  const data = await read;
  expect([data[0], data[PAGE], data[2 * PAGE]]).toEqual([3, 4, 5]);
});

test('a disk over a replica opens only with the replica of its generation', async () => {
  const { directory, disk } = await clone();
  await disk.close();
  expect(await codeOf(Disk.open(directory))).toBe('E_ARGUMENT');
  const other = newReplica(join(await temporary(), 'other'), newGeneration(), PAGES);
  expect(await codeOf(Disk.open(directory, { replica: other.handle }))).toBe('E_REPLICA_MISMATCH');
});

import { once } from 'node:events';
import { readdirSync, readlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import type { NbdClient } from './nbd-client.js';
import {
  connectTo,
  execute,
  newDisk,
  newGeneration,
  newSeed,
  PAGE,
  random,
  serveInChild,
  strace,
  temporary,
  until,
} from './support.js';

const MIB = 2 ** 20;

afterEach(() => {
  delete process.env.SNOWFLOCK_IO_URING;
  delete process.env.SNOWFLOCK_NBD_SPIN;
});

/** Rings among the open files of a process. */
function rings(pid: number | 'self' = 'self'): number {
  const folder = `/proc/${pid}/fd`;
  return readdirSync(folder).filter((fd) => {
    try {
      return readlinkSync(join(folder, fd)).includes('io_uring');
    } catch {
      return false; // closed meanwhile
    }
  }).length;
}

/** Takes the pages of a disk's slices out of the page cache, so that reads go to the device. */
async function evict(disk: Disk): Promise<void> {
  await disk.flush();
  for (const name of await readdir(disk.directory)) {
    if (!name.endsWith('.data')) continue;
    const file = join(disk.directory, name);
    await execute('dd', [`of=${file}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0']);
  }
}

test('a connection has a ring, and gives it back when the client leaves', async () => {
  const { socketPath, disk } = await newDisk(MIB);
  const before = rings();
  const client = await connectTo(socketPath);
  await client.read(0, PAGE);
  expect(rings()).toBe(before + 1);
  await client.close();
  await until(() => disk.stats().connections === 0);
  expect(rings()).toBe(before);
});

test('SNOWFLOCK_IO_URING=0 does without a ring', async () => {
  process.env.SNOWFLOCK_IO_URING = '0';
  const { socketPath } = await newDisk(MIB);
  const before = rings();
  const client = await connectTo(socketPath);
  await client.write(0, Buffer.alloc(PAGE, 1));
  expect((await client.read(0, PAGE))[0]).toBe(1);
  expect(rings()).toBe(before);
});

for (const error of ['ENOSYS', 'EPERM', 'ENOMEM']) {
  test(`a kernel that refuses a ring by ${error} is no obstacle`, async () => {
    const folder = await temporary();
    const [directory, socketPath] = [join(folder, 'disk'), join(folder, 'nbd')];
    await Disk.create(directory, { sizeBytes: MIB });
    const { pid } = await serveInChild(directory, socketPath);
    const before = rings(pid); // libuv may have one of its own
    const inject = `inject=io_uring_setup:error=${error}`;
    await strace(pid, ['-o', join(folder, 'trace'), '-e', 'trace=io_uring_setup', '-e', inject]);
    const client = await connectTo(socketPath);
    await client.write(0, Buffer.alloc(64 * PAGE, 1));
    expect(await client.read(0, 64 * PAGE)).toEqual(Buffer.alloc(64 * PAGE, 1));
    expect(rings(pid)).toBe(before);
  });
}

for (const [spin, looks] of [
  ['1', true],
  ['0', false],
] as const) {
  const how = looks ? 'looks for the next request before it sleeps' : 'just sleeps';
  test(`with nothing under way and SNOWFLOCK_NBD_SPIN=${spin} a connection ${how}`, async () => {
    process.env.SNOWFLOCK_NBD_SPIN = spin;
    const folder = await temporary();
    const [directory, socketPath, log] = ['disk', 'nbd', 'trace'].map((n) => join(folder, n));
    await Disk.create(directory as string, { sizeBytes: MIB });
    const child = await serveInChild(directory as string, socketPath as string);
    const client = await connectTo(socketPath as string);
    await client.write(0, Buffer.alloc(MIB, 1));
    const traced = ['-e', 'trace=recvfrom,io_uring_enter,sendmsg'];
    await strace(child.pid, ['-o', log as string, ...traced]);
    for (let page = 0; page < 100; page++) {
      expect((await client.read(page * PAGE, PAGE))[0]).toBe(1);
    }
    await child.kill();
    const all = (await readFile(log as string, 'utf8')).split('\n');
    const thread = all.find((line) => line.includes('sendmsg('))?.split(' ')[0];
    const calls = all.filter((line) => thread !== undefined && line.startsWith(`${thread} `));
    expect(calls.filter((line) => line.includes('sendmsg('))).toHaveLength(100);
    // The ring may have had the receive of the first of them.
    expect(calls.filter((line) => line.includes('io_uring_enter(')).length).toBeLessThan(2);
    expect(calls.some((line) => line.includes('MSG_DONTWAIT, NULL'))).toBe(looks);
  });
}

describe.each([
  ['io_uring', '1'],
  ['poll and threads', '0'],
])('on %s', (_name, engine) => {
  async function start(sizeBytes: number) {
    process.env.SNOWFLOCK_IO_URING = engine;
    const made = await newDisk(sizeBytes);
    return { ...made, client: await connectTo(made.socketPath) };
  }

  test('reads of any size over many slices, from the device, are what was written', async () => {
    const { client, disk } = await start(8 * MIB);
    const rand = random(newSeed('slices'));
    const expected = Buffer.alloc(8 * MIB);
    for (let slice = 0; slice < 40; slice++) {
      for (let i = 0; i < 30; i++) {
        const offset = Math.floor(rand() * (8 * MIB - 3 * PAGE));
        const data = Buffer.alloc(1 + Math.floor(rand() * 3 * PAGE), slice + 1);
        data.copy(expected, offset);
        await client.write(offset, data);
      }
      const offset = Math.floor(rand() * 1000) * PAGE;
      expected.fill(0, offset, offset + 5 * PAGE);
      await client.zero(offset, 5 * PAGE);
      await disk.fork(newGeneration());
    }
    await evict(disk);
    const sizes = [1, 511, PAGE, 9 * PAGE, 64 * PAGE, MIB, MIB + 1, 5 * MIB];
    const reads = Array.from({ length: 300 }, async () => {
      const size = sizes[Math.floor(rand() * sizes.length)] ?? 1;
      const offset = Math.floor(rand() * (8 * MIB - size));
      const data = await client.read(offset, size);
      expect(data.equals(expected.subarray(offset, offset + size)), `${offset}+${size}`).toBe(true);
    });
    await Promise.all(reads);
  });

  test('a file cut short is EIO, never zeros, and the connection goes on', async () => {
    const { client, disk } = await start(MIB);
    await client.write(0, Buffer.alloc(MIB, 1));
    await disk.flush();
    const top = disk.info().slices.at(-1)?.id;
    truncateSync(join(disk.directory, `${top}.data`), MIB / 2);
    for (const bytes of [PAGE, 16 * PAGE, MIB / 4]) {
      await expect(client.read(MIB / 2, bytes)).rejects.toMatchObject({ errno: 5 });
    }
    await expect(client.read(0, MIB)).rejects.toMatchObject({ errno: 5 });
    expect(await client.read(0, MIB / 2)).toEqual(Buffer.alloc(MIB / 2, 1));
    expect(disk.stats().ioErrors).toBe(4);
    expect(disk.stats().lastError).toContain(`read ${join(disk.directory, `${top}.data`)}`);
  });

  test('a base image cut short is EIO, never zeros, and its name is told', async () => {
    process.env.SNOWFLOCK_IO_URING = engine;
    const path = join(await temporary(), 'image');
    writeFileSync(path, Buffer.alloc(MIB, 7));
    const { disk, socketPath } = await newDisk(MIB, { base: { kind: 'image', path } });
    const client = await connectTo(socketPath);
    expect(disk.stats().lastError).toBeNull();
    truncateSync(path, MIB / 2);
    for (const bytes of [PAGE, MIB / 4]) {
      await expect(client.read(MIB / 2, bytes)).rejects.toMatchObject({ errno: 5 });
    }
    expect(disk.stats().lastError).toContain(`read base image ${path}`);
    expect(await client.read(0, MIB / 2)).toEqual(Buffer.alloc(MIB / 2, 7));
  });

  test('a client that leaves amid reads from the device takes nothing with it', async () => {
    const { client, disk, socketPath } = await start(16 * MIB);
    await client.write(0, Buffer.alloc(16 * MIB, 1));
    for (let round = 0; round < 10; round++) {
      await evict(disk);
      const rude = await connectTo(socketPath);
      for (let i = 0; i < 64; i++) rude.read(i * 64 * PAGE, 64 * PAGE).catch(() => undefined);
      await rude.close();
    }
    await until(() => disk.stats().connections === 1);
    expect((await client.read(15 * MIB, PAGE))[0]).toBe(1);
  });

  test('a stalled client that leaves is noticed', async () => {
    const { client, disk } = await start(MIB);
    await stall(client, disk);
    await client.close();
    await until(() => disk.stats().connections === 0);
  });

  test('closing a disk ends a connection that is stalled', async () => {
    const { client, disk } = await start(MIB);
    await stall(client, disk);
    await disk.close();
    client.socket.resume();
    if (!client.socket.closed) await once(client.socket, 'close');
  });

  test('replies under way still arrive after the client said it would send no more', async () => {
    const { client, disk } = await start(16 * MIB);
    await client.write(0, Buffer.alloc(16 * MIB, 1));
    await evict(disk);
    const reads = Array.from({ length: 16 }, (_, i) => client.read(i * MIB, MIB));
    client.socket.end();
    for (const read of reads) expect((await read)[MIB - 1]).toBe(1);
    await until(() => disk.stats().connections === 0);
  });
});

/** Asks for more than a connection may hold, and reads none of it. */
async function stall(client: NbdClient, disk: Disk): Promise<void> {
  await client.write(0, Buffer.alloc(MIB, 1));
  client.socket.pause();
  for (let i = 0; i < 200; i++) client.read(0, MIB).catch(() => undefined);
  await until(() => disk.stats().reads >= 64); // replies of 64 MiB are the bound
}

import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { CMD } from './nbd-client.js';
import { FLAGS, option, rawNbd, request } from './raw-nbd.js';
import {
  connectTo,
  execute,
  newDisk,
  newGeneration,
  newSeed,
  newServer,
  PAGE,
  random,
  until,
} from './support.js';

const MIB = 2 ** 20;

test('libnbd without its own checks gets the errors of the protocol', async () => {
  const { folder, disk } = await newDisk(64 * MIB);
  const generation = newGeneration();
  await disk.fork(generation);
  const socketPath = join(folder, 'shared');
  const server = await newServer(socketPath);
  await disk.serve({ server, exportName: 'disk', isDefault: true });
  await disk.serveGeneration(generation, { server, exportName: 'view' });
  const script = fileURLToPath(new URL('hostile.py', import.meta.url));
  await execute('/usr/bin/python3', [script, socketPath, String(64 * MIB)]);
  await until(() => disk.stats().connections === 0);
});

const rude: [string, (socket: Socket) => void][] = [
  ['unknown client flags', (s) => s.write(Buffer.from([0x80, 0, 0, 3]))],
  ['bad option magic', (s) => s.write(Buffer.concat([FLAGS, Buffer.alloc(16, 1)]))],
  ['huge option', (s) => s.write(Buffer.concat([FLAGS, option(99, Buffer.alloc(0), 2 ** 31)]))],
  ['wrong export name', (s) => s.write(Buffer.concat([FLAGS, option(1, Buffer.from('no'))]))],
  [
    'endless options',
    (s) => s.write(Buffer.concat([FLAGS, ...Array<Buffer>(300).fill(option(5, Buffer.alloc(0)))])),
  ],
  [
    'bad request magic',
    (s) => s.write(Buffer.concat([FLAGS, option(1, Buffer.alloc(0)), Buffer.alloc(28, 7)])),
  ],
];

for (const [what, send] of rude) {
  test(`the connection ends, and only that: ${what}`, async () => {
    const { socketPath, disk } = await newDisk(MIB);
    const other = await connectTo(socketPath);
    const { socket } = await rawNbd(socketPath);
    const closed = once(socket, 'close');
    socket.resume();
    send(socket);
    await closed;
    expect(await other.read(0, PAGE)).toEqual(Buffer.alloc(PAGE));
    await until(() => disk.stats().connections === 1);
  });
}

test('random bytes after the handshake never harm the disk or its other clients', async () => {
  const { socketPath, disk } = await newDisk(MIB);
  const rand = random(newSeed('noise'));
  const other = await connectTo(socketPath);
  await other.write(0, Buffer.alloc(PAGE, 1));
  for (let i = 0; i < 100; i++) {
    const { socket } = await rawNbd(socketPath);
    const closed = once(socket, 'close');
    socket.resume();
    const noise = Buffer.from(Array.from({ length: 200 }, () => Math.floor(rand() * 256)));
    if (i % 2 === 0) {
      // A request that may be valid in parts, of a read-only kind so that the check below holds.
      noise.writeUInt32BE(0x25609513, 0);
      noise.writeUInt16BE([0, 3, 5, 7, 8, 99][i % 6] as number, 6);
    }
    const start = i % 3 === 0 ? [FLAGS, noise] : [FLAGS, option(1, Buffer.alloc(0)), noise];
    socket.end(Buffer.concat(start));
    await closed;
  }
  expect(await other.read(0, PAGE)).toEqual(Buffer.alloc(PAGE, 1));
  await until(() => disk.stats().connections === 1);
});

test('a client that never reads costs bounded memory and delays nobody', async () => {
  const { socketPath } = await newDisk(64 * MIB);
  const other = await connectTo(socketPath);
  await other.write(0, Buffer.alloc(32 * MIB, 1));
  const before = await residentBytes();
  const greedy = await connectTo(socketPath);
  greedy.socket.pause();
  const reads = Array.from({ length: 200 }, () => greedy.read(0, 32 * MIB));
  for (const read of reads) read.catch(() => undefined);
  for (let i = 0; i < 50; i++) await other.read(i * PAGE, PAGE);
  expect((await residentBytes()) - before).toBeLessThan(150 * MIB);
  expect(greedy.pending).toBe(200);
});

async function residentBytes(): Promise<number> {
  const pages = (await readFile('/proc/self/statm', 'utf8')).split(' ')[1];
  return Number(pages) * PAGE;
}

test('a client that asks without end and never reads the answers is read no further', async () => {
  const { folder, disk } = await newDisk(MIB);
  const socketPath = join(folder, 'greedy');
  const server = await newServer(socketPath);
  await disk.serve({ server, exportName: 'greedy' });
  await disk.serve({ server, exportName: 'other' });
  const other = await connectTo(socketPath, 'other');
  for (const type of [CMD.flush, 99]) {
    const { socket, reader } = await rawNbd(socketPath);
    socket.write(Buffer.concat([FLAGS, option(1, Buffer.from('greedy'))]));
    await reader.take(10);
    socket.pause();
    const requests = () => server.stats().exports[0]?.requests ?? 0;
    const before = requests();
    // Answers of 16 bytes: 1 MiB of them, and what fits into the sockets' buffers, is the bound.
    const batch = Buffer.concat(Array(10_000).fill(request(type, 0, 0)));
    for (let i = 0; i < 60; i++) socket.write(batch);
    let taken = 0;
    for (let still = 0; still < 5; still++) {
      for (let i = 0; i < 500; i++) await other.read(0, PAGE);
      if (requests() > taken) still = 0;
      taken = requests();
    }
    expect(taken - before, `request ${type}`).toBeGreaterThan(50_000);
    expect(taken - before, `request ${type}`).toBeLessThan(300_000);
    socket.destroy();
    await until(() => disk.stats().connections === 1);
  }
});

test('requests sent one byte at a time, and many in one packet, are the same', async () => {
  const { socketPath } = await newDisk(MIB);
  const client = await connectTo(socketPath);
  const writes = Array.from({ length: 256 }, (_, i) =>
    client.write(i * PAGE, Buffer.alloc(PAGE, i)),
  );
  await Promise.all(writes);
  const reads = await Promise.all(writes.map((_, i) => client.read(i * PAGE, PAGE)));
  expect(reads.map((data) => data[7])).toEqual(writes.map((_, i) => i));
  const { socket, reader } = await rawNbd(socketPath);
  const read = request(0, 9 * PAGE, 4, { cookie: 77n });
  socket.setNoDelay(true);
  for (const byte of Buffer.concat([FLAGS, option(1, Buffer.from('disk')), read])) {
    await new Promise((resolve) => socket.write(Buffer.from([byte]), resolve));
  }
  await reader.take(10);
  const answer = await reader.take(20);
  expect(answer.readBigUInt64BE(8)).toBe(77n);
  expect(answer.subarray(16)).toEqual(Buffer.alloc(4, 9));
});

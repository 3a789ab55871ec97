import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { ByteReader } from './nbd-client.js';
import { cleanup, connectTo, execute, newDisk, newSeed, PAGE, random, until } from './support.js';

const MIB = 2 ** 20;

test('libnbd without its own checks gets the errors of the protocol', async () => {
  const { socketPath, disk } = await newDisk(64 * MIB);
  const script = fileURLToPath(new URL('hostile.py', import.meta.url));
  await execute('/usr/bin/python3', [script, socketPath, String(64 * MIB)]);
  await until(() => disk.stats().connections === 0);
});

async function raw(socketPath: string): Promise<{ socket: Socket; reader: ByteReader }> {
  const socket = connect(socketPath);
  cleanup(() => socket.destroy());
  socket.on('error', () => undefined); // resets are what some of them ask for
  await once(socket, 'connect');
  const reader = new ByteReader(socket);
  const hello = await reader.take(18);
  expect(hello.toString('latin1', 0, 16)).toBe('NBDMAGICIHAVEOPT');
  expect(hello.readUInt16BE(16)).toBe(3);
  return { socket, reader };
}

function option(number: number, data: Buffer, claimed = data.length): Buffer {
  const head = Buffer.alloc(16);
  head.write('IHAVEOPT', 'latin1');
  head.writeUInt32BE(number, 8);
  head.writeUInt32BE(claimed, 12);
  return Buffer.concat([head, data]);
}

async function reply(reader: ByteReader): Promise<{ option: number; type: number; data: Buffer }> {
  const head = await reader.take(20);
  expect(head.readBigUInt64BE(0)).toBe(0x0003e889045565a9n);
  const data = await reader.take(head.readUInt32BE(16));
  return { option: head.readUInt32BE(8), type: head.readUInt32BE(12), data };
}

const FLAGS = Buffer.from([0, 0, 0, 3]);
const UNSUP = 0x80000001;
const INVALID = 0x80000003;
const UNKNOWN = 0x80000006;
const TOO_BIG = 0x80000009;

test('options that are unknown, malformed or out of order are answered, and the phase goes on', async () => {
  const { socketPath } = await newDisk(MIB);
  const { socket, reader } = await raw(socketPath);
  socket.write(FLAGS);
  const name = (text: string) => {
    const bytes = Buffer.from(text);
    const length = Buffer.alloc(4);
    length.writeUInt32BE(bytes.length);
    return Buffer.concat([length, bytes]);
  };
  const ask = async (number: number, data: Buffer) => {
    socket.write(option(number, data));
    const answer = await reply(reader);
    expect(answer.option).toBe(number);
    return answer.type;
  };
  const none = Buffer.alloc(0);
  expect(await ask(5, none)).toBe(UNSUP); // STARTTLS
  expect(await ask(11, none)).toBe(UNSUP); // EXTENDED_HEADERS
  expect(await ask(0xffffffff, Buffer.alloc(300))).toBe(UNSUP);
  expect(await ask(3, Buffer.alloc(1))).toBe(INVALID); // LIST with data
  expect(await ask(8, Buffer.alloc(1))).toBe(INVALID); // STRUCTURED_REPLY with data
  expect(await ask(10, Buffer.concat([name('disk'), Buffer.alloc(4)]))).toBe(INVALID); // too early
  expect(await ask(6, none)).toBe(INVALID);
  expect(await ask(6, Buffer.from([0xff, 0xff, 0xff, 0xff, 0, 0]))).toBe(INVALID);
  expect(await ask(7, Buffer.concat([name('disk'), Buffer.from([0, 9])]))).toBe(INVALID);
  expect(await ask(7, Buffer.concat([name('other'), Buffer.alloc(2)]))).toBe(UNKNOWN);
  expect(await ask(9, Buffer.concat([name('disk'), Buffer.from([255, 255, 255, 255])]))).toBe(
    INVALID,
  );
  expect(await ask(99, Buffer.alloc(20_000))).toBe(TOO_BIG);
  expect(await ask(2, none)).toBe(1); // ABORT is acknowledged
  await expect(reader.take(1)).rejects.toThrow();
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
    const { socket } = await raw(socketPath);
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
    const { socket } = await raw(socketPath);
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

test('requests sent one byte at a time, and many in one packet, are the same', async () => {
  const { socketPath } = await newDisk(MIB);
  const client = await connectTo(socketPath);
  const writes = Array.from({ length: 256 }, (_, i) =>
    client.write(i * PAGE, Buffer.alloc(PAGE, i)),
  );
  await Promise.all(writes);
  const reads = await Promise.all(writes.map((_, i) => client.read(i * PAGE, PAGE)));
  expect(reads.map((data) => data[7])).toEqual(writes.map((_, i) => i));
  const { socket, reader } = await raw(socketPath);
  const request = Buffer.alloc(28);
  request.writeUInt32BE(0x25609513, 0);
  request.writeBigUInt64BE(77n, 8);
  request.writeBigUInt64BE(BigInt(9 * PAGE), 16);
  request.writeUInt32BE(4, 24);
  socket.setNoDelay(true);
  for (const byte of Buffer.concat([FLAGS, option(1, Buffer.from('disk')), request])) {
    await new Promise((resolve) => socket.write(Buffer.from([byte]), resolve));
  }
  await reader.take(10);
  const answer = await reader.take(20);
  expect(answer.readBigUInt64BE(8)).toBe(77n);
  expect(answer.subarray(16)).toEqual(Buffer.alloc(4, 9));
});

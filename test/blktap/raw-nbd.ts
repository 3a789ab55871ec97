// The option phase by hand: an NBD connection on which a test may say anything.
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { expect } from 'vitest';
import { ByteReader } from './nbd-client.js';
import { cleanup } from './support.js';

export const OPT = {
  exportName: 1,
  abort: 2,
  list: 3,
  peek: 4,
  startTls: 5,
  info: 6,
  go: 7,
  structured: 8,
  listContexts: 9,
  setContexts: 10,
  extended: 11,
};
export const REP = {
  ack: 1,
  server: 2,
  info: 3,
  context: 4,
  unsup: 0x80000001,
  policy: 0x80000002,
  invalid: 0x80000003,
  tlsRequired: 0x80000005,
  unknown: 0x80000006,
  tooBig: 0x80000009,
};
export const NONE = Buffer.alloc(0);
/** Client flags: fixed newstyle, no zeroes. */
export const FLAGS = Buffer.from([0, 0, 0, 3]);

export interface Reply {
  type: number;
  data: Buffer;
}

export interface RawNbd {
  socket: Socket;
  reader: ByteReader;
  /** Sends an option; its replies up to the one that ends them. */
  ask(number: number, data: Buffer): Promise<Reply[]>;
}

/** Connected; the server's greeting is read and checked, nothing sent. */
export async function rawNbd(where: string | { host: string; port: number }): Promise<RawNbd> {
  const socket = typeof where === 'string' ? connect(where) : connect(where);
  cleanup(() => socket.destroy());
  socket.on('error', () => undefined); // resets are what some of them ask for
  await once(socket, 'connect');
  const reader = new ByteReader(socket);
  const hello = await reader.take(18);
  expect(hello.toString('latin1', 0, 16)).toBe('NBDMAGICIHAVEOPT');
  expect(hello.readUInt16BE(16)).toBe(3);
  return options(socket, reader);
}

/** Asks options on a connection that has been greeted. */
export function options(socket: Socket, reader: ByteReader): RawNbd {
  const ask = async (number: number, data: Buffer) => {
    socket.write(option(number, data));
    const replies: Reply[] = [];
    for (;;) {
      const head = await reader.take(20);
      expect(head.readBigUInt64BE(0)).toBe(0x0003e889045565a9n);
      expect(head.readUInt32BE(8)).toBe(number);
      const reply = { type: head.readUInt32BE(12), data: await reader.take(head.readUInt32BE(16)) };
      replies.push(reply);
      if (reply.type === REP.ack || reply.type >= REP.unsup) return replies;
    }
  };
  return { socket, reader, ask };
}

export function option(number: number, data: Buffer, claimed = data.length): Buffer {
  const head = Buffer.alloc(16);
  head.write('IHAVEOPT', 'latin1');
  head.writeUInt32BE(number, 8);
  head.writeUInt32BE(claimed, 12);
  return Buffer.concat([head, data]);
}

export function u32(...values: number[]): Buffer {
  const out = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => {
    out.writeUInt32BE(value, 4 * i);
  });
  return out;
}

/** A string with its length before it. */
export function counted(text: string): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([u32(bytes.length), bytes]);
}

/** Data of INFO and GO. */
export function infoData(name: string, requests: number[] = []): Buffer {
  const list = Buffer.alloc(2 + 2 * requests.length);
  [requests.length, ...requests].forEach((value, i) => {
    list.writeUInt16BE(value, 2 * i);
  });
  return Buffer.concat([counted(name), list]);
}

/** Data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export function contextData(name: string, queries: string[]): Buffer {
  return Buffer.concat([counted(name), u32(queries.length), ...queries.map(counted)]);
}

/** A request of the transmission phase. */
export function request(
  type: number,
  offset: bigint | number,
  length: number,
  options: { flags?: number; cookie?: bigint; magic?: number } = {},
): Buffer {
  const head = Buffer.alloc(28);
  head.writeUInt32BE(options.magic ?? 0x25609513, 0);
  head.writeUInt16BE(options.flags ?? 0, 4);
  head.writeUInt16BE(type, 6);
  head.writeBigUInt64BE(options.cookie ?? 1n, 8);
  head.writeBigUInt64BE(BigInt(offset), 16);
  head.writeUInt32BE(length, 24);
  return head;
}

/** One chunk of a structured reply. */
export async function chunk(
  reader: ByteReader,
): Promise<{ done: boolean; type: number; cookie: bigint; data: Buffer }> {
  const head = await reader.take(20);
  expect(head.readUInt32BE(0)).toBe(0x668e33ef);
  return {
    done: head.readUInt16BE(4) === 1,
    type: head.readUInt16BE(6),
    cookie: head.readBigUInt64BE(8),
    data: await reader.take(head.readUInt32BE(16)),
  };
}

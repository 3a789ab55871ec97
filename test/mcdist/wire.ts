/**
 * mcdist's packets made and read from docs/mcdist.md alone, apart from the native code: for tests
 * that are a hostile member, and as a check that the document is enough to speak the protocol.
 */
import { createCipheriv, createDecipheriv } from 'node:crypto';
import { blake2b } from '@noble/hashes/blake2.js';

const SHORT_HEADER_BYTES = 24;
const LONG_HEADER_BYTES = 40;
const TAG_BYTES = 16;

export const TYPE = {
  request: 1,
  welcome: 2,
  announce: 3,
  page: 4,
  zero: 5,
  negative: 6,
  parity: 7,
  packed: 8,
} as const;

export interface Packet {
  type: number;
  /** Of a page: its number. */
  fragment?: number;
  /** Of a page or a parity: how many make a page. */
  fragments?: number;
  /** Sent by this push cursor. */
  cursor?: number;
  generation: Buffer;
  boot: Buffer;
  counter: bigint;
  page?: bigint;
  body: Buffer;
}

/** Who sealed a packet: its generation and boot ids in full. */
export interface Sender {
  generation: Buffer;
  boot: Buffer;
}

const headerBytes = (type: number) =>
  type <= TYPE.announce ? LONG_HEADER_BYTES : SHORT_HEADER_BYTES;

function cipherOf(key: Buffer, { generation, boot }: Sender, header: Buffer) {
  const side = (header[1] ?? 0) % 16 === TYPE.request ? 'C' : 'S';
  const text = Buffer.concat([Buffer.from(`snowflock mcdist 2${side}`), generation, boot]);
  return {
    key: blake2b(text, { key, dkLen: 32 }),
    nonce: Buffer.concat([Buffer.alloc(6), header.subarray(12, 18)]),
    associated: Buffer.concat([generation, header]),
  };
}

export function seal(key: Buffer, packet: Packet): Buffer {
  const header = Buffer.alloc(headerBytes(packet.type));
  const pushed = packet.cursor === undefined ? 0 : 1;
  const fragments = ((packet.fragment ?? 0) << 4) | (packet.fragments ?? 0);
  header.set([0x5f, (2 << 4) | packet.type, fragments, pushed]);
  packet.generation.copy(header, 4, 0, 4);
  packet.boot.copy(header, 8, 0, 4);
  header.writeUIntBE(Number(packet.counter), 12, 6);
  header.writeUIntBE(Number(packet.page ?? 0n), 18, 5);
  header.writeUInt8(packet.cursor ?? 0, 23);
  packet.boot.copy(header, SHORT_HEADER_BYTES);
  const { key: derived, nonce, associated } = cipherOf(key, packet, header);
  const cipher = createCipheriv('aes-256-gcm', derived, nonce);
  cipher.setAAD(associated);
  const body = Buffer.concat([cipher.update(packet.body), cipher.final()]);
  return Buffer.concat([header, body, cipher.getAuthTag()]);
}

/** The body of an authentic packet; throws otherwise. A long header tells the boot id itself. */
export function unseal(key: Buffer, generation: Buffer, data: Buffer, boot?: Buffer): Buffer {
  const bytes = headerBytes((data[1] ?? 0) % 16);
  const header = data.subarray(0, bytes);
  const sender = boot ?? header.subarray(SHORT_HEADER_BYTES, LONG_HEADER_BYTES);
  const { key: derived, nonce, associated } = cipherOf(key, { generation, boot: sender }, header);
  const decipher = createDecipheriv('aes-256-gcm', derived, nonce);
  decipher.setAAD(associated);
  decipher.setAuthTag(data.subarray(data.length - TAG_BYTES));
  const body = data.subarray(bytes, data.length - TAG_BYTES);
  return Buffer.concat([decipher.update(body), decipher.final()]);
}

export interface Run {
  first: bigint;
  count: bigint;
  urgent?: boolean;
  retry?: boolean;
}

export interface Report {
  block: bigint;
  fragments: number;
  need: number;
  cover?: number;
  wanted: number;
  missing: bigint;
}

export interface RequestOptions {
  receiveKbps?: number;
  unicastOnly?: boolean;
  subscribe?: boolean;
  history?: boolean;
  lossPermille?: number;
  reports?: Report[];
}

export const REQUEST_FIXED_BYTES = 24;
const REPORT_BYTES = 32;

function putBits128(out: Buffer, value: bigint, at: number): void {
  out.writeBigUInt64BE(value >> 64n, at);
  out.writeBigUInt64BE(value & 0xffffffffffffffffn, at + 8);
}

function takeBits128(data: Buffer, at: number): bigint {
  return (data.readBigUInt64BE(at) << 64n) | data.readBigUInt64BE(at + 8);
}

export function requestBody(cookie: bigint, runs: Run[], options: RequestOptions = {}): Buffer {
  const reports = options.reports ?? [];
  const reportsAt = REQUEST_FIXED_BYTES + 8 * runs.length;
  const body = Buffer.alloc(Math.max(40, reportsAt + REPORT_BYTES * reports.length));
  body.writeBigUInt64BE(cookie, 0);
  body.writeUInt32BE(options.receiveKbps ?? 0, 8);
  const { unicastOnly, subscribe, history } = options;
  body.writeUInt8((unicastOnly ? 1 : 0) | (subscribe ? 2 : 0) | (history ? 4 : 0), 12);
  body.writeUInt16BE(runs.length, 14);
  body.writeUInt16BE(reports.length, 16);
  body.writeUInt16BE(options.lossPermille ?? 0, 20);
  runs.forEach((run, i) => {
    const flags = (run.urgent ? 1n << 56n : 0n) | (run.retry ? 1n << 57n : 0n);
    const word = run.first | ((run.count - 1n) << 40n) | flags;
    body.writeBigUInt64BE(word, REQUEST_FIXED_BYTES + 8 * i);
  });
  reports.forEach((report, i) => {
    const at = reportsAt + REPORT_BYTES * i;
    body.writeBigUInt64BE(report.block, at);
    body.set([report.fragments, report.need, report.cover ?? 0, 0], at + 8);
    body.writeUInt32BE(report.wanted, at + 12);
    putBits128(body, report.missing, at + 16);
  });
  return body;
}

export interface Request {
  cookie: bigint;
  receiveKbps: number;
  unicastOnly: boolean;
  subscribe: boolean;
  history: boolean;
  lossPermille: number;
  runs: Array<Required<Run> & { fragments: number }>;
  reports: Required<Report>[];
}

/** What a client asks for, from the body of its request. */
export function readRequest(body: Buffer): Request {
  const flags = body.readUInt8(12);
  const runs = body.readUInt16BE(14);
  const reportsAt = REQUEST_FIXED_BYTES + 8 * runs;
  return {
    cookie: body.readBigUInt64BE(0),
    receiveKbps: body.readUInt32BE(8),
    unicastOnly: (flags & 1) !== 0,
    subscribe: (flags & 2) !== 0,
    history: (flags & 4) !== 0,
    lossPermille: body.readUInt16BE(20),
    runs: Array.from({ length: runs }, (_, i) => {
      const word = body.readBigUInt64BE(REQUEST_FIXED_BYTES + 8 * i);
      return {
        first: word & ((1n << 40n) - 1n),
        count: ((word >> 40n) & 0xfffn) + 1n,
        fragments: Number((word >> 52n) & 0xfn),
        urgent: ((word >> 56n) & 1n) === 1n,
        retry: ((word >> 57n) & 1n) === 1n,
      };
    }),
    reports: Array.from({ length: body.readUInt16BE(16) }, (_, i) => {
      const at = reportsAt + REPORT_BYTES * i;
      return {
        block: body.readBigUInt64BE(at),
        fragments: body.readUInt8(at + 8),
        need: body.readUInt8(at + 9),
        cover: body.readUInt8(at + 10),
        wanted: body.readUInt32BE(at + 12),
        missing: takeBits128(body, at + 16),
      };
    }),
  };
}

export function welcomeBody(cookie: bigint, client: Buffer, echo: bigint, pages: bigint): Buffer {
  const body = Buffer.alloc(40);
  body.writeBigUInt64BE(cookie, 0);
  client.copy(body, 8);
  body.writeBigUInt64BE(echo, 24);
  body.writeBigUInt64BE(pages, 32);
  return body;
}

export interface Announce {
  address: string;
  port: number;
  complete?: boolean;
  pushing?: boolean;
  cursor?: number;
  held: bigint;
  position?: bigint;
  pages: bigint;
}

export function announceBody(announce: Announce): Buffer {
  const body = Buffer.alloc(32);
  body.set(announce.address.split('.').map(Number), 0);
  body.writeUInt16BE(announce.port, 4);
  const flags = (announce.complete ? 1 : 0) | (announce.pushing ? 2 : 0);
  body.set([flags, announce.cursor ?? 0], 6);
  body.writeBigUInt64BE(announce.held, 8);
  body.writeBigUInt64BE(announce.position ?? 0n, 16);
  body.writeBigUInt64BE(announce.pages, 24);
  return body;
}

/** The symbols of a page in `fragments` packets: equal in size, the last padded with zeros. */
export function symbols(page: Buffer, fragments: number): Buffer[] {
  const size = Math.ceil(page.length / fragments);
  return Array.from({ length: fragments }, (_, i) => {
    const out = Buffer.alloc(size);
    page.copy(out, 0, i * size, (i + 1) * size);
    return out;
  });
}

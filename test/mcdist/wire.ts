/**
 * mcdist's packets made and read from docs/mcdist.md alone, apart from the native code: for tests
 * that are a hostile member, and as a check that the document is enough to speak the protocol.
 */
import { createCipheriv, createDecipheriv } from 'node:crypto';

const HEADER_BYTES = 52;
const TAG_BYTES = 16;

function rotate(value: number, bits: number): number {
  return ((value << bits) | (value >>> (32 - bits))) >>> 0;
}

/** HChaCha20 (draft-irtf-cfrg-xchacha): the subkey of a key and the nonce's first 16 bytes. */
function hchacha20(key: Buffer, nonce: Buffer): Buffer {
  const s = new Uint32Array(16);
  s.set([0x61707865, 0x3320646e, 0x79622d32, 0x6b206574]);
  for (let i = 0; i < 8; i++) s[4 + i] = key.readUInt32LE(4 * i);
  for (let i = 0; i < 4; i++) s[12 + i] = nonce.readUInt32LE(4 * i);
  const at = (i: number) => s[i] ?? 0;
  const quarter = (a: number, b: number, c: number, d: number) => {
    for (const [x, y, z, bits] of [
      [a, b, d, 16],
      [c, d, b, 12],
      [a, b, d, 8],
      [c, d, b, 7],
    ] as const) {
      s[x] = at(x) + at(y);
      s[z] = rotate(at(z) ^ at(x), bits);
    }
  };
  for (let round = 0; round < 10; round++) {
    for (let i = 0; i < 4; i++) quarter(i, 4 + i, 8 + i, 12 + i);
    for (let i = 0; i < 4; i++)
      quarter(i, 4 + ((i + 1) % 4), 8 + ((i + 2) % 4), 12 + ((i + 3) % 4));
  }
  const out = Buffer.alloc(32);
  for (let i = 0; i < 4; i++) {
    out.writeUInt32LE(at(i), 4 * i);
    out.writeUInt32LE(at(12 + i), 16 + 4 * i);
  }
  return out;
}

export interface Packet {
  type: number;
  fragment?: number;
  generation: Buffer;
  boot: Buffer;
  counter: bigint;
  page?: bigint;
  body: Buffer;
}

function associated(header: Buffer): Buffer {
  return Buffer.concat([Buffer.from(header[2] === 1 ? 'C' : 'S'), header]);
}

export function seal(key: Buffer, packet: Packet): Buffer {
  const header = Buffer.alloc(HEADER_BYTES);
  header.set([0x5f, 1, packet.type, packet.fragment ?? 0]);
  packet.generation.copy(header, 4);
  packet.boot.copy(header, 20);
  header.writeBigUInt64BE(packet.counter, 36);
  header.writeBigUInt64BE(packet.page ?? 0n, 44);
  const nonce = Buffer.concat([Buffer.alloc(4), header.subarray(36, 44)]);
  const cipher = createCipheriv('chacha20-poly1305', hchacha20(key, packet.boot), nonce, {
    authTagLength: TAG_BYTES,
  });
  cipher.setAAD(associated(header), { plaintextLength: packet.body.length });
  const body = Buffer.concat([cipher.update(packet.body), cipher.final()]);
  return Buffer.concat([header, body, cipher.getAuthTag()]);
}

/** The body of an authentic packet; throws otherwise. */
export function unseal(key: Buffer, data: Buffer): Buffer {
  const header = data.subarray(0, HEADER_BYTES);
  const nonce = Buffer.concat([Buffer.alloc(4), header.subarray(36, 44)]);
  const cipher = createDecipheriv(
    'chacha20-poly1305',
    hchacha20(key, header.subarray(20, 36)),
    nonce,
    { authTagLength: TAG_BYTES },
  );
  const body = data.subarray(HEADER_BYTES, data.length - TAG_BYTES);
  cipher.setAAD(associated(header), { plaintextLength: body.length });
  cipher.setAuthTag(data.subarray(data.length - TAG_BYTES));
  return Buffer.concat([cipher.update(body), cipher.final()]);
}

export interface Run {
  first: bigint;
  count: bigint;
  urgent?: boolean;
  retry?: boolean;
}

export function requestBody(cookie: bigint, runs: Run[]): Buffer {
  const body = Buffer.alloc(Math.max(40, 16 + 8 * runs.length));
  body.writeBigUInt64BE(cookie, 0);
  body.writeUInt16BE(runs.length, 12);
  runs.forEach((run, i) => {
    const flags = (run.urgent ? 1n << 56n : 0n) | (run.retry ? 1n << 57n : 0n);
    body.writeBigUInt64BE(run.first | ((run.count - 1n) << 40n) | flags, 16 + 8 * i);
  });
  return body;
}

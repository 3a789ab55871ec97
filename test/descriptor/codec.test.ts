import { createHash, randomBytes } from 'node:crypto';
import { deflateRawSync } from 'node:zlib';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { decodeDescriptor, encodeDescriptor } from '../../src/descriptor/index.js';
import { sample } from './sample.js';

/** Puts the right digest under changed bytes: what a sender could do on purpose. */
function resealed(bytes: Buffer): Buffer {
  const body = bytes.subarray(0, bytes.length - 32);
  return Buffer.concat([body, createHash('sha256').update(body).digest()]);
}

function codeOf(bytes: Buffer): string {
  try {
    decodeDescriptor(bytes);
  } catch (error) {
    return error instanceof Error && 'code' in error ? String(error.code) : String(error);
  }
  return 'accepted';
}

test('what was encoded is decoded', () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 3000 }),
      fc.uint8Array({ maxLength: 5000 }),
      fc.infiniteStream(fc.boolean()),
      fc.boolean(),
      (pages, state, bits, withDisk) => {
        const map = Buffer.alloc(Math.ceil(pages / 8));
        for (let page = 0; page < pages; page++) {
          if (bits.next().value) map[page >> 3] = (map[page >> 3] ?? 0) | (1 << (page & 7));
        }
        const descriptor = { ...sample(pages, map), state: Buffer.from(state) };
        if (!withDisk) delete descriptor.disk;
        expect(decodeDescriptor(encodeDescriptor(descriptor))).toEqual(descriptor);
      },
    ),
    { numRuns: 200 },
  );
});

test('no single changed byte is accepted', () => {
  const good = encodeDescriptor(sample());
  const mask = randomBytes(1)[0] || 1;
  for (let at = 0; at < good.length; at++) {
    for (const flip of new Set([1, 0x80, 0xff, mask])) {
      const bytes = Buffer.from(good);
      bytes[at] = (bytes[at] ?? 0) ^ flip;
      expect(codeOf(bytes), `byte ${at} changed by ${flip}`).toBe('E_DESCRIPTOR');
    }
  }
});

test('no truncation is accepted', () => {
  const good = encodeDescriptor(sample());
  for (let length = 0; length < good.length; length++) {
    expect(codeOf(good.subarray(0, length)), `${length} bytes`).toBe('E_DESCRIPTOR');
  }
});

test('bytes after the end are not accepted', () => {
  const good = encodeDescriptor(sample());
  expect(codeOf(Buffer.concat([good, Buffer.alloc(1)]))).toBe('E_DESCRIPTOR');
  expect(codeOf(Buffer.concat([good, good]))).toBe('E_DESCRIPTOR');
});

test('another format version is named as such', () => {
  const bytes = encodeDescriptor(sample());
  bytes.writeUInt16BE(2, 8);
  expect(codeOf(resealed(bytes))).toBe('E_DESCRIPTOR_VERSION');
});

test('a sealed descriptor with changed bytes never gives anything but an error or a descriptor', () => {
  const good = encodeDescriptor(sample());
  fc.assert(
    fc.property(
      fc.integer({ min: 8, max: good.length - 33 }),
      fc.uint8Array({ minLength: 1, maxLength: 8 }),
      (at, change) => {
        const bytes = Buffer.from(good);
        bytes.set(change.subarray(0, bytes.length - 32 - at), at);
        expect(['E_DESCRIPTOR', 'E_DESCRIPTOR_VERSION', 'accepted']).toContain(
          codeOf(resealed(bytes)),
        );
      },
    ),
    { numRuns: 2000 },
  );
});

test('a part that inflates to more than it says is refused', () => {
  const good = encodeDescriptor(sample());
  const at = 36 + good.readUInt32BE(16);
  const bomb = deflateRawSync(Buffer.alloc(50 << 20));
  const rest = good.subarray(at + good.readUInt32BE(20));
  const bytes = Buffer.concat([good.subarray(0, at), bomb, rest]);
  bytes.writeUInt32BE(bytes.length, 12);
  bytes.writeUInt32BE(bomb.length, 20);
  expect(codeOf(resealed(bytes))).toBe('E_DESCRIPTOR');
});

test.each([
  ['RAM size', (d: ReturnType<typeof sample>) => ({ machine: { ...d.machine, ram_bytes: 4096 } })],
  [
    'key',
    (d: ReturnType<typeof sample>) => ({
      ram: { ...d.ram, source: { ...d.ram.source, key: 'secret' } },
    }),
  ],
  [
    'group',
    (d: ReturnType<typeof sample>) => ({
      ram: { ...d.ram, source: { ...d.ram.source, group: '10.0.0.1' } },
    }),
  ],
  ['family', (d: ReturnType<typeof sample>) => ({ identity: { ...d.identity, family: 2 ** 24 } })],
  ['zero map', () => ({ zero_map: Buffer.alloc(3) })],
  [
    'RAM layout',
    (d: ReturnType<typeof sample>) => ({
      machine: {
        ...d.machine,
        ram_layout: [{ guest_address: 0, offset: 4096, length: d.machine.ram_bytes }],
      },
    }),
  ],
])('a descriptor with a wrong %s is not encoded, and its key is not told', (_, change) => {
  const good = sample();
  const encode = () => encodeDescriptor({ ...good, ...change(good) });
  expect(encode).toThrow(expect.objectContaining({ code: 'E_ARGUMENT' }));
  expect(encode).not.toThrow(/secret|abab/);
});

test('free memory costs next to nothing', () => {
  const pages = (4 * 2 ** 30) / 4096;
  const map = Buffer.alloc(pages / 8, 0xff);
  map.fill(0, 0, 10_000);
  const descriptor = sample(pages, map);
  const bytes = encodeDescriptor(descriptor);
  expect(bytes.length).toBeLessThan(3000);
  expect(decodeDescriptor(bytes).zero_map.equals(map)).toBe(true);
});

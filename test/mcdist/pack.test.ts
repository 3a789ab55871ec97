import { expect, test } from 'vitest';
import { newSeed, random } from '../blktap/support.js';
import { codec, PAGE_BYTES } from './codec.js';

/** From incompressible to a single byte repeated. */
function pageOf(below: (n: number) => number): Buffer {
  const distinct = 1 + below(256);
  const page = Buffer.alloc(PAGE_BYTES);
  for (let at = 0; at < PAGE_BYTES; ) {
    const run = 1 + below(below(2) === 0 ? 4 : 600);
    const from = below(at + 1);
    const copy = below(2) === 0;
    for (let i = 0; i < run && at < PAGE_BYTES; i++, at++) {
      page[at] = copy && from + i < at ? (page[from + i] ?? 0) : below(distinct);
    }
  }
  return page;
}

test('what is packed unpacks to the same page, or does not pay', () => {
  const next = random(newSeed('pack'));
  const below = (n: number) => Math.floor(next() * n);
  let packed = 0;
  for (let i = 0; i < 2000; i++) {
    const page = pageOf(below);
    const limit = below(3) === 0 ? below(PAGE_BYTES + 1) : 1366;
    const bytes = codec.pack(page, limit);
    if (bytes === null) continue;
    packed++;
    expect(bytes.length).toBeLessThanOrEqual(limit);
    expect(codec.unpack(bytes)?.equals(page)).toBe(true);
  }
  expect(packed).toBeGreaterThan(200);
  expect(packed).toBeLessThan(2000);
});

test('a limit is kept to the byte', () => {
  const page = Buffer.alloc(PAGE_BYTES, 'a page of a generation, ');
  const size = codec.pack(page, PAGE_BYTES)?.length ?? 0;
  expect(size).toBeGreaterThan(20);
  expect(codec.pack(page, size)?.length).toBe(size);
  for (const limit of [size - 1, 12, 1, 0]) expect(codec.pack(page, limit)).toBeNull();
});

test('what is not exactly a page is refused', () => {
  const literals = (count: number) => {
    const more = count - 15;
    const lengths = [...Array(Math.floor(more / 255)).fill(255), more % 255];
    return Buffer.concat([Buffer.from([0xf0, ...lengths]), Buffer.alloc(count, 7)]);
  };
  expect(codec.unpack(literals(1000))).toBeNull(); // shorter than a page
  expect(codec.unpack(literals(PAGE_BYTES))).toBeNull(); // larger than a page is, packed
  // A match of 5000 bytes, then 5 literals: beyond the end of the page.
  const match = [0x1f, 9, 1, 0, ...Array(19).fill(255), 136, 0x50, 1, 2, 3, 4, 5];
  expect(codec.unpack(Buffer.from(match))).toBeNull();
  // A match that begins before the page.
  expect(codec.unpack(Buffer.from([0x1f, 9, 9, 0, ...Array(15).fill(255), 1, 0x50]))).toBeNull();
  expect(codec.unpack(Buffer.alloc(0))).toBeNull();
});

test('hostile bytes unpack to a page or to nothing', () => {
  const next = random(newSeed('hostile packed'));
  const below = (n: number) => Math.floor(next() * n);
  let refused = 0;
  for (let i = 0; i < 3000; i++) {
    const bytes = Buffer.from(codec.pack(pageOf(below), PAGE_BYTES) ?? [below(256)]);
    const damaged = below(4) === 0 ? bytes.subarray(0, below(bytes.length)) : bytes;
    for (let n = below(4); n > 0 && damaged.length > 0; n--) {
      damaged[below(damaged.length)] = below(256);
    }
    const page = codec.unpack(damaged);
    if (page === null) refused++;
    else expect(page).toHaveLength(PAGE_BYTES);
  }
  expect(refused).toBeGreaterThan(100);
});

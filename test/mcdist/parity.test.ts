import { expect, test } from 'vitest';
import { newSeed, random } from '../blktap/support.js';
import {
  BLOCK_PAGES,
  codec,
  fromWire,
  MAX_PARITIES,
  PAGE_BYTES,
  symbolBytes,
  toWire,
} from './codec.js';

type Rand = (below: number) => number;
function rand(name: string): Rand {
  const next = random(newSeed(name));
  return (below) => Math.floor(next() * below);
}

function randomBytes(below: Rand, size: number): Buffer {
  return Buffer.from(Array.from({ length: size }, () => below(256)));
}

/** `count` of `all`, in order. */
function some(below: Rand, all: number[], count: number): number[] {
  const left = [...all];
  while (left.length > count) left.splice(below(left.length), 1);
  return left;
}

const all = (fragments: number): number[] => [...Array(BLOCK_PAGES * fragments).keys()];
const none = toWire([]);

function must<T>(value: T | null | undefined): T {
  if (value === null || value === undefined) throw new Error('nothing came');
  return value;
}

/** docs/mcdist-parity.md, apart from the native code: a product in GF(2^8) with 0x11d. */
function product(a: number, b: number): number {
  let sum = 0;
  for (let bit = 0; bit < 8; bit++) {
    if ((b >> bit) & 1) sum ^= a << bit;
  }
  for (let bit = 14; bit >= 8; bit--) {
    if ((sum >> bit) & 1) sum ^= 0x11d << (bit - 8);
  }
  return sum;
}
const inverse = (a: number): number =>
  must([...Array(256).keys()].find((b) => product(a, b) === 1));

/** A symbol with its padding. */
function symbolOf(block: Buffer, fragments: number, symbol: number): Buffer {
  const size = symbolBytes(fragments);
  const page = Math.floor(symbol / fragments);
  const offset = (symbol % fragments) * size;
  const from = page * PAGE_BYTES + offset;
  const out = Buffer.alloc(size);
  block.copy(out, 0, from, Math.min(from + size, (page + 1) * PAGE_BYTES));
  return out;
}

/** The block without the bytes of these symbols. */
function without(block: Buffer, fragments: number, symbols: number[]): Buffer {
  const out = Buffer.from(block);
  const size = symbolBytes(fragments);
  for (const each of symbols) {
    const page = Math.floor(each / fragments);
    const from = page * PAGE_BYTES + (each % fragments) * size;
    out.fill(0xee, from, Math.min(from + size, (page + 1) * PAGE_BYTES));
  }
  return out;
}

function parity(block: Buffer, fragments: number, symbols: number[], index: number): Buffer {
  return must(codec.encode(block, fragments, toWire(symbols), index, 1));
}

test('every kernel gives the bytes of the portable one, and the portable one the field', () => {
  const seed = newSeed('kernels');
  const kernels = codec.kernels().filter((each) => each.supported);
  expect(kernels.at(-1)?.name).toBe('portable');
  const src = Buffer.from([...Array(256).keys()]);
  for (const { name } of kernels) {
    expect(codec.kernelFaults(name, 3000, seed), name).toBe(0);
    for (let c = 0; c < 256; c++) {
      const dst = Buffer.alloc(256, 0x5a);
      codec.multiplyAdd(name, dst, src, c);
      expect(dst.equals(Buffer.from(src.map((byte) => product(c, byte) ^ 0x5a))), name).toBe(true);
    }
  }
  console.log(`kernels tested: ${kernels.map((each) => each.name).join(', ')}`);
});

test('parities are those of the document', () => {
  const below = rand('document');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  for (const fragments of [1, 2, 3, 4]) {
    const symbols = some(below, all(fragments), 5);
    for (const index of [0, below(MAX_PARITIES), MAX_PARITIES - 1]) {
      const wanted = Buffer.alloc(symbolBytes(fragments));
      for (const each of symbols) {
        const factor = inverse(each ^ (128 + index));
        symbolOf(block, fragments, each).forEach((byte, at) => {
          wanted[at] = (wanted[at] ?? 0) ^ product(factor, byte);
        });
      }
      expect(parity(block, fragments, symbols, index).equals(wanted)).toBe(true);
    }
  }
});

test('parities made together are those made one by one', () => {
  const below = rand('together');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  for (const fragments of [1, 2, 3, 4]) {
    const symbols = some(below, all(fragments), 1 + below(BLOCK_PAGES * fragments));
    const first = below(100);
    const together = must(codec.encode(block, fragments, toWire(symbols), first, 27));
    const single = [...Array(27).keys()].map((i) => parity(block, fragments, symbols, first + i));
    expect(together.equals(Buffer.concat(single))).toBe(true);
  }
});

test('what cannot be encoded is refused', () => {
  const block = Buffer.alloc(BLOCK_PAGES * PAGE_BYTES, 1);
  const cover = toWire([0, 31]);
  expect(codec.encode(block, 1, cover, 0, MAX_PARITIES)).not.toBeNull();
  expect(codec.encode(block, 1, cover, 1, MAX_PARITIES)).toBeNull();
  expect(codec.encode(block, 1, cover, 200, 1)).toBeNull();
  expect(codec.encode(block, 0, cover, 0, 1)).toBeNull();
  expect(codec.encode(block, 5, cover, 0, 1)).toBeNull();
  expect(codec.encode(block, 1, toWire([32]), 0, 1)).toBeNull();
  expect(codec.encode(block, 3, toWire([96]), 0, 1)).toBeNull();
  expect(codec.encode(block, 1, none, 0, 1)).toBeNull();
  expect(codec.encode(block, 1, cover, 0, 1, 31)).toBeNull(); // a page of it cannot be read
  expect(codec.encode(block, 1, cover, 0, 1, 30)).not.toBeNull();
});

test('any n parities repair any n losses, n - 1 repair nothing', () => {
  const below = rand('erasures');
  for (const fragments of [1, 2, 3, 4]) {
    const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
    const counts = [1, 2, 3, 1 + below(20), 1 + below(20), Math.min(MAX_PARITIES, 32 * fragments)];
    for (const n of counts) {
      const most = 32 * fragments;
      const symbols = some(below, all(fragments), n + below(most - n + 1));
      const lost = some(below, symbols, n);
      const elsewhere = all(fragments).filter((i) => !symbols.includes(i) && below(3) === 0);
      const missing = toWire([...lost, ...elsewhere]);
      const cover = { id: 1, fragments, symbols: toWire(symbols) };
      const held = without(block, fragments, [...lost, ...elsewhere]);
      const before = Buffer.from(held);
      const table = new codec.ParityTable({});
      const indices = some(below, [...Array(MAX_PARITIES).keys()], n);
      for (const [sent, index] of indices.entries()) {
        expect(table.repairable(7, fragments, missing).equals(none)).toBe(true);
        expect(table.repair(7, fragments, missing, held)).toBeNull();
        expect(table.need(7, fragments, 0, missing, toWire(symbols))).toEqual([
          sent === 0 ? 0 : 1,
          n - sent,
        ]);
        const bytes = parity(block, fragments, symbols, index);
        expect(table.add(7, cover, index, bytes, missing)).toBe('held');
      }
      expect(held.equals(before)).toBe(true);
      expect(fromWire(table.repairable(7, fragments, missing))).toEqual(lost);
      expect(fromWire(table.repair(7, fragments, missing, held) as Buffer)).toEqual(lost);
      expect(held.equals(without(block, fragments, elsewhere))).toBe(true);
      expect(table.state(7)).toMatchObject({ rows: 0, blocks: 0, bytes: 0 });
    }
  }
}, 60_000);

test('symbols that come while parities are held need no parity', () => {
  const below = rand('late');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  const table = new codec.ParityTable({});
  const symbols = all(3);
  const cover = { id: 1, fragments: 3, symbols: toWire(symbols) };
  for (const index of [3, 9]) {
    table.add(0, cover, index, parity(block, 3, symbols, index), toWire([5, 6, 7, 95]));
  }
  expect(table.need(0, 3, 0, toWire([5, 6, 7, 95]), toWire([5]))).toEqual([1, 2]);
  expect(table.repair(0, 3, toWire([5, 6, 95]), Buffer.from(block))).toBeNull();
  const held = without(block, 3, [5, 95]);
  expect(table.need(0, 3, 0, toWire([5, 95]), toWire([5]))).toEqual([1, 0]);
  expect(table.repair(0, 3, toWire([5, 95]), held)).toEqual(toWire([5, 95]));
  expect(held.equals(block)).toBe(true);
});

test('a parity that is held, of no use, or none at all, does not count', () => {
  const block = Buffer.alloc(BLOCK_PAGES * PAGE_BYTES, 3);
  const table = new codec.ParityTable({});
  const missing = toWire([1, 2, 40]);
  const symbols = toWire([1, 2, 3]);
  const cover = { id: 9, fragments: 1, symbols };
  const bytes = parity(block, 1, [1, 2, 3], 4);
  expect(table.add(0, cover, 4, bytes, missing)).toBe('held');
  expect(table.add(0, cover, 4, bytes, missing)).toBe('duplicate');
  expect(table.add(0, { ...cover, symbols: toWire([3]) }, 5, bytes, missing)).toBe('not-needed');
  expect(table.add(0, cover, MAX_PARITIES, bytes, missing)).toBe('bad');
  expect(table.add(0, cover, 5, bytes.subarray(1), missing)).toBe('bad');
  expect(table.add(0, cover, 5, Buffer.concat([bytes, bytes]), missing)).toBe('bad');
  expect(table.add(0, { ...cover, id: 0 }, 5, bytes, missing)).toBe('bad');
  expect(table.add(0, { ...cover, symbols: none }, 5, bytes, missing)).toBe('bad');
  expect(table.add(0, { ...cover, symbols: toWire([2, 32]) }, 5, bytes, missing)).toBe('bad');
  expect(table.add(0, { ...cover, fragments: 0 }, 5, bytes, missing)).toBe('bad');
  expect(table.add(0, { ...cover, fragments: 5 }, 5, bytes, missing)).toBe('bad');
  expect(table.state(0)).toMatchObject({ rows: 1, bytes: PAGE_BYTES });
  expect(table.need(0, 1, 0, missing, symbols)).toEqual([9, 1]);
  expect(table.add(0, cover, 5, bytes, missing)).toBe('held');
  expect(table.add(0, cover, 6, bytes, missing)).toBe('not-needed');
});

test('parities of an older cover still help', () => {
  const below = rand('covers');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  const table = new codec.ParityTable({});
  const lost = [4, 17];
  const missing = toWire(lost);
  const covers = [
    { id: 1, symbols: [4, 5, 17] },
    { id: 2, symbols: [4, 9, 17, 30] },
  ];
  const add = (at: number, index: number) => {
    const { id, symbols } = must(covers[at]);
    const cover = { id, sender: 5, fragments: 2, symbols: toWire(symbols) };
    return table.add(3, cover, index, parity(block, 2, symbols, index), missing);
  };
  expect(add(0, 0)).toBe('held');
  expect(table.need(3, 2, 5, missing, missing)).toEqual([1, 1]);
  // The same index in another cover says the same of what is missing: two rows, one equation.
  expect(add(1, 0)).toBe('held');
  expect(table.repair(3, 2, missing, Buffer.from(block))).toBeNull();
  expect(table.need(3, 2, 5, missing, missing)).toEqual([2, 1]);
  expect(table.need(3, 2, 6, missing, missing)).toEqual([0, 2]); // another server
  expect(add(0, 1)).toBe('held');
  const held = without(block, 2, lost);
  expect(table.repair(3, 2, missing, held)).toEqual(missing);
  expect(held.equals(block)).toBe(true);
});

test('covers with different unknowns are solved one after the other', () => {
  const below = rand('two systems');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  const table = new codec.ParityTable({});
  const covers = [
    [1, 2, 3],
    [20, 21],
  ];
  for (const [at, symbols] of covers.entries()) {
    const cover = { id: at + 1, fragments: 1, symbols: toWire(symbols) };
    for (const index of symbols.keys()) {
      table.add(0, cover, index, parity(block, 1, symbols, index), toWire(covers.flat()));
    }
  }
  const held = without(block, 1, covers.flat());
  let missing = covers.flat();
  for (const left of [3, 0]) {
    const repaired = fromWire(table.repair(0, 1, toWire(missing), held) as Buffer);
    missing = missing.filter((i) => !repaired.includes(i));
    expect(missing).toHaveLength(left);
  }
  expect(held.equals(block)).toBe(true);
});

test('pages cut otherwise begin anew', () => {
  const block = Buffer.alloc(BLOCK_PAGES * PAGE_BYTES, 3);
  const table = new codec.ParityTable({});
  const missing = toWire([1, 2]);
  const add = (fragments: number, index: number) =>
    table.add(
      0,
      { id: 1, fragments, symbols: missing },
      index,
      parity(block, fragments, [1, 2], index),
      missing,
    );
  add(3, 0);
  expect(add(1, 1)).toBe('held');
  expect(table.state(0)).toMatchObject({ rows: 1, bytes: PAGE_BYTES });
  expect(table.repairable(0, 1, missing)).toEqual(none);
  expect(table.need(0, 3, 0, missing, missing)).toEqual([0, 2]);
});

test('a symbol that cannot be read leaves all as it was', () => {
  const below = rand('unreadable');
  const block = randomBytes(below, BLOCK_PAGES * PAGE_BYTES);
  const table = new codec.ParityTable({});
  const cover = { id: 1, fragments: 3, symbols: toWire([10, 11, 12]) };
  const missing = toWire([11]);
  table.add(0, cover, 2, parity(block, 3, [10, 11, 12], 2), missing);
  const held = without(block, 3, [11]);
  const before = Buffer.from(held);
  expect(table.repair(0, 3, missing, held, 12)).toBe('unreadable');
  expect(held.equals(before)).toBe(true);
  expect(table.repair(0, 3, missing, held)).toEqual(missing);
  expect(held.equals(block)).toBe(true);
});

test('the table is bounded in blocks, bytes and rows; what is oldest goes', () => {
  const bytes = Buffer.alloc(PAGE_BYTES);
  const missing = toWire(all(1));
  const add = (table: InstanceType<typeof codec.ParityTable>, block: number, id = 1, index = 0) =>
    table.add(block, { id, fragments: 1, symbols: missing }, index, bytes, missing);

  const few = new codec.ParityTable({ maxBlocks: 3 });
  for (const block of [1, 2, 3]) add(few, block);
  add(few, 1, 1, 1); // a new row: 2 is the oldest now
  add(few, 4);
  expect([1, 2, 3, 4].map((block) => few.state(block).rows)).toEqual([2, 0, 1, 1]);
  expect(few.state(0)).toMatchObject({ blocks: 3, bytes: 4 * PAGE_BYTES, evictedBlocks: 1 });

  const small = new codec.ParityTable({ maxBytes: 4 * PAGE_BYTES });
  for (const index of [0, 1, 2]) add(small, 1, 1, index);
  for (const index of [0, 1]) add(small, 2, 1, index);
  expect(small.state(1).rows).toBe(0);
  expect(small.state(0).bytes).toBe(2 * PAGE_BYTES);

  // Rows of which no system can be made: each cover has other unknowns.
  const one = new codec.ParityTable({});
  for (let i = 0; i < 400; i++) {
    const symbols = toWire([i % 31, 31].concat(i < 200 ? [] : [(i + 7) % 31]));
    one.add(0, { id: 1 + (i % 255), fragments: 1, symbols }, i % 2, bytes, missing);
  }
  expect(one.state(0).rows).toBe(32);
  one.forget(0);
  expect(one.state(0)).toMatchObject({ blocks: 0, bytes: 0 });
});

test('without bytes it counts as it does with them', () => {
  const below = rand('count');
  const block = Buffer.alloc(BLOCK_PAGES * PAGE_BYTES, 1);
  const tables = [
    new codec.ParityTable({ maxBlocks: 4 }),
    new codec.ParityTable({ maxBlocks: 4, count: true }),
  ];
  let repaired = 0;
  for (let step = 0; step < 3000; step++) {
    const number = below(6);
    const fragments = below(20) === 0 ? 2 : 3;
    const missing = toWire(some(below, [1, 5, 40, 63], 1 + below(4)));
    const covers = [
      [1, 5, 40, 63],
      [0, 1, 5, 40, 63],
      [1, 40],
    ];
    const at = below(3);
    const symbols = must(covers[at]);
    const index = below(6);
    const cover = { id: 1 + at, fragments, symbols: toWire(symbols) };
    const bytes = parity(block, fragments, symbols, index);
    const seen = tables.map((table) => [
      table.add(number, cover, index, bytes, missing),
      table.need(number, fragments, 0, missing, missing),
      table.repair(number, fragments, missing, Buffer.from(block)),
      table.state(number).rows,
      table.state(number).evictedBlocks,
    ]);
    expect(seen[1]).toEqual(seen[0]);
    if (seen[0]?.[2] !== null) repaired++;
  }
  expect(repaired).toBeGreaterThan(100);
  expect(tables[1]?.state(0).bytes).toBe(0);
});

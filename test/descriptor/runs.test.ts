import BitSet from 'bitset';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { bitmapOfRuns, runsOfBitmap } from '../../src/descriptor/zero-map.js';

const SEED = Date.now() % 2 ** 31;
console.log(`zero map runs: seed ${SEED}`);

it('runs and bitmaps say the same, by the word of another bit set', () => {
  const run = fc.tuple(fc.nat(400), fc.nat(80));
  fc.assert(
    fc.property(fc.array(run, { maxLength: 12 }), fc.nat(7), (wanted, spare) => {
      const pages = 500 + spare;
      const oracle = new BitSet();
      for (const [first, count] of wanted) {
        for (let page = first; page < first + count; page++) oracle.set(page, 1);
      }
      const bitmap = bitmapOfRuns(wanted.flat(), pages);
      for (let page = 0; page < pages; page++) {
        expect(((bitmap[page >> 3] ?? 0) >> (page & 7)) & 1).toBe(oracle.get(page));
      }
      const back = runsOfBitmap(bitmap, pages);
      expect(bitmapOfRuns(back, pages)).toEqual(bitmap);
      const total = back.reduce((sum, value, i) => sum + (i % 2 === 1 ? value : 0), 0);
      expect(total).toBe(oracle.cardinality());
    }),
    { seed: SEED, numRuns: 300 },
  );
});

it('a run past the end is refused', () => {
  expect(() => bitmapOfRuns([90, 11], 100)).toThrowError(
    expect.objectContaining({ code: 'E_ARGUMENT' }),
  );
});

import fc from 'fast-check';
import { expect, test } from 'vitest';
import { decodeZeroMap, encodeZeroMap } from '../../src/descriptor/zero-map.js';

/** A bitmap made of runs of these lengths, the first one of zero bits. */
function ofRuns(runs: number[]): { bitmap: Buffer; pages: number } {
  const pages = runs.reduce((sum, run) => sum + run, 0);
  const bitmap = Buffer.alloc(Math.ceil(pages / 8));
  let page = 0;
  runs.forEach((run, index) => {
    for (let end = page + run; page < end; page++) {
      if (index % 2 === 1) bitmap[page >> 3] = (bitmap[page >> 3] ?? 0) | (1 << (page & 7));
    }
  });
  return { bitmap, pages };
}

const code = { code: 'E_DESCRIPTOR' };

test('maps of long and short runs come back as they were', () => {
  const run = fc.oneof(fc.integer({ min: 1, max: 20 }), fc.integer({ min: 1, max: 5000 }));
  fc.assert(
    fc.property(fc.nat(300), fc.array(run, { maxLength: 40 }), (first, rest) => {
      const { bitmap, pages } = ofRuns([first, ...rest]);
      fc.pre(pages > 0);
      expect(decodeZeroMap(encodeZeroMap(bitmap, pages), pages).equals(bitmap)).toBe(true);
    }),
  );
});

test('a map has one encoding: what decodes, encodes to the same bytes', () => {
  fc.assert(
    fc.property(
      fc.uint8Array({ maxLength: 12 }),
      fc.integer({ min: 1, max: 600 }),
      (bytes, pages) => {
        const encoded = Buffer.from(bytes);
        let bitmap: Buffer;
        try {
          bitmap = decodeZeroMap(encoded, pages);
        } catch (error) {
          expect(error).toMatchObject(code);
          return;
        }
        expect(encodeZeroMap(bitmap, pages).equals(encoded)).toBe(true);
      },
    ),
    { numRuns: 5000 },
  );
});

test.each([
  ['cut short', [0x80], 100],
  ['a number not in its shortest form', [0x81, 0x00, 99], 100],
  ['an empty run in the middle', [50, 0, 50], 100],
  ['runs beyond the RAM', [50, 51], 100],
  ['runs short of the RAM', [50, 49], 100],
  ['a run of 2^62', [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f], 100],
  ['nothing at all', [], 100],
])('%s is refused', (_, bytes, pages) => {
  expect(() => decodeZeroMap(Buffer.from(bytes), pages)).toThrow(expect.objectContaining(code));
});

test('a bitmap with bits past its last page is not encoded', () => {
  expect(() => encodeZeroMap(Buffer.from([0xff]), 7)).toThrow(
    expect.objectContaining({ code: 'E_ARGUMENT' }),
  );
});

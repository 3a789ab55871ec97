import fc from 'fast-check';
import { expect, test } from 'vitest';
import { pageRuns, parseRegions, REGIONS_MAX, type Region } from '../../src/sfld/disjoint.js';

const PAGE = 4096;
const PAGES = 64;

test('whole pages within any regions, in order, each once', () => {
  const region = fc
    .tuple(fc.nat(PAGES * PAGE), fc.nat(PAGES * PAGE))
    .map(([a, b]): Region => ({ offset_bytes: Math.min(a, b), size_bytes: Math.abs(a - b) }));
  fc.assert(
    fc.property(fc.array(region, { maxLength: 12 }), (regions) => {
      const runs = pageRuns('ram', regions, PAGES * PAGE);
      const named: number[] = [];
      for (let i = 0; i + 1 < runs.length; i += 2) {
        expect(runs[i + 1]).toBeGreaterThan(0);
        for (let k = 0; k < (runs[i + 1] ?? 0); k++) named.push((runs[i] ?? 0) + k);
      }
      const within = Array.from({ length: PAGES }, (_, page) => page).filter((page) =>
        regions.some(
          ({ offset_bytes, size_bytes }) =>
            offset_bytes <= page * PAGE && (page + 1) * PAGE <= offset_bytes + size_bytes,
        ),
      );
      expect(named).toEqual(within);
      // Neighbours are one run.
      for (let i = 2; i < runs.length; i += 2) {
        expect(runs[i]).toBeGreaterThan((runs[i - 2] ?? 0) + (runs[i - 1] ?? 0));
      }
    }),
    { verbose: true },
  );
});

test('what is not within the memory or disk, no region, or too many of them: E_ARGUMENT', () => {
  const refused = expect.objectContaining({ code: 'E_ARGUMENT' });
  const bytes = PAGES * PAGE;
  for (const region of [
    { offset_bytes: 0, size_bytes: bytes + 1 },
    { offset_bytes: bytes, size_bytes: 1 },
    { offset_bytes: -1, size_bytes: 1 },
    { offset_bytes: 0, size_bytes: -1 },
    { offset_bytes: 0.5, size_bytes: 1 },
    { offset_bytes: 2 ** 53, size_bytes: 2 ** 53 },
  ]) {
    expect(() => pageRuns('disk', [region], bytes)).toThrow(refused);
  }
  const many = Array.from({ length: REGIONS_MAX + 1 }, () => ({ offset_bytes: 0, size_bytes: 0 }));
  expect(() => pageRuns('disk', many, bytes)).toThrow(refused);
  for (const text of ['1', '1+', '+1', '-1+2', '1+2,', '1+2;3+4', '0x1+2', '1e3+1']) {
    expect(() => parseRegions(text)).toThrow(refused);
  }
  expect(parseRegions('')).toEqual([]);
  expect(parseRegions('1+2,30+40')).toEqual([
    { offset_bytes: 1, size_bytes: 2 },
    { offset_bytes: 30, size_bytes: 40 },
  ]);
});

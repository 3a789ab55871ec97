/** Family numbers are given out once, and again only when all others have been. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { FAMILIES_OF_HOST, FamilyNumbers } from '../../src/sfld/family-numbers.js';

const HOST = 5;
const FIRST = HOST * FAMILIES_OF_HOST;
const NONE: ReadonlySet<number> = new Set();
let folder: string;
let file: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'sffam-'));
  file = join(folder, 'families.json');
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const startAt = (next: number) => writeFileSync(file, JSON.stringify({ version: 1, next }));

test('no number comes again, though nobody here knows of the earlier ones, nor after restarts', async () => {
  const seen = new Set<number>();
  for (let restart = 0; restart < 8; restart++) {
    const numbers = await FamilyNumbers.open(file, HOST);
    // All at once too.
    const some = await Promise.all(Array.from({ length: 40 }, () => numbers.take(NONE)));
    for (const family of some) {
      expect(seen.has(family)).toBe(false);
      expect(Math.floor(family / FAMILIES_OF_HOST)).toBe(HOST);
      seen.add(family);
    }
  }
});

test('after the last comes the first; those in use are passed over', async () => {
  startAt(FAMILIES_OF_HOST - 1);
  const numbers = await FamilyNumbers.open(file, HOST);
  const taken = new Set([FIRST, FIRST + 1]);
  expect(await numbers.take(taken)).toBe(FIRST + FAMILIES_OF_HOST - 1);
  expect(await numbers.take(taken)).toBe(FIRST + 2);
  const all = new Set(Array.from({ length: FAMILIES_OF_HOST }, (_, i) => FIRST + i));
  await expect(numbers.take(all)).rejects.toMatchObject({ code: 'E_CAPACITY' });
  all.delete(FIRST + 1);
  expect(await numbers.take(all)).toBe(FIRST + 1);
});

test('a number that cannot be written down is not given out', async () => {
  const numbers = await FamilyNumbers.open(join(file, 'families.json'), HOST);
  writeFileSync(file, '');
  await expect(numbers.take(NONE)).rejects.toMatchObject({ code: 'E_IO' });
});

test('a file that says something else is refused', async () => {
  for (const next of [-1, 0.5, FAMILIES_OF_HOST, Number.NaN]) {
    startAt(next);
    await expect(FamilyNumbers.open(file, HOST)).rejects.toMatchObject({ code: 'E_CORRUPT' });
  }
});

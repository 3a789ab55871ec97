import { expect, test } from 'vitest';
import { type NativeSliceIndex, sliceIndex } from '../../src/cow-disk/slice-index.js';
import { newSeed, random } from './support.js';

const BASE = 0;
const ZERO = 0xffffffff;
const LAST = 0xfffffffe; // the largest slice number
const LEAF = 64;

/** What a page has, for disks of any size: the areas set, the newest last. */
class Areas {
  readonly #areas: [number, number, number][];
  constructor(areas: [number, number, number][] = []) {
    this.#areas = areas;
  }
  set(page: number, count: number, entry: number): void {
    this.#areas.push([page, page + count, entry]);
  }
  get(page: number): number {
    return this.#areas.findLast(([from, to]) => page >= from && page < to)?.[2] ?? BASE;
  }
  edges(pages: number): number[] {
    const near = this.#areas.flatMap(([from, to]) => [from - 1, from, to - 1, to]);
    return [0, pages - 1, ...near].filter((page) => page >= 0 && page < pages);
  }
  copy(): Areas {
    return new Areas([...this.#areas]);
  }
}

function checkRun(index: NativeSliceIndex, get: (page: number) => number, page: number): void {
  const [entry, count] = index.run(page);
  expect(entry).toBe(get(page));
  expect(count).toBeGreaterThan(0);
  expect(index.baseRun(page)).toBe(entry === BASE ? count : 0);
}

test('random changes and copies read as plain arrays do', () => {
  const rand = random(newSeed('index'));
  const below = (n: number) => Math.floor(rand() * n);
  for (const pages of [1, 63, 64, 65, 4096, 4100, 12345]) {
    // Few numbers, so that leaves become uniform; numbers of every width; numbers far apart.
    const kinds: (() => number)[] = [
      () => 1 + below(3),
      () => 1 + below(300),
      () => 1 + below(70000),
      () => LAST - below(3),
      () => below(LAST + 1),
    ];
    const held = [{ index: sliceIndex(pages), plain: new Uint32Array(pages) }];
    for (let step = 0; step < 400; step++) {
      const at = below(held.length);
      const { index, plain } = held[at] as (typeof held)[0];
      const page = below(pages);
      const count = Math.min(
        pages - page,
        rand() < 0.5 ? 1 : 1 + below([8, 200, 9000][below(3)] ?? 1),
      );
      const action = rand();
      if (action < 0.1 && held.length < 6) {
        held.push({ index: index.copy(), plain: plain.slice() });
      } else if (action < 0.15 && held.length > 1) {
        index.drop();
        held.splice(at, 1);
      } else {
        const kind = kinds[Math.floor(step / 80)] as () => number;
        const entry = action < 0.3 ? ZERO : action < 0.4 ? BASE : kind();
        index.set(page, count, entry);
        plain.fill(entry, page, page + count);
      }
      if (step % 10 !== 9) continue;
      for (const each of held) {
        for (let leaf = 0; leaf < pages; leaf += LEAF) {
          const wanted = [...each.plain.subarray(leaf, leaf + LEAF)];
          expect(each.index.entries(leaf, wanted.length), `${pages} pages`).toEqual(wanted);
        }
        const some = below(pages);
        const length = 1 + below(Math.min(LEAF - (some % LEAF), pages - some));
        expect(each.index.entries(some, length)).toEqual([
          ...each.plain.subarray(some, some + length),
        ]);
        expect(each.index.get(some)).toBe(each.plain[some]);
        checkRun(each.index, (p) => each.plain[p] as number, some);
        const [entry, run] = each.index.run(some);
        const same = each.plain.subarray(some, Math.min(pages, some + run));
        expect(same.every((value) => value === entry)).toBe(true);
      }
    }
    for (const { index } of held) index.drop();
    expect(held[0]?.index.bytes()).toBe(0);
  }
}, 60_000);

test('a disk of 64 TiB is as right at every edge, whole subtrees included', () => {
  const rand = random(newSeed('sparse index'));
  const below = (n: number) => Math.floor(rand() * n);
  const pages = 2 ** 34;
  let index = sliceIndex(pages);
  let areas = new Areas();
  const kept: [NativeSliceIndex, Areas][] = [];
  for (let step = 0; step < 60; step++) {
    // Sizes around those of a leaf and of each level above it.
    const size = Math.max(1, LEAF ** (1 + below(5)) * (1 + below(2)) + below(3) - 1);
    const start = below(pages);
    const page = rand() < 0.5 ? start - (start % Math.min(size, pages)) : start;
    const count = Math.min(size, pages - page);
    const entry = [ZERO, BASE, 1 + step, LAST][below(4)] as number;
    index.set(page, count, entry);
    areas.set(page, count, entry);
    if (step % 15 === 14) {
      kept.push([index, areas]);
      index = index.copy();
      areas = areas.copy();
    }
  }
  for (const [each, truth] of [...kept, [index, areas] as const]) {
    for (const page of truth.edges(pages)) {
      expect(each.get(page), `page ${page}`).toBe(truth.get(page));
      checkRun(each, (p) => truth.get(p), page);
    }
    each.drop();
  }
  expect(index.bytes()).toBe(0);
});

test('an area in one slice takes no memory, however it was written and split before', () => {
  const pages = 2 ** 18; // 1 GiB
  const index = sliceIndex(pages);
  for (let page = 0; page < pages; page++) index.set(page, 1, 7);
  expect(index.bytes()).toBe(0);
  expect(index.run(0)).toEqual([7, pages]);
  index.set(12345, 1, ZERO);
  index.set(100_000, 3000, 9);
  expect(index.bytes()).toBeGreaterThan(0);
  expect(index.get(12344)).toBe(7);
  expect(index.get(12345)).toBe(ZERO);
  for (let page = pages - 1; page >= 0; page--) index.set(page, 1, ZERO);
  expect(index.bytes()).toBe(0);
  index.set(0, pages, BASE);
  expect(index.baseRun(5)).toBeGreaterThanOrEqual(pages - 5);
});

test('copies share what is equal, and nothing is left when all are dropped', () => {
  const index = sliceIndex(2 ** 21);
  index.scatter(50_000, 100, newSeed('shared index'));
  const alone = index.bytes();
  const copies = Array.from({ length: 1000 }, () => index.copy());
  expect(index.bytes()).toBe(alone);
  index.set(777, 1, 5000);
  const changed = index.bytes();
  expect(changed).toBeGreaterThan(alone);
  expect(changed - alone).toBeLessThan(4096); // one path
  index.drop();
  for (const copy of copies) copy.drop();
  expect(index.bytes()).toBe(0);
});

test('1 GiB of random pages by 1,000 slices takes at most 2 MiB', () => {
  const index = sliceIndex(2 ** 21);
  index.scatter(2 ** 18, 1000, newSeed('scattered index'));
  expect(index.bytes()).toBeLessThan(2 * 2 ** 20);
  expect(index.bytes()).toBeGreaterThan(2 ** 18);
});

test('copies are read right on other threads while the owner changes its index', () => {
  const seed = newSeed('index race');
  expect(sliceIndex.race(20_000, 3, 300, seed)).toBe(0);
});

import { expect, test } from 'vitest';
import type { Transaction } from '../../src/cow-disk/entries.js';
import { MAX_RUN, merged, plan, removal, type Step, wanted } from '../../src/cow-disk/gc.js';
import { Tree } from '../../src/cow-disk/tree.js';
import { newSeed, random } from '../blktap/support.js';

const id = (n: number) => n.toString(16).padStart(32, '0');

/** `parents[n]` is what slice n lies on; generations and tops by slice. */
function tree(parents: Record<number, number | null>, generations: number[], tops: number[]): Tree {
  const made = new Tree();
  const slices: NonNullable<Transaction['slices']> = {};
  for (const [n, parent] of Object.entries(parents)) {
    slices[id(Number(n))] =
      parent === null
        ? { parent: null, base: { kind: 'none' }, size_bytes: 4096, map: 0 }
        : { parent: id(parent), size_bytes: 4096, map: 0 };
  }
  const generation = (n: number) => ({ slice: id(n), disk: 'web', name: null, created_ms: n });
  made.apply({
    slices,
    generations: Object.fromEntries(generations.map((n) => [id(1e6 + n), generation(n)])),
    disks: Object.fromEntries(
      tops.map((n) => [`disk${n}`, { top: id(n), spare: null, created_ms: n }]),
    ),
  });
  expect(made.index()).toEqual([]);
  return made;
}

const numbers = (ids: string[]) => ids.map((each) => Number.parseInt(each, 16));
function brief(steps: Step[]): unknown[] {
  return steps.map((step) => {
    if (step.kind === 'punch') {
      return ['punch', ...numbers([step.slice]), numbers(step.children).sort()];
    }
    return [step.kind, ...numbers(step.slices)];
  });
}

const cases: [string, Tree, unknown[]][] = [
  ['nothing, while all is wanted', tree({ 1: null, 2: 1, 3: 2 }, [1, 2], [3]), []],
  ['nothing, below a top alone', tree({ 1: null, 2: 1 }, [], [2]), []],
  [
    'a dropped slice goes into the one on it',
    tree({ 1: null, 2: 1, 3: 2 }, [2], [3]),
    [['merge', 1, 2]],
  ],
  [
    'a run is merged at once, its end keeps its generation',
    tree({ 1: null, 2: 1, 3: 2, 4: 3, 5: 4 }, [4], [5]),
    [['merge', 1, 2, 3, 4]],
  ],
  [
    'a run below a top stops short of it',
    tree({ 1: null, 2: 1, 3: 2 }, [], [3]),
    [['merge', 1, 2]],
  ],
  ['leaves go, tips first', tree({ 1: null, 2: 1, 3: 2, 4: 1 }, [1], [4]), [['remove', 3, 2]]],
  [
    'what a gone branch leaves alone is merged',
    tree({ 1: null, 2: 1, 3: 1, 4: 3 }, [3], [4]),
    [
      ['remove', 2],
      ['merge', 1, 3],
    ],
  ],
  [
    'several on a dropped slice: its pages that all of them cover are punched',
    tree({ 1: null, 2: 1, 3: 1 }, [], [2, 3]),
    [['punch', 1, [2, 3]]],
  ],
  ['a fork point ends a run', tree({ 1: null, 2: 1, 3: 2, 4: 2 }, [2], [3, 4]), [['merge', 1, 2]]],
  [
    'a dropped fork point ends a run, and is punched',
    tree({ 1: null, 2: 1, 3: 2, 4: 2 }, [], [3, 4]),
    [
      ['merge', 1, 2],
      ['punch', 2, [3, 4]],
    ],
  ],
  ['all of a store without disks', tree({ 1: null, 2: 1, 3: 1 }, [], []), [['remove', 2, 3, 1]]],
];

for (const [name, given, expected] of cases) {
  test(`plan: ${name}`, () => {
    expect(brief(plan(given))).toEqual(expected);
  });
}

/** Does a step as the cleaner does, with `pick` as what the native store chooses to keep. */
function apply(of: Tree, step: Step, pick: (slices: string[]) => string): void {
  if (step.kind === 'remove') {
    const { transaction } = removal(of, step.slices, () => false);
    if (transaction !== undefined) of.apply(transaction);
  } else if (step.kind === 'merge') {
    of.apply(merged(of, step.slices, pick(step.slices), 1));
  } else if (step.kind === 'files') {
    of.apply({ removed: Object.fromEntries(step.slices.map((id) => [id, null])) });
  }
}

function collapse(of: Tree, pick: (slices: string[]) => string): number {
  for (let rounds = 0; rounds < 100; rounds++) {
    const steps = plan(of).filter((step) => step.kind !== 'punch');
    if (steps.length === 0) return rounds;
    for (const step of steps) apply(of, step, pick);
  }
  return expect.unreachable('the plan has no end');
}

test('a chain of 10,000 dropped slices collapses in a few transactions', () => {
  const parents: Record<number, number | null> = { 1: null };
  for (let n = 2; n <= 10_002; n++) parents[n] = n - 1;
  const given = tree(parents, [10_001], [10_002]);
  const steps = plan(given);
  expect(steps.length).toBe(Math.ceil(10_001 / MAX_RUN));
  const rounds = collapse(given, (slices) => slices[0] as string);
  expect(rounds).toBeLessThan(5);
  expect(given.slices.size).toBe(2);
  expect(given.generations.get(id(1e6 + 10_001))?.slice).toBe(id(1));
});

test('whatever is kept, clean-up ends, loses no name and leaves a sound tree', () => {
  const rand = random(newSeed('plan'));
  for (let round = 0; round < 300; round++) {
    const count = 1 + Math.floor(rand() * 40);
    const parents: Record<number, number | null> = { 1: null };
    for (let n = 2; n <= count; n++) {
      // Chains more often than forks, and now and then another tree.
      const from = rand() < 0.6 ? n - 1 : 1 + Math.floor(rand() * (n - 1));
      parents[n] = rand() < 0.05 ? null : from;
    }
    const nodes = Array.from({ length: count }, (_, i) => i + 1);
    const lain = new Set(Object.values(parents));
    const tops = nodes.filter((n) => !lain.has(n) && rand() < 0.7);
    const generations = nodes.filter((n) => !tops.includes(n) && rand() < 0.3);
    const given = tree(parents, generations, tops);
    /** Which names lie on which, the only thing that counts. */
    const shape = () => {
      const above = new Map<string, string[]>();
      for (const slice of given.slices.keys()) {
        const name = given.diskAt(slice) ?? given.generationAt(slice);
        if (name === undefined) continue;
        const below = [...given.down(slice)].slice(1);
        above.set(
          name,
          below.flatMap(([each]) => given.generationAt(each) ?? []),
        );
      }
      return above;
    };
    const before = shape();
    collapse(given, (slices) => slices[Math.floor(rand() * slices.length)] as string);
    expect(shape()).toEqual(before);
    const replayed = new Tree();
    for (const each of given.transactions()) replayed.apply(each);
    expect(replayed.index()).toEqual([]);
    expect(replayed.children(id(1))).toEqual(given.children(id(1)));
    for (const slice of given.slices.keys()) {
      if (wanted(given, slice)) continue;
      const on = [...given.children(slice)];
      expect(on.length > 1 || (on.length === 1 && given.diskAt(on[0] ?? '') !== undefined)).toBe(
        true,
      );
    }
  }
});

test('a slice somebody reads is left, with all below it', () => {
  const given = tree({ 1: null, 2: 1, 3: 2, 4: 2 }, [], []);
  const [step] = plan(given);
  if (step?.kind !== 'remove') expect.unreachable();
  const { ids, left } = removal(given, step.slices, (each) => each === id(3));
  expect(numbers(ids)).toEqual([4]);
  expect(numbers(left)).toEqual([3]);
});

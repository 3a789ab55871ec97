import { expect, test } from 'vitest';
import type { Transaction } from '../../src/cow-disk/entries.js';
import { Tree } from '../../src/cow-disk/tree.js';

const id = (n: number) => n.toString(16).padStart(32, '0');
const none = { kind: 'none' } as const;
const slice = (parent: number | null, size_bytes = 8192) =>
  parent === null
    ? { parent: null, base: none, size_bytes, map: 0 }
    : { parent: id(parent), size_bytes, map: 0 };
const generation = (of: number, name: string | null = null) => ({
  slice: id(of),
  disk: 'web',
  name,
  created_ms: 1,
});

/** 1 <- 2 (generation 92, `before`) <- 3 (top of web, spare 4), 2 <- 5 (top of a clone). */
const sound: Transaction = {
  slices: { [id(1)]: slice(null), [id(2)]: slice(1), [id(3)]: slice(2), [id(5)]: slice(2) },
  generations: { [id(92)]: generation(2, 'before') },
  disks: {
    web: { top: id(3), spare: id(4), created_ms: 1 },
    __proto__x: { top: id(5), spare: null, created_ms: 1 },
  },
};

function problems(...transactions: Transaction[]): string[] {
  const tree = new Tree();
  for (const each of transactions) tree.apply(each);
  return tree.index();
}

test('a sound tree has no problems, and its ways lead where they should', () => {
  const tree = new Tree();
  tree.apply(sound);
  expect(tree.index()).toEqual([]);
  expect([...tree.children(id(2))].sort()).toEqual([id(3), id(5)]);
  expect(tree.generationAt(id(2))).toBe(id(92));
  expect(tree.named('web', 'before')).toBe(id(92));
  expect(tree.diskAt(id(3))).toBe('web');
  expect([...tree.down(id(5))].map(([each]) => each)).toEqual([id(5), id(2), id(1)]);
  expect(tree.base(id(5))).toEqual(none);
});

test('the ways are the same whether entries change one by one or are replayed', () => {
  const changes: Transaction[] = [
    // web forks
    {
      slices: { [id(4)]: slice(3) },
      generations: { [id(93)]: generation(3, 'later') },
      disks: { web: { top: id(4), spare: id(6), created_ms: 1 } },
    },
    // `before` goes, 1 and 2 are merged into 1, `later` changes its slice and name
    { generations: { [id(92)]: null } },
    {
      slices: {
        [id(2)]: null,
        [id(1)]: { ...slice(null), map: 1 },
        [id(3)]: slice(1),
        [id(5)]: slice(1),
      },
      removed: { [id(2)]: true },
    },
    { generations: { [id(93)]: generation(3, 'renamed') }, removed: { [id(2)]: null } },
    { disks: { __proto__x: null }, slices: { [id(5)]: null }, removed: { [id(5)]: true } },
  ];
  const live = new Tree();
  live.apply(sound);
  live.index();
  for (let n = 0; n < changes.length; n++) {
    live.apply(changes[n] as Transaction);
    const replayed = new Tree();
    for (const each of [sound, ...changes.slice(0, n + 1)]) replayed.apply(each);
    expect(replayed.index()).toEqual([]);
    const rewritten = new Tree();
    for (const each of live.transactions()) rewritten.apply(JSON.parse(JSON.stringify(each)));
    expect(rewritten.index()).toEqual([]);
    expect(replayed).toEqual(live);
    expect(rewritten).toEqual(live);
  }
  expect(live.named('web', 'later')).toBe(undefined);
  expect(live.named('web', 'renamed')).toBe(id(93));
  expect([...live.removed]).toEqual([id(5)]);
});

test('a disk may be named __proto__', () => {
  const tree = new Tree();
  tree.apply({ slices: { [id(1)]: slice(null) } });
  tree.apply({ disks: { ['__proto__']: { top: id(1), spare: null, created_ms: 1 } } });
  expect(tree.index()).toEqual([]);
  const again = new Tree();
  for (const each of tree.transactions()) again.apply(JSON.parse(JSON.stringify(each)));
  again.index();
  expect([...again.disks.keys()]).toEqual(['__proto__']);
});

const damages: [string, Transaction, RegExp][] = [
  ['an unknown parent', { slices: { [id(1)]: null } }, /parent .*01 is unknown/],
  ['a cycle', { slices: { [id(1)]: slice(2) } }, /lies on itself/],
  ['a slice on itself', { slices: { [id(7)]: slice(7) } }, /lies on itself/],
  ['sizes that differ', { slices: { [id(1)]: slice(null, 4096) } }, /size differs/],
  ['a base in the middle', { slices: { [id(2)]: { ...slice(1), base: none } } }, /a base belongs/],
  [
    'no base at the end',
    { slices: { [id(1)]: { parent: null, size_bytes: 8192, map: 0 } } },
    /a base/,
  ],
  [
    'a top with a slice on it',
    { slices: { [id(7)]: slice(3) } },
    /web: its top .* has a slice on it/,
  ],
  [
    'a top that is a generation',
    { generations: { [id(93)]: generation(3) } },
    /web: its top .* is a g/,
  ],
  ['an unknown top', { slices: { [id(3)]: null } }, /web: its top .* is unknown/],
  ['a top of two', { disks: { b: { top: id(3), spare: null, created_ms: 1 } } }, /another one's/],
  [
    'a spare of two',
    { disks: { __proto__x: { top: id(5), spare: id(4), created_ms: 1 } } },
    /spare .* another/,
  ],
  [
    'a spare in the tree',
    { disks: { web: { top: id(3), spare: id(1), created_ms: 1 } } },
    /spare .* already/,
  ],
  ['two generations of a slice', { generations: { [id(93)]: generation(2) } }, /another one's too/],
  [
    'a generation of no slice',
    { generations: { [id(93)]: generation(77) } },
    /its slice .* unknown/,
  ],
  [
    'a name twice',
    { generations: { [id(93)]: generation(1, 'before') } },
    /web@before is named twice/,
  ],
  ['a name like an id', { generations: { [id(93)]: generation(1, id(5)) } }, /looks like an id/],
  ['a removed slice in use', { removed: { [id(2)]: true } }, /removed and in use/],
  ['a removed spare in use', { removed: { [id(4)]: true } }, /removed and in use/],
];

for (const [name, damage, found] of damages) {
  test(`what does not fit together is told: ${name}`, () => {
    expect(problems(sound, damage).join('\n')).toMatch(found);
  });
}

test('a chain of 100,000 slices is checked in one go', () => {
  const slices: NonNullable<Transaction['slices']> = { [id(1)]: slice(null) };
  for (let n = 2; n <= 100_000; n++) slices[id(n)] = slice(n - 1);
  expect(problems({ slices })).toEqual([]);
});

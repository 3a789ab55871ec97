import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test, vi } from 'vitest';
import { crc32c } from '../../src/common/crc32c.js';
import { isErrorCode, type SnowflockError } from '../../src/common/errors.js';
import { checkStore } from '../../src/cow-disk/check.js';
import type { Transaction } from '../../src/cow-disk/entries.js';
import { JOURNAL } from '../../src/cow-disk/journal.js';
import { lineSum, readJournal } from '../../src/cow-disk/journal-read.js';
import { Ledger } from '../../src/cow-disk/ledger.js';
import { Tree } from '../../src/cow-disk/tree.js';
import { cleanup, newSeed, random } from '../blktap/support.js';
import { newStore } from '../cow-disk/store-support.js';

/**
 * Damaged journals, made at random from a seed, for a fixed time each.
 *
 * - Damaged bytes (flipped, cut, overwritten, put in, moved): E_CORRUPT, or a prefix of the history.
 * - Damaged lines (twice, missing, in another order) have right checksums, but do not follow each
 *   other: E_CORRUPT, or a prefix of the history.
 * - Lines with right checksums that follow each other, and anything in them: E_CORRUPT, or a tree that
 *   is whole.
 */
vi.setConfig({ testTimeout: 120_000 + 1000 * Number(process.env.FUZZ_S ?? 3) });
const BUDGET_MS = Number(process.env.FUZZ_S ?? 3) * 1000;

interface Case {
  folder: string;
  lines: Buffer[];
  history: Transaction[];
}

/** A folder on tmpfs: damage is tried thousands of times, and no disk need write it. */
async function inMemory(): Promise<string> {
  const folder = await mkdtemp('/dev/shm/sf-journal-');
  cleanup(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

/** The journal of a store in which things happened, its files beside it. */
async function lived(): Promise<Case> {
  const { directory, store } = await newStore();
  for (let n = 0; n < 4; n++) {
    await store.snapshot({ disk: 'web', name: `s${n}` });
    await store.clone({ disk: 'web', generation: `s${n}`, name: `clone${n}` });
  }
  await store.removeDisk({ disk: 'clone1' });
  await store.removeGeneration({ disk: 'web', generation: 's1' });
  await store.settled();
  await store.close();
  const folder = await inMemory();
  await cp(directory, folder, { recursive: true });
  const path = join(folder, JOURNAL);
  const text = await readFile(path);
  const history: Transaction[] = [];
  await readJournal(path, (each) => history.push(each));
  return { folder, lines: split(text), history };
}

/** Lines with their line feeds; what is behind the last one is a line too. */
function split(text: Buffer): Buffer[] {
  const out: Buffer[] = [];
  for (let from = 0; from < text.length; ) {
    const feed = text.indexOf(10, from);
    const end = feed === -1 ? text.length : feed + 1;
    out.push(text.subarray(from, end));
    from = end;
  }
  return out;
}

type Rand = (below: number) => number;

/** Calls `work` with numbers of a printed seed until the time is over; says which round failed. */
async function rounds(name: string, work: (rand: Rand) => Promise<void>): Promise<number> {
  const next = random(newSeed(name));
  const end = performance.now() + BUDGET_MS;
  let round = 0;
  for (; round === 0 || performance.now() < end; round++) {
    try {
      await work((below) => Math.floor(next() * below));
    } catch (error) {
      console.error(`${name}: round ${round}`);
      throw error;
    }
  }
  console.log(`${name}: ${round} rounds`);
  return round;
}

/** Opens the journal as the store does. Undefined: refused, and the file is as it was. */
async function open(folder: string, bytes: Buffer): Promise<Tree | undefined> {
  const path = join(folder, JOURNAL);
  await writeFile(path, bytes);
  try {
    const ledger = await Ledger.open(folder);
    await ledger.close();
    return ledger.tree;
  } catch (error) {
    const { code, message } = error as SnowflockError;
    expect(isErrorCode(code), String(error)).toBe(true);
    expect(['E_CORRUPT', 'E_IO'], message).toContain(code);
    expect(message).toContain(path);
    expect((await readFile(path)).equals(bytes)).toBe(true);
    return undefined;
  }
}

/** All that a tree says, as text: comparing it so often has to be quick. */
function said(tree: Tree): string {
  const maps = [tree.slices, tree.generations, tree.disks];
  const sorted = maps.map((map) => entries(Object.fromEntries(map)).sort());
  return JSON.stringify([...sorted, [...tree.removed].sort()]);
}

const pick = <T>(rand: Rand, from: readonly T[]): T => from[rand(from.length)] as T;

function damageBytes(rand: Rand, text: Buffer): Buffer {
  const at = rand(text.length);
  const bytes = 1 + rand(rand(4) === 0 ? 600 : 8);
  const piece = text.subarray(at, at + bytes);
  switch (rand(8)) {
    case 0:
      return text.subarray(0, at);
    case 1:
      return Buffer.concat([text.subarray(0, at), text.subarray(at + bytes)]);
    case 2:
      return Buffer.concat([text.subarray(0, at), piece, text.subarray(at)]);
    case 3: // as sectors a device did not write
      return Buffer.from(text).fill(0, at & ~511, Math.min((at & ~511) + 512, text.length));
    case 4: {
      const out = Buffer.from(text);
      text.copy(out, at, rand(text.length), text.length);
      return out;
    }
    case 5: {
      const noise = Buffer.from(Array.from({ length: bytes }, () => rand(256)));
      return Buffer.concat([text.subarray(0, at), noise, text.subarray(at + rand(2) * bytes)]);
    }
    default: {
      const out = Buffer.from(text);
      for (let i = 1 + rand(3); i > 0; i--) {
        const byte = rand(out.length);
        out[byte] = (out[byte] as number) ^ (1 << rand(8));
      }
      return out;
    }
  }
}

/** What the tree said after each of these, and before the first. */
function prefixesOf(history: Transaction[]): Set<string> {
  const past = new Tree();
  const prefixes = new Set([said(past)]);
  for (const each of history) {
    past.apply(each);
    prefixes.add(said(past));
  }
  return prefixes;
}

test('damaged bytes: refused, or a prefix of the history', async () => {
  const { lines, history } = await lived();
  const folder = await inMemory();
  const prefixes = prefixesOf(history);
  const text = Buffer.concat(lines);
  let opened = 0;
  await rounds('journal bytes', async (rand) => {
    const bytes = damageBytes(rand, text);
    const tree = await open(folder, bytes);
    if (tree === undefined) return;
    opened++;
    if (!prefixes.has(said(tree))) expect.fail(`no prefix of the history: ${said(tree)}`);
  });
  expect(opened).toBeGreaterThan(0);
});

test('damaged lines: refused, or a prefix of the history', async () => {
  const { lines, history } = await lived();
  const folder = await inMemory();
  const prefixes = prefixesOf(history);
  let refused = 0;
  await rounds('journal lines', async (rand) => {
    const bad = [...lines];
    for (let i = 1 + rand(3); i > 0; i--) {
      const [from, to] = [rand(bad.length), rand(bad.length)];
      const line = bad[from] as Buffer;
      if (rand(3) > 0) bad.splice(from, 1);
      if (rand(3) > 0) bad.splice(to, 0, line);
    }
    const tree = await open(folder, Buffer.concat(bad));
    if (tree === undefined) refused++;
    else if (!prefixes.has(said(tree))) expect.fail(`no prefix of the history: ${said(tree)}`);
  });
  expect(refused).toBeGreaterThan(0);
});

function entries(members: Record<string, unknown>): string[] {
  return Object.entries(members).map(([key, value]) => `${key} ${JSON.stringify(value)}`);
}

const id = (n: number) => n.toString(16).padStart(32, '0');
const ODD: readonly unknown[] = [
  ...[null, true, false, 0, -1, 0.5, 1e308, 2 ** 46, 2 ** 46 + 1, 2 ** 53, 0xffff_ffff, 2 ** 32],
  ...['', '\u0000', '\ud800', 'x'.repeat(5000), '../etc', '__proto__', id(1), id(2), id(3)],
  ...[[], {}, [[]], { __proto__: null }, { length: 5 }],
];
const KEYS: readonly string[] = [
  ...['slices', 'generations', 'disks', 'removed', 'parent', 'base', 'size_bytes', 'map'],
  ...['kind', 'path', 'image_bytes', 'generation', 'slice', 'disk', 'name', 'created_ms', 'top'],
  ...['spare', '__proto__', 'constructor', 'toString', 'web', '', id(1), id(2), id(3)],
];

/** A value with one place in it changed: a member out, in, another one's, or of another kind. */
function vary(rand: Rand, value: unknown): unknown {
  if (typeof value !== 'object' || value === null || rand(6) === 0) {
    if (typeof value === 'number' && rand(2) === 0) return value * 2 ** rand(60) + rand(3) - 1;
    return pick(rand, ODD);
  }
  const members = Object.entries(value);
  const at = rand(Math.max(members.length, 1));
  const [key, old] = members[at] ?? [pick(rand, KEYS), {}];
  const what = rand(8);
  if (what === 0) members.splice(at, 1);
  else if (what === 1) members.push([pick(rand, KEYS), pick(rand, ODD)]);
  else if (what === 2) members[at] = [pick(rand, KEYS), old];
  else members[at] = [key, vary(rand, old)];
  // Not Object.fromEntries alone: a member called __proto__ must stay one.
  return JSON.parse(`{${members.map((each) => each.map(json).join(':')).join(',')}}`);
}
const json = (value: unknown) => JSON.stringify(value) ?? 'null';

/** A line with a right checksum and these bytes. */
function sealed(text: Buffer): Buffer {
  const sum = crc32c(text).toString(16).padStart(8, '0');
  return Buffer.concat([Buffer.from(`${sum} `), text, Buffer.from('\n')]);
}

/** Lines that follow each other, the first a header, with these JSON texts. */
function chained(texts: Buffer[]): Buffer {
  let after: string | undefined;
  const lines = texts.map((text) => {
    const line = sealed(after === undefined ? text : Buffer.from(`${after} ${text}`));
    after = lineSum(line);
    return line;
  });
  return Buffer.concat(lines);
}

/** The JSON text of a line. */
const textOf = (line: Buffer) => line.subarray(line.indexOf('{'), line.length - 1);

function oddText(rand: Rand, text: Buffer): Buffer {
  const deep = 1 + rand(200_000);
  switch (rand(6)) {
    case 0:
      return Buffer.from('['.repeat(deep) + ']'.repeat(deep - rand(2)));
    case 1:
      return Buffer.from(`{"disks":${'{"a":'.repeat(deep)}1${'}'.repeat(deep)}}`);
    case 2: {
      const out = Buffer.from(text);
      for (let i = 1 + rand(4); i > 0; i--) out[rand(out.length)] = 0x80 + rand(0x80);
      return out.indexOf(10) === -1 ? out : text;
    }
    case 3: // the same member twice
      return Buffer.from(text.toString().replace(/^\{/, '{"slices":{},"disks":{},'));
    case 4: {
      const digits = pick(rand, ['1e400', '-0', '00', '1e-400', '9'.repeat(400), '0x10', 'NaN']);
      return Buffer.from(text.toString().replace(/:\d+/g, () => (rand(2) ? `:${digits}` : ':1')));
    }
    default:
      return Buffer.from(text.toString().replaceAll('"', rand(2) ? "'" : '\\"'));
  }
}

test('lines with anything in them: refused, or a whole tree', async () => {
  const { lines, history } = await lived();
  const folder = await inMemory();
  let opened = 0;
  let refused = 0;
  const runs = await rounds('journal contents', async (rand) => {
    const bad = lines.map(textOf);
    const at = rand(bad.length);
    bad[at] =
      rand(4) === 0
        ? oddText(rand, bad[at] as Buffer)
        : Buffer.from(json(vary(rand, history[Math.max(0, at - 1)])));
    const bytes = chained(bad);
    const tree = await open(folder, bytes);
    if (tree === undefined) {
      refused++;
      return;
    }
    opened++;
    // Whole: every way down ends, and what was read is what a journal written anew would say.
    for (const slice of tree.slices.keys()) expect([...tree.down(slice)].length).toBeGreaterThan(0);
    const again = new Tree();
    for (const each of tree.transactions()) {
      again.apply(JSON.parse(JSON.stringify(each)) as Transaction);
    }
    expect(again.index()).toEqual([]);
    expect(said(again)).toBe(said(tree));
  });
  expect(opened).toBeGreaterThan(0);
  expect(refused).toBeGreaterThan(0);
  expect(runs).toBe(opened + refused);
});

test('a check of a store whose journal is damaged finds that and changes nothing', async () => {
  const { folder, lines } = await lived();
  const path = join(folder, JOURNAL);
  const text = Buffer.concat(lines);
  await rounds('journal check', async (rand) => {
    const bytes = damageBytes(rand, text);
    await writeFile(path, bytes);
    const found = await checkStore(folder);
    expect((await readFile(path)).equals(bytes)).toBe(true);
    if (bytes.equals(text)) expect(found).toEqual([]);
    else expect(found).not.toEqual([]);
  });
});

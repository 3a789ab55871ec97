import { copyFile, cp, readdir, readFile, rm, truncate, unlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { checkStore, repairStore } from '../../src/cow-disk/check.js';
import { addon } from '../../src/cow-disk/native.js';
import { newSliceId } from '../../src/cow-disk/slice-files.js';
import { Store } from '../../src/cow-disk/store.js';
import type { CheckFinding } from '../../src/cow-disk/store-api.js';
import { codeOf, newGeneration, newSeed, random, temporary } from '../blktap/support.js';
import { BYTES, fill, image, newStore, openStore, pagesOf, pagesOfDisk } from './store-support.js';

/** A closed store: web with one generation `one`, a clone `test` on it, a disk over an image. */
async function sample(): Promise<{
  folder: string;
  directory: string;
  /** Of web@one, web's top, test's top, by name. */
  slices: { one: string; web: string; test: string };
}> {
  const { folder, directory, store } = await newStore();
  await fill(store, 'web', folder, 1, [0, 1]);
  const sealed = await store.openDisk('web');
  await sealed.fork(newGeneration(), { name: 'one' });
  await sealed.prepareFork();
  const [one, web] = sealed.info().slices.map((slice) => slice.id) as [string, string];
  await sealed.close();
  await store.clone({ disk: 'web', generation: 'one', name: 'test' });
  await fill(store, 'test', folder, 2, [1]);
  const opened = await store.openDisk('test');
  const test = opened.info().slices.at(-1)?.id as string;
  await opened.close();
  const path = join(folder, 'base');
  await writeFile(path, Buffer.alloc(8192, 9));
  await store.createDisk({ name: 'over', size_bytes: BYTES, base: { kind: 'image', path } });
  await store.close();
  return { folder, directory, slices: { one, web, test } };
}

async function flip(path: string, at: number, value?: number): Promise<void> {
  const data = await readFile(path);
  data[at] = value ?? (data[at] ?? 0) ^ 0x10;
  await writeFile(path, data);
}

const summary = (found: CheckFinding[]) =>
  found.map((each) => `${each.severity} ${each.file.split('/').at(-1)} ${each.message}`);

type Sample = Awaited<ReturnType<typeof sample>>;

const errors: [string, (s: Sample) => Promise<unknown>, RegExp][] = [
  [
    'journal',
    (s) => flip(join(s.directory, 'store.journal'), 200),
    /^error store.journal .* line /,
  ],
  [
    'data missing',
    (s) => unlink(join(s.directory, `${s.slices.one}.data`)),
    /\.data is missing; affects test, web, web@one/,
  ],
  [
    'map missing',
    (s) => unlink(join(s.directory, `${s.slices.test}.0.map`)),
    /\.0\.map is missing; affects test$/,
  ],
  [
    'data short',
    (s) => truncate(join(s.directory, `${s.slices.one}.data`), 4096),
    /affects test, web, web@one/,
  ],
  [
    'sealed header',
    (s) => flip(join(s.directory, `${s.slices.one}.0.map`), 30),
    /affects test, web, web@one/,
  ],
  [
    'sealed map',
    (s) => flip(join(s.directory, `${s.slices.one}.0.map`), 4096),
    /affects test, web, web@one/,
  ],
  ['open header', (s) => flip(join(s.directory, `${s.slices.web}.0.map`), 150), /affects web$/],
  [
    'another slice in its place',
    (s) =>
      copyFile(
        join(s.directory, `${s.slices.web}.0.map`),
        join(s.directory, `${s.slices.one}.0.map`),
      ),
    /affects test, web, web@one/,
  ],
  ['base missing', (s) => unlink(join(s.folder, 'base')), /base image is missing; affects over/],
  [
    'base shorter',
    (s) => truncate(join(s.folder, 'base'), 100),
    /100 bytes instead of 8192; affects over/,
  ],
];

for (const [name, damage, expected] of errors) {
  test(`check finds, and repair leaves alone: ${name}`, async () => {
    const made = await sample();
    expect(await checkStore(made.directory)).toEqual([]);
    await damage(made);
    const before = await snapshotOf(made.directory);
    const found = await checkStore(made.directory);
    const bad = found.filter((each) => each.severity === 'error');
    expect(summary(bad).join('\n')).toMatch(expected);
    const repaired = await repairStore(made.directory);
    expect(repaired.filter((each) => each.repaired)).toEqual([]);
    expect(await snapshotOf(made.directory)).toEqual(before);
  });
}

/** Names and contents of a folder, but for the lock. */
async function snapshotOf(directory: string): Promise<Map<string, string>> {
  const files = new Map<string, string>();
  for (const name of (await readdir(directory)).sort()) {
    if (name === 'store.lock') continue;
    files.set(name, (await readFile(join(directory, name))).toString('base64'));
  }
  return files;
}

test('what a crash leaves is a note or a leak, and repaired; a dry run only says so', async () => {
  const made = await sample();
  const { directory, slices } = made;
  const whole = await snapshotOf(directory);
  const put = (name: string, data: Buffer | string) => writeFile(join(directory, name), data);
  await writeFile(join(directory, 'store.journal'), '0badc0de {"slices"', { flag: 'a' });
  const [spare, top] = [newSliceId(), newSliceId()];
  await addon().createSlice(directory, spare, BYTES, true);
  await addon().createSlice(directory, top, 3 * BYTES, false);
  await put(`${newSliceId()}.data`, '');
  await put('store.journal.new', 'x');
  await put(`${slices.one}.1.map`, 'not finished');
  await put(`${slices.one}.1.map.new`, 'not finished');
  await put(`${slices.web}.${'0'.repeat(32)}.live`, 'of another boot');
  const found = await checkStore(directory);
  expect(found.filter((each) => each.severity === 'error')).toEqual([]);
  expect(found.length).toBeGreaterThanOrEqual(8);
  const littered = await snapshotOf(directory);
  const dry = await repairStore(directory, { dryRun: true });
  expect(dry.every((each) => each.repaired)).toBe(true);
  expect(await snapshotOf(directory)).toEqual(littered);
  await repairStore(directory);
  expect(await snapshotOf(directory)).toEqual(whole);
  expect(await checkStore(directory)).toEqual([]);
});

test('a slice with pages that no line names is an error: for the check, and for opening', async () => {
  const { directory, folder } = await sample();
  const copy = join(folder, 'copy');
  await cp(directory, copy, { recursive: true });
  const path = join(copy, 'store.journal');
  const lines = (await readFile(path, 'utf8')).split('\n');
  // The lines from the one on that names the clone are lost; its pages are still there.
  const at = lines.findIndex((line) => line.includes('"test"'));
  expect(at).toBeGreaterThan(1);
  await writeFile(path, `${lines.slice(0, at).join('\n')}\n`);
  const before = await snapshotOf(copy);
  expect(await codeOf(Store.open(copy))).toBe('E_CORRUPT');
  expect(summary(await checkStore(copy)).join('\n')).toMatch(/a line of the journal may be lost/);
  const repaired = await repairStore(copy);
  expect(repaired.some((each) => each.severity === 'error')).toBe(true);
  for (const [name, data] of before) {
    if (name.endsWith('.data')) expect((await snapshotOf(copy)).get(name)).toBe(data);
  }
});

test('space that no map speaks of is found and given back', async () => {
  const { directory, folder, slices } = await sample();
  const path = join(directory, `${slices.one}.data`);
  const data = await readFile(path);
  data.fill(0xee, 10 * 4096, 30 * 4096);
  await writeFile(path, data);
  const leaks = (await checkStore(directory)).filter((each) => each.severity === 'leak');
  expect(summary(leaks).join()).toMatch(/bytes are taken by pages that no map speaks of/);
  const repaired = await repairStore(directory);
  expect(repaired.filter((each) => each.severity === 'leak').every((each) => each.repaired)).toBe(
    true,
  );
  expect((await checkStore(directory)).filter((each) => each.severity === 'leak')).toEqual([]);
  const store = await openStore(directory);
  expect(await pagesOf(store, 'web', 'one')).toEqual(image(1, 1));
  expect(await pagesOfDisk(store, 'test', folder)).toEqual(image(1, 2));
});

test('files that are nothing of a store are mentioned and kept', async () => {
  const { directory } = await sample();
  await writeFile(join(directory, 'notes.txt'), 'mine');
  await writeFile(join(directory, `${newGeneration()}.replica`), 'x');
  const found = await repairStore(directory);
  expect(found.map((each) => [each.severity, each.repaired])).toEqual(
    expect.arrayContaining([
      ['note', false],
      ['leak', false],
    ]),
  );
  expect(await readFile(join(directory, 'notes.txt'), 'utf8')).toBe('mine');
});

test('a replica that no disk lies on goes if it holds no page, and stays if it does', async () => {
  const { directory } = await sample();
  const [empty, unused, full] = [newGeneration(), newGeneration(), newGeneration()];
  const put = (name: string, data: string) => writeFile(join(directory, name), data);
  await put(`${unused}.source`, '{}'); // as of a clone that was killed before there was a disk
  for (const generation of [empty, full]) {
    await put(`${generation}.replica`, '');
    await truncate(join(directory, `${generation}.replica`), BYTES);
    await put(`${generation}.replica.map`, 'map');
    await put(`${generation}.source`, '{}');
  }
  await writeFile(join(directory, `${full}.replica`), Buffer.alloc(BYTES, 7));
  await put(`web@one.source.${'0'.repeat(8)}.tmp`, 'not finished');
  const found = await repairStore(directory);
  expect(found.filter((each) => each.severity === 'error')).toEqual([]);
  const left = (await readdir(directory)).filter((name) => /replica|source/.test(name));
  expect(left.sort()).toEqual([`${full}.replica`, `${full}.replica.map`, `${full}.source`]);
  const still = (await checkStore(directory)).filter((each) => each.severity === 'leak');
  expect(summary(still).join('\n')).toMatch(/holds \d+ bytes; remove it by hand/);
  expect(still).toHaveLength(3);
});

test('any byte of any metadata altered: found or harmless, never a crash, never wrong pages', async () => {
  const { directory, folder, slices } = await sample();
  const rand = random(newSeed('alter'));
  const names = (await readdir(directory)).filter((name) => /\.(map|journal|live)$/.test(name));
  let found = 0;
  for (let round = 0; round < 60; round++) {
    const copy = join(await temporary(), 'copy');
    await cp(directory, copy, { recursive: true });
    const name = names[Math.floor(rand() * names.length)] as string;
    const path = join(copy, name);
    // The states in the map of an open slice have no checksum.
    const checked = name === `${slices.one}.0.map` ? 4200 : name.endsWith('journal') ? 1e6 : 200;
    const bytes = Math.min((await readFile(path)).length, checked);
    await flip(path, Math.floor(rand() * bytes), Math.floor(rand() * 256));
    const findings = await checkStore(copy);
    if (findings.length > 0) found++;
    if (findings.some((each) => each.severity === 'error')) continue;
    const store = await Store.open(copy);
    try {
      expect(await pagesOf(store, 'web', 'one')).toEqual(image(1, 1));
      expect(await pagesOfDisk(store, 'web', folder)).toEqual(image(1, 1));
    } finally {
      await store.close();
      await rm(copy, { recursive: true });
    }
  }
  expect(found).toBeGreaterThan(0);
});

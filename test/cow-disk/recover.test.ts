import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { newGeneration, newReplica, PAGE, temporary } from '../blktap/support.js';
import { newStore, openStore, PAGES, pagesOfDisk } from './store-support.js';

/** Does `work`, after which the journal tells of nothing that it did: as after a kill at that moment. */
async function behindTheJournal(directory: string, work: () => Promise<void>): Promise<void> {
  const journal = join(directory, 'store.journal');
  const before = await readFile(journal);
  await work();
  await writeFile(journal, before);
}

test('a fork that the journal does not tell of is found on a disk over a replica too', async () => {
  const folder = await temporary();
  const directory = join(folder, 'disk');
  const below = newGeneration();
  const replica = newReplica(join(folder, 'replica'), below, PAGES);
  const { handle } = replica;
  const base = { kind: 'replica', generation: below } as const;
  await Disk.create(directory, { sizeBytes: PAGES * PAGE, base });
  const first = await Disk.open(directory, { replica: handle });
  await first.prepareFork();
  const generation = newGeneration();
  await behindTheJournal(directory, async () => {
    await first.fork(generation);
    await first.close();
  });
  const second = await Disk.open(directory, { replica: handle });
  expect(second.info().generations).toEqual([generation]);
  await second.close();
});

test('a disk whose fork cannot be recovered keeps no other disk of its store from being used', async () => {
  const { folder, directory, store } = await newStore();
  await store.createDisk({ name: 'other', size_bytes: PAGES * PAGE });
  const web = await store.openDisk('web');
  await web.prepareFork();
  const [top = ''] = web.info().slices.map(({ id }) => id);
  await behindTheJournal(directory, async () => {
    await web.fork(newGeneration());
    await store.close();
  });
  const map = join(directory, `${top}.0.map`);
  const sealed = await readFile(map);
  await writeFile(map, Buffer.alloc(sealed.length, 1));
  const again = await openStore(directory);
  await expect(again.openDisk('web')).rejects.toMatchObject({ code: 'E_CORRUPT' });
  await expect(again.snapshot({ disk: 'web' })).rejects.toMatchObject({ code: 'E_CORRUPT' });
  expect(await pagesOfDisk(again, 'other', folder)).toEqual(Array(PAGES).fill(0));
  await again.close();
  // Nothing was given up: with the map back in its place, the fork is found.
  await writeFile(map, sealed);
  const third = await openStore(directory);
  expect((await third.list()).generations).toHaveLength(1);
  await third.close();
});

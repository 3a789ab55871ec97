import { truncate } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Store } from '../../src/cow-disk/store.js';
import { type ServePlan, StoreServer } from '../../src/disk-server/store-server.js';
import { cleanup, codeOf, temporary } from '../blktap/support.js';

/** A store of the disks `good` and `bad`, of which the latter has a data file cut short. */
async function damagedStore(): Promise<string> {
  const directory = join(await temporary(), 's');
  await Store.create(directory);
  const store = await Store.open(directory);
  await store.createDisk({ name: 'bad', size_bytes: 2 ** 20 });
  const bad = await store.openDisk('bad');
  const top = bad.info().slices[0]?.id;
  await store.createDisk({ name: 'good', size_bytes: 2 ** 20 });
  await store.close();
  await truncate(join(directory, `${top}.data`), 4096);
  return directory;
}

async function serve(
  directory: string,
  plan: Pick<ServePlan, 'disks' | 'also'>,
): Promise<{ store: StoreServer; served: Promise<void>; warnings: string[] }> {
  const warnings: string[] = [];
  const store = await StoreServer.open(directory, { warn: (message) => warnings.push(message) });
  cleanup(() => store.close().catch(() => undefined));
  const served = store.serve({ socketPath: join(directory, 'nbd.sock'), ...plan });
  return { store, served, warnings };
}

test('of a whole store a damaged disk is left out, with a warning, and the others are served', async () => {
  const { store, served, warnings } = await serve(await damagedStore(), { disks: true });
  await served;
  expect(store.exported().map(({ name }) => name)).toEqual(['good']);
  expect(warnings).toEqual([expect.stringMatching(/^bad is not exported: E_CORRUPT: .*\.data/)]);
});

test('a damaged disk that was named, or is all there is, is an error', async () => {
  const directory = await damagedStore();
  const also = [{ disk: 'bad', generation: null }];
  const named = await serve(directory, { disks: true, also });
  expect(await codeOf(named.served)).toBe('E_CORRUPT');
  expect(named.store.exported()).toEqual([]);
  await named.store.close();
  const alone = await serve(directory, { disks: false, also: [] });
  await alone.served;
  await alone.store.removeDisk({ disk: 'good' });
  await alone.store.close();
  const all = await serve(directory, { disks: true });
  expect(await codeOf(all.served)).toBe('E_CORRUPT');
});

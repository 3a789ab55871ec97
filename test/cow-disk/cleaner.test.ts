import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import { Cleaner } from '../../src/cow-disk/cleaner.js';
import { Gate } from '../../src/cow-disk/gate.js';
import { Ledger } from '../../src/cow-disk/ledger.js';
import { addon, type NativeMerge, type NativeStore } from '../../src/cow-disk/native.js';
import { cleanup, until } from '../blktap/support.js';
import { fill, image, newStore, openStore, pagesOf } from './store-support.js';

/** `native` with merges whose apply() fails before it has done anything. */
function failingApply(native: NativeStore, applied: () => void): NativeStore {
  const failing = (merge: NativeMerge): NativeMerge => ({
    totalBytes: merge.totalBytes,
    step: (bytes) => merge.step(bytes),
    prepare: () => merge.prepare(),
    leave: () => merge.leave(),
    abort: () => merge.abort(),
    apply: async () => {
      applied();
      throw new Error('no memory');
    },
  });
  return {
    openDisk: (chain, replica) => native.openDisk(chain, replica),
    openView: (chain, replica) => native.openView(chain, replica),
    inUse: (id) => native.inUse(id),
    mergeBegin: async (p) => failing(await native.mergeBegin(p)),
    punchBegin: (p) => native.punchBegin(p),
    removeSlices: (ids) => native.removeSlices(ids),
    close: () => native.close(),
  };
}

test('a merge that the journal names is never undone, whatever fails after it', async () => {
  const { folder, directory, store } = await newStore({ gc_bytes_per_s: 0 });
  await fill(store, 'web', folder, 1, [0, 1, 2]);
  await store.snapshot({ disk: 'web', name: 'one' });
  await fill(store, 'web', folder, 2, [1]);
  await store.snapshot({ disk: 'web', name: 'two' });
  await store.removeGeneration({ disk: 'web', generation: 'one' });
  await store.close();

  const native = await addon().openStore(directory);
  const ledger = await Ledger.open(directory);
  let applied = 0;
  const counted = failingApply(native, () => applied++);
  const gate = new Gate();
  const parts = { directory, ledger, native: counted, gate, changed: () => undefined };
  const cleaner = new Cleaner(parts, 2 ** 30);
  cleanup(() => cleaner.close());
  cleaner.wake();
  await until(() => applied > 0);
  await cleaner.close();
  await ledger.close();
  await native.close();

  expect((await checkStore(directory)).filter(({ severity }) => severity === 'error')).toEqual([]);
  const again = await openStore(directory);
  expect(await pagesOf(again, 'web', 'two')).toEqual(image(1, 2, 1));
  await again.settled();
  await again.close();
  expect(await checkStore(directory)).toEqual([]);
});

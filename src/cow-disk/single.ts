import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { asSnowflockError } from '../common/errors.js';
import type { Disk } from './disk.js';
import { JOURNAL } from './journal.js';
import type { ReplicaHandle } from './parts.js';
import { Store } from './store.js';
import type { DiskBase } from './store-api.js';

/** A store of one disk: what the data plane keeps for each VM. */
const NAME = 'disk';

/** A new store that holds one disk. E_EXISTS, E_ARGUMENT, E_IMAGE_UNKNOWN, E_NO_SPACE, E_IO. */
export async function createSingle(
  directory: string,
  options: { sizeBytes: number; base?: DiskBase },
): Promise<void> {
  const base = options.base ?? { kind: 'none' };
  await Store.checkDisk({ name: NAME, size_bytes: options.sizeBytes, base }); // nothing is made yet
  try {
    await Store.create(directory);
  } catch (error) {
    // One whose maker died before the disk was in it.
    if (asSnowflockError(error).code !== 'E_EXISTS') throw error;
  }
  const store = await Store.open(directory);
  let empty = false;
  try {
    await store.createDisk({ name: NAME, size_bytes: options.sizeBytes, base });
  } catch (error) {
    empty = (await store.list()).disks.length === 0;
    throw error;
  } finally {
    if (empty) {
      await rm(join(directory, JOURNAL), { force: true });
      await rm(join(directory, 'store.lock'), { force: true });
    }
    await store.close();
  }
}

/** Opens that disk; closing it closes the store. */
export async function openSingle(
  directory: string,
  options: { replica?: ReplicaHandle } = {},
): Promise<Disk> {
  const store = await Store.open(directory, { closeWithDisk: true });
  try {
    return await store.openDisk(NAME, options);
  } catch (error) {
    await store.close();
    throw error;
  }
}

import { mkdir, readdir, rm, rmdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { RemoteStore } from '../cow-disk/control.js';
import type { StoreService } from '../cow-disk/control-protocol.js';
import { Store } from '../cow-disk/store.js';
import { StoreServer } from '../disk-server/store-server.js';
import { defaultStore, isStore } from './disk-names.js';
import { note } from './output.js';

/** Another command has the store for moments only; who serves it answers on its socket. */
const ATTEMPTS = 25;
const PAUSE_MS = 200;

/**
 * Does work with a store: through the process that serves it, or by opening it. `create`: a store
 * that is missing is made, if the folder above exists. E_IN_USE, E_NOT_FOUND.
 */
export async function withStore<T>(
  directory: string,
  work: (store: StoreService) => Promise<T>,
  options: { create?: boolean } = {},
): Promise<T> {
  const made = options.create === true && (await makeStore(directory));
  const store = await openStore(directory);
  let result: T;
  try {
    result = await work(store);
  } catch (error) {
    // The first error tells.
    if (made) await unmakeStore(store).catch(() => undefined);
    await store.close().catch(() => undefined);
    if (made) await rmdir(directory).catch(() => undefined); // unless there is something in it
    throw error;
  }
  await store.close();
  return result;
}

async function openStore(directory: string): Promise<StoreService> {
  if (!isStore(directory)) throw noStore(directory);
  for (let attempt = 1; ; attempt++) {
    try {
      return await StoreServer.open(directory, { warn: note });
    } catch (error) {
      if (asSnowflockError(error).code !== 'E_IN_USE') throw error;
      const served = await RemoteStore.connect(directory).catch(() => undefined);
      if (served !== undefined) return served;
      if (attempt >= ATTEMPTS) throw error;
      await pause(PAUSE_MS);
    }
  }
}

/** True if a process answers for the store. */
export async function isServed(directory: string): Promise<boolean> {
  const served = await RemoteStore.connect(directory).catch(() => undefined);
  await served?.close();
  return served !== undefined;
}

export function noStore(directory: string): SnowflockError {
  return new SnowflockError(
    'E_NOT_FOUND',
    `there is no store ${directory}; \`snowflock disk create\` and \`disk import\` make one`,
  );
}

/** A store that was made for a disk that there is not. While it is open nobody else has it. */
async function unmakeStore(store: StoreService): Promise<void> {
  if (!(store instanceof StoreServer) || (await store.list()).disks.length > 0) return;
  for (const name of ['store.journal', 'store.lock']) {
    await rm(join(store.directory, name), { force: true });
  }
}

/** True if it was this call that made it. */
async function makeStore(directory: string): Promise<boolean> {
  if (isStore(directory)) return false;
  try {
    // The default store's own folders need not exist; a typing error must not make a tree.
    if (directory === defaultStore()) await mkdir(dirname(directory), { recursive: true });
    await mkdir(directory, { mode: 0o700 }).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    });
    if ((await readdir(directory)).length > 0 && !isStore(directory)) {
      throw new SnowflockError('E_ARGUMENT', `${directory} is a folder of other files, no store`);
    }
  } catch (cause) {
    if (cause instanceof SnowflockError) throw cause;
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new SnowflockError('E_ARGUMENT', `cannot make the store ${directory}: ${why}`, { cause });
  }
  try {
    await Store.create(directory);
    return true;
  } catch (error) {
    if (asSnowflockError(error).code !== 'E_EXISTS') throw error; // made meanwhile
    return false;
  }
}

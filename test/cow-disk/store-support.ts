import { join } from 'node:path';
import { expect } from 'vitest';
import type { Disk } from '../../src/cow-disk/disk.js';
import { Store, type StoreOptions } from '../../src/cow-disk/store.js';
import type { NbdClient } from '../blktap/nbd-client.js';
import { cleanup, connectTo, contents, PAGE, temporary } from '../blktap/support.js';

export const PAGES = 64;
export const BYTES = PAGES * PAGE;

export async function openStore(directory: string, options: StoreOptions = {}): Promise<Store> {
  const store = await Store.open(directory, options);
  cleanup(() => store.close().catch(() => undefined));
  return store;
}

/** A new store with one empty disk, `web`. */
export async function newStore(
  options: StoreOptions = {},
): Promise<{ folder: string; directory: string; store: Store }> {
  const folder = await temporary();
  const directory = join(folder, 'store');
  await Store.create(directory);
  const store = await openStore(directory, options);
  await store.createDisk({ name: 'web', size_bytes: BYTES });
  return { folder, directory, store };
}

let sockets = 0;

/** Opens and serves a disk; its client. */
export async function serving(
  store: Store,
  name: string,
  folder: string,
): Promise<{ disk: Disk; client: NbdClient }> {
  const disk = await store.openDisk(name);
  const socketPath = join(folder, `nbd${sockets++}`);
  await disk.serve({ socketPath, exportName: 'disk' });
  return { disk, client: await connectTo(socketPath) };
}

/** Writes pages of `value` to a disk that is closed before and after. */
export async function fill(
  store: Store,
  name: string,
  folder: string,
  value: number,
  pages: number[],
): Promise<void> {
  const { disk, client } = await serving(store, name, folder);
  for (const page of pages) await client.write(page * PAGE, Buffer.alloc(PAGE, value));
  await client.close();
  await disk.close();
}

/** The first byte of each page of a generation; pages are expected to be of one value. */
export async function pagesOf(store: Store, disk: string, generation: string): Promise<number[]> {
  const view = await store.openGeneration(disk, generation);
  try {
    return values(contents(view.provider(), PAGES));
  } finally {
    view.close();
  }
}

/** The same of what a disk holds now. */
export async function pagesOfDisk(store: Store, name: string, folder: string): Promise<number[]> {
  const { disk, client } = await serving(store, name, folder);
  const image = values(await client.read(0, BYTES));
  await client.close();
  await disk.close();
  return image;
}

export function values(image: Buffer): number[] {
  return Array.from({ length: image.length / PAGE }, (_, page) => {
    const data = image.subarray(page * PAGE, (page + 1) * PAGE);
    expect(data.equals(Buffer.alloc(PAGE, data[0]))).toBe(true);
    return data[0] as number;
  });
}

/** Pages with these values first, zeros behind. */
export function image(...first: number[]): number[] {
  return [...first, ...Array<number>(PAGES - first.length).fill(0)];
}

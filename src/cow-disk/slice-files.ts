import { randomBytes } from 'node:crypto';
import { type FileHandle, open, readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32c } from '../common/crc32c.js';
import { SnowflockError } from '../common/errors.js';
import { ID } from './entries.js';
import { syncFolder } from './journal.js';

/** The files of slices in a store's folder: their names and headers (docs/disk-format.md, "Maps"). */
export interface SliceFiles {
  data: boolean;
  /** Editions. */
  maps: number[];
  /** Boot ids. */
  lives: string[];
  /** Names of files that were never finished. */
  unfinished: string[];
}

export interface SliceHeader {
  sizeBytes: number;
  id: string;
  /** The slice it was put on as a former spare, and the generation that one became; or ''. */
  on: string;
  generation: string;
  state: 'spare' | 'open' | 'sealed';
  live: boolean;
}

export interface StoreFolder {
  slices: Map<string, SliceFiles>;
  /** Names that are no slice's: the journal, replicas, sockets, what people put there. */
  others: string[];
}

const FILE = /^([0-9a-f]{32})\.(?:(data)|(\d{1,10})\.map|([0-9a-f]{32})\.live|(.*new))$/;

export function newSliceId(): string {
  return randomBytes(16).toString('hex');
}

/** All names of a store's folder, sorted out. E_IO. */
export async function scanFolder(directory: string): Promise<StoreFolder> {
  const found: StoreFolder = { slices: new Map(), others: [] };
  const names = await readdir(directory).catch((error: unknown) => {
    const { code } = error as NodeJS.ErrnoException;
    throw new SnowflockError('E_IO', `cannot read ${directory}: ${code}`, { cause: error });
  });
  for (const name of names) {
    const [, id, data, edition, boot, fresh] = FILE.exec(name) ?? [];
    if (id === undefined || !ID.test(id)) {
      found.others.push(name);
      continue;
    }
    let files = found.slices.get(id);
    if (files === undefined) {
      files = { data: false, maps: [], lives: [], unfinished: [] };
      found.slices.set(id, files);
    }
    if (data !== undefined) files.data = true;
    else if (edition !== undefined) files.maps.push(Number(edition));
    else if (boot !== undefined) files.lives.push(boot);
    else if (fresh !== undefined) files.unfinished.push(name);
  }
  return found;
}

export const mapName = (id: string, edition: number) => `${id}.${edition}.map`;
export const liveName = (id: string, boot: string) => `${id}.${boot}.live`;

/** Files of the copy of a generation of another host: pages, map, source. */
export function replicaFiles(generation: string): [string, string, string] {
  return [`${generation}.replica`, `${generation}.replica.map`, `${generation}.source`];
}

/** Every file of a slice, by name. */
export function fileNames(id: string, files: SliceFiles): string[] {
  return [
    ...(files.data ? [`${id}.data`] : []),
    ...files.maps.map((edition) => mapName(id, edition)),
    ...files.lives.map((boot) => liveName(id, boot)),
    ...files.unfinished,
  ];
}

/** Removes files of a store, durably. Those that are missing are fine. E_IO. */
export async function removeFiles(directory: string, names: string[]): Promise<void> {
  if (names.length === 0) return;
  try {
    for (const name of names) await rm(join(directory, name), { force: true });
    await syncFolder(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new SnowflockError('E_IO', `cannot remove files of ${directory}: ${code}`, {
      cause: error,
    });
  }
}

/** The header of a map file, or why there is none. */
export async function readHeader(path: string): Promise<SliceHeader | { damage: string }> {
  const header = Buffer.alloc(168);
  let file: FileHandle | undefined;
  try {
    file = await open(path, 'r');
    const { bytesRead } = await file.read(header, 0, 168, 0);
    if (bytesRead < 168) return { damage: 'is cut short' };
  } catch (error) {
    return { damage: `cannot be read: ${(error as NodeJS.ErrnoException).code}` };
  } finally {
    await file?.close();
  }
  if (header.toString('latin1', 0, 8) !== 'SFSLICE2') return { damage: 'is no map of a slice' };
  if (crc32c(header.subarray(0, 164)) !== header.readUInt32LE(164)) {
    return { damage: 'fails the check of its header' };
  }
  const state = (['spare', 'open', 'sealed'] as const)[header.readUInt32LE(152)];
  if (state === undefined || header.readUInt32LE(8) !== 2 || header.readUInt32LE(12) !== 4096) {
    return { damage: 'has a header of another version' };
  }
  const text = (from: number, to: number) =>
    header.toString('latin1', from, to).replace(/\0+$/, '');
  return {
    sizeBytes: Number(header.readBigUInt64LE(16)),
    id: text(24, 56),
    on: text(56, 88),
    generation: text(88, 152),
    state,
    live: header.readUInt32LE(156) === 1,
  };
}

/** The kernel's boot id, as in the names of live maps. */
export async function bootId(): Promise<string> {
  const text = await readFile('/proc/sys/kernel/random/boot_id', 'utf8');
  return text.trim().replaceAll('-', '');
}

import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { addon, native } from './native.js';
import {
  bootId,
  fileNames,
  liveName,
  mapName,
  readHeader,
  removeFiles,
  type SliceFiles,
  scanFolder,
} from './slice-files.js';
import type { Tree } from './tree.js';

/**
 * Putting right what a death left half done, when a store is opened. First everything is looked at;
 * only if all that the journal names is there, and all else provably holds nothing, is anything
 * removed. So a journal that lost its last line to damage never makes data go: the slice that it
 * does not name any more holds something, and the store says E_CORRUPT.
 */

/** Every named slice has its files; the names of files that may go. E_CORRUPT, E_IO. */
export async function checkNamedFiles(directory: string, tree: Tree): Promise<string[]> {
  const { slices: found, others } = await scanFolder(directory);
  const go = others.filter((name) => /^store\.journal(\.[0-9a-f]{16})?\.new$/.test(name));
  const named = new Map([...tree.slices].map(([id, { map }]) => [id, map]));
  for (const { spare } of tree.disks.values()) if (spare !== null) named.set(spare, 0);
  for (const [id, map] of named) {
    const files = found.get(id);
    const missing =
      files?.data !== true ? `${id}.data` : files.maps.includes(map) ? '' : mapName(id, map);
    if (missing !== '') {
      throw new SnowflockError('E_CORRUPT', `${join(directory, missing)} is missing`);
    }
  }
  for (const [id, files] of found) {
    const map = named.get(id);
    if (map !== undefined) {
      const stale = files.maps.filter((edition) => edition !== map);
      go.push(...stale.map((edition) => mapName(id, edition)), ...files.unfinished);
    } else if (!tree.removed.has(id)) {
      const held = await strayHolds(directory, id, files);
      if (held !== undefined) {
        throw new SnowflockError(
          'E_CORRUPT',
          `${join(directory, `${id}.data`)}: the journal does not name this slice, but it ${held}`,
        );
      }
      go.push(...fileNames(id, files));
    }
  }
  return go;
}

export async function removeStrays(directory: string, names: string[]): Promise<void> {
  await removeFiles(directory, names);
}

/**
 * What a slice that no entry names holds, or undefined if provably nothing: it was never more than a
 * spare, a new disk's empty top, or half made. E_IO.
 */
export async function strayHolds(
  directory: string,
  id: string,
  files: SliceFiles,
): Promise<string | undefined> {
  const maps = [
    ...files.maps.map((edition) => mapName(id, edition)),
    ...files.lives.map((boot) => liveName(id, boot)),
  ];
  let sizeBytes = 4096;
  for (const name of maps) {
    const header = await readHeader(join(directory, name));
    if ('damage' in header) continue;
    if (header.state === 'sealed') return 'is sealed';
    if (header.generation !== '') return 'was forked';
    sizeBytes = header.sizeBytes;
  }
  if (files.maps.some((edition) => edition !== 0)) return 'was merged';
  if (!files.data) return undefined;
  const found = await native(() => addon().checkSlice({ directory, id, map: 0, sizeBytes }));
  if (found.pages > 0 || found.zeroPages > 0 || found.dataBytes > 0) return 'holds pages';
  return undefined;
}

/** Disks whose spare became the top without the journal telling of it. */
export async function unrecovered(directory: string, tree: Tree): Promise<string[]> {
  const boot = await bootId();
  const names: string[] = [];
  for (const [name, { spare }] of tree.disks) {
    if (spare === null) continue;
    for (const file of [liveName(spare, boot), mapName(spare, 0)]) {
      const header = await readHeader(join(directory, file));
      if ('damage' in header || header.state === 'spare') continue; // damage: when it is opened
      names.push(name);
      break;
    }
  }
  return names;
}

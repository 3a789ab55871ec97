import { SnowflockError } from '../common/errors.js';
import type { Disk } from './disk.js';
import { diskOf, publicBase, sliceOf } from './parts.js';
import type { DiskEntry, GenerationEntry } from './store-api.js';
import type { Tree } from './tree.js';

/** The newest generation at or below `slice`, or null. */
export function generationBelow(tree: Tree, slice: string | null): string | null {
  if (slice === null) return null;
  for (const [id] of tree.down(slice)) {
    const generation = tree.generationAt(id);
    if (generation !== undefined) return generation;
  }
  return null;
}

/** E_NOT_FOUND. */
export async function diskEntry(
  tree: Tree,
  name: string,
  opened: Promise<Disk> | undefined,
): Promise<DiskEntry> {
  const disk = await opened?.catch(() => undefined); // its opener has the error
  const { top, created_ms } = diskOf(tree, name);
  let depth = 0;
  for (const _ of tree.down(top)) depth++;
  return {
    name,
    size_bytes: sliceOf(tree, top).size_bytes,
    created_ms,
    parent: generationBelow(tree, top),
    base: publicBase(tree.base(top)),
    depth,
    open: disk !== undefined,
    exports: disk === undefined ? [] : disk.exports.map((each) => ({ ...each })),
    ...errorsOf(disk),
  };
}

/** What an open disk's clients met. Nothing of one that is being closed. */
export function errorsOf(disk: Disk | undefined): Pick<DiskEntry, 'errors'> {
  if (disk === undefined || disk.closing) return {};
  const { ioErrors, noSpaceErrors, lastError } = disk.stats();
  if (ioErrors + noSpaceErrors === 0 && lastError === null) return {};
  return { errors: { io: ioErrors, no_space: noSpaceErrors, last: lastError } };
}

/** E_NOT_FOUND. */
export function generationEntry(tree: Tree, id: string): GenerationEntry {
  const entry = tree.generations.get(id);
  if (entry === undefined) {
    throw new SnowflockError('E_NOT_FOUND', `the store has no generation ${id}`);
  }
  const { disk, name, created_ms, slice } = entry;
  const { size_bytes, parent } = sliceOf(tree, slice);
  return { id, name, disk, created_ms, size_bytes, parent: generationBelow(tree, parent) };
}

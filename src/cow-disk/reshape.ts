import { SnowflockError } from '../common/errors.js';
import type { Transaction } from './entries.js';
import { addon, native } from './native.js';
import { diskOf, type StoreParts, sliceOf } from './parts.js';
import type { Tree } from './tree.js';

/** Operations that change which slice is whose, as one transaction each: no page is moved. */

/** Takes a disk away, with its top, its spare and the names of its generations. */
export function removedDisk(tree: Tree, name: string): Transaction {
  const { top, spare } = diskOf(tree, name);
  const generations = [...tree.generationsOf(name)].map((id) => [id, null] as const);
  return {
    slices: { [top]: null },
    generations: Object.fromEntries(generations),
    disks: { [name]: null },
    removed: { [top]: true, ...(spare === null ? {} : { [spare]: true }) },
  };
}

/** Gives a disk another name, and with it its generations. */
export function renamedDisk(tree: Tree, from: string, to: string): Transaction {
  const disk = diskOf(tree, from);
  const generations = [...tree.generationsOf(from)].map((id) => {
    const entry = tree.generations.get(id);
    return [id, entry === undefined ? null : { ...entry, disk: to }] as const;
  });
  return {
    generations: Object.fromEntries(generations),
    disks: { [from]: null, [to]: disk },
  };
}

/** Puts a disk on a generation's slice, with the new empty slice `top`. */
export function rolledBack(tree: Tree, name: string, onto: string, top: string): Transaction {
  const disk = diskOf(tree, name);
  const { size_bytes } = sliceOf(tree, onto);
  return {
    slices: { [disk.top]: null, [top]: { parent: onto, size_bytes, map: 0 } },
    disks: { [name]: { ...disk, top } },
    removed: { [disk.top]: true },
  };
}

/** The disk a clone was made from, and the newest slice that both lie on. E_STATE. */
function originOf(tree: Tree, clone: string): { origin: string; common: string } {
  for (const [id] of tree.down(diskOf(tree, clone).top)) {
    const generation = tree.generations.get(tree.generationAt(id) ?? '');
    if (generation === undefined || generation.disk === clone) continue;
    const origin = generation.disk;
    const below = new Set([...tree.down(diskOf(tree, origin).top)].map(([each]) => each));
    for (const [common] of tree.down(diskOf(tree, clone).top)) {
      if (below.has(common)) return { origin, common };
    }
    throw new SnowflockError(
      'E_STATE',
      `disk ${origin} does not lie on what ${clone} was made from any more`,
    );
  }
  throw new SnowflockError('E_STATE', `disk ${clone} lies on no generation of another disk`);
}

/** The slices of `disk` above `common`, the top first. */
function above(tree: Tree, disk: string, common: string): string[] {
  const ids: string[] = [];
  for (const [id] of tree.down(diskOf(tree, disk).top)) {
    if (id === common) break;
    ids.push(id);
  }
  return ids;
}

/**
 * The clone's top becomes its origin's; the clone goes, with the names of its generations. What the
 * origin had above the common slice goes too, but for its generations. Both must be closed
 * (`checkUnused`). E_STATE if the origin was written since, unless `discard`.
 */
export async function commitClone(
  { directory, ledger }: StoreParts,
  clone: string,
  discard: boolean,
  checkUnused: (disk: string) => void,
): Promise<string> {
  checkUnused(clone);
  const { origin, common } = originOf(ledger.tree, clone);
  checkUnused(origin);
  const looked = above(ledger.tree, origin, common);
  for (const id of discard ? [] : looked) {
    const { map, size_bytes } = sliceOf(ledger.tree, id);
    const found = await native(() =>
      addon().checkSlice({ directory, id, map, sizeBytes: size_bytes }),
    );
    const [error] = found.errors;
    if (error !== undefined) throw new SnowflockError('E_CORRUPT', error);
    if (found.pages + found.zeroPages > 0) {
      throw new SnowflockError(
        'E_STATE',
        `disk ${origin} was written since ${clone} was made from it; discard that, or keep both`,
      );
    }
  }
  await ledger.commit((tree) => {
    checkUnused(clone);
    checkUnused(origin);
    const now = originOf(tree, clone);
    const same = above(tree, origin, now.common).every((id) => looked.includes(id));
    if (now.origin !== origin || (!discard && !same)) {
      throw new SnowflockError('E_STATE', `disk ${origin} changed while ${clone} was committed`);
    }
    const [from, to] = [diskOf(tree, clone), diskOf(tree, origin)];
    const { generations = {} } = removedDisk(tree, clone);
    return {
      slices: { [to.top]: null },
      generations,
      disks: { [origin]: { ...to, top: from.top }, [clone]: null },
      removed: { [to.top]: true, ...(from.spare === null ? {} : { [from.spare]: true }) },
    };
  });
  return origin;
}

import type { DiskEntry, GenerationEntry, StoreListing } from './store-api.js';

/**
 * The generation a disk was cloned from: the first below its top that was sealed from another disk.
 * Null for a disk made on a base.
 */
export function originOf(listing: StoreListing, disk: DiskEntry): GenerationEntry | null {
  return origin(new Map(listing.generations.map((one) => [one.id, one])), disk);
}

function origin(byId: Map<string, GenerationEntry>, disk: DiskEntry): GenerationEntry | null {
  let at = disk.parent === null ? undefined : byId.get(disk.parent);
  while (at !== undefined && at.disk === disk.name) {
    at = at.parent === null ? undefined : byId.get(at.parent);
  }
  return at ?? null;
}

/** A disk or a generation as people see it, with what was made from it. */
export type LineageNode =
  | { kind: 'disk'; disk: DiskEntry; children: LineageNode[] }
  | { kind: 'generation'; generation: GenerationEntry; children: LineageNode[] };

/**
 * Disks at the root, their generations below them (oldest first), clones below the generation they
 * were made from. Generations of disks that are gone come last, at the root.
 */
export function lineage(listing: StoreListing): LineageNode[] {
  const byId = new Map(listing.generations.map((one) => [one.id, one]));
  const names = new Set(listing.disks.map((disk) => disk.name));
  const byDisk = group([...byId.values()], (one) => (names.has(one.disk) ? one.disk : null));
  const clones = group(listing.disks, (disk) => origin(byId, disk)?.id ?? null);
  const placed = new Set<string>();

  const generationNode = (generation: GenerationEntry): LineageNode => ({
    kind: 'generation',
    generation,
    children: (clones.get(generation.id) ?? []).flatMap(diskNode),
  });
  const diskNode = (disk: DiskEntry): LineageNode[] => {
    if (placed.has(disk.name)) return [];
    placed.add(disk.name);
    const own = [...(byDisk.get(disk.name) ?? [])].sort((a, b) => a.created_ms - b.created_ms);
    return [{ kind: 'disk', disk, children: own.map(generationNode) }];
  };

  const roots = (clones.get(null) ?? []).flatMap(diskNode);
  const orphans = (byDisk.get(null) ?? []).map(generationNode);
  // Commits and rollbacks can leave two disks on each other's generations: none may be lost.
  const rest = listing.disks.flatMap(diskNode);
  return [...roots, ...rest, ...orphans];
}

function group<T, K>(items: T[], keyOf: (item: T) => K): Map<K, T[]> {
  const groups = new Map<K, T[]>();
  for (const item of items) {
    const key = keyOf(item);
    const found = groups.get(key);
    if (found === undefined) groups.set(key, [item]);
    else found.push(item);
  }
  return groups;
}

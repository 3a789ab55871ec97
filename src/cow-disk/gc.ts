import type { SliceEntry, Transaction } from './entries.js';
import type { Tree } from './tree.js';

/**
 * What there is to clean up: a pure function of the tree (docs/disk-format.md, "Clean-up").
 *
 * A slice is *wanted* if a generation names it or it is a disk's top. One that is not wanted is
 * removed if nothing lies on it, merged with its neighbours if one slice lies on it, punched if
 * several do. A plan counts on its earlier steps (a removed slice leaves its parent with fewer
 * children), and each step is checked again against the tree before it is done. So steps are done in
 * order, and any of them may be left out.
 */
export type Step =
  /** Files of slices that the journal lists as removed. */
  | { kind: 'files'; slices: string[] }
  /** Leaves first: each has nothing on it once those before it are gone. */
  | { kind: 'remove'; slices: string[] }
  /** Oldest first; all but the last have exactly the next one on them, and nobody wants them. */
  | { kind: 'merge'; slices: string[] }
  | { kind: 'punch'; slice: string; children: string[] };

/** Slices in one step: what a transaction and a merge take at once. */
export const MAX_RUN = 1024;

export function stepKey(step: Step): string {
  return `${step.kind} ${'slice' in step ? step.slice : step.slices[0]}`;
}

/** In the order in which they are to be done. */
export function plan(tree: Tree): Step[] {
  const steps: Step[] = [];
  const removed = [...tree.removed];
  for (let at = 0; at < removed.length; at += MAX_RUN) {
    steps.push({ kind: 'files', slices: removed.slice(at, at + MAX_RUN) });
  }
  const leaves = unwantedLeaves(tree);
  for (let at = 0; at < leaves.length; at += MAX_RUN) {
    steps.push({ kind: 'remove', slices: leaves.slice(at, at + MAX_RUN) });
  }
  const gone = new Set(leaves);
  const onlyChild = (id: string) => onlyChildOf(tree, id, gone);
  for (const [id, { parent }] of tree.slices) {
    if (gone.has(id) || wanted(tree, id)) continue;
    const child = onlyChild(id);
    if (child === undefined) {
      const children = [...tree.children(id)].filter((each) => !gone.has(each));
      if (children.length > 1) steps.push({ kind: 'punch', slice: id, children });
      continue;
    }
    // Only from the lowest of a run on.
    const below = parent !== null && !wanted(tree, parent) && onlyChild(parent) === id;
    if (!below) steps.push(...runFrom(tree, id, onlyChild));
  }
  return steps;
}

export function wanted(tree: Tree, id: string): boolean {
  return tree.generationAt(id) !== undefined || tree.diskAt(id) !== undefined;
}

function onlyChildOf(tree: Tree, id: string, gone: ReadonlySet<string>): string | undefined {
  let only: string | undefined;
  for (const child of tree.children(id)) {
    if (gone.has(child)) continue;
    if (only !== undefined) return undefined;
    only = child;
  }
  return only;
}

function unwantedLeaves(tree: Tree): string[] {
  const found: string[] = [];
  const removedOn = new Map<string, number>();
  const isLeaf = (id: string) => tree.children(id).size === (removedOn.get(id) ?? 0);
  for (const start of tree.slices.keys()) {
    if (tree.children(start).size > 0) continue;
    for (let id: string | null = start; id !== null && isLeaf(id) && !wanted(tree, id); ) {
      found.push(id);
      id = tree.slices.get(id)?.parent ?? null;
      if (id !== null) removedOn.set(id, (removedOn.get(id) ?? 0) + 1);
    }
  }
  return found;
}

function runFrom(
  tree: Tree,
  lowest: string,
  onlyChild: (id: string) => string | undefined,
): Step[] {
  const run = [lowest];
  for (let id = lowest; !wanted(tree, id); ) {
    const child = onlyChild(id);
    if (child === undefined || tree.diskAt(child) !== undefined) break; // a top is not sealed
    run.push(child);
    id = child;
  }
  const steps: Step[] = [];
  for (let at = 0; at < run.length; at += MAX_RUN) {
    const slices = run.slice(at, at + MAX_RUN);
    if (slices.length > 1) steps.push({ kind: 'merge', slices });
  }
  return steps;
}

/** True while a merge of these slices, oldest first, would be right. */
export function mergeable(tree: Tree, slices: string[]): boolean {
  return (
    slices.length > 1 &&
    slices.every((id, i) => {
      if (!tree.slices.has(id) || tree.diskAt(id) !== undefined) return false;
      const next = slices[i + 1];
      if (next === undefined) return true;
      const children = tree.children(id);
      return tree.generationAt(id) === undefined && children.size === 1 && children.has(next);
    })
  );
}

/** The transaction after a merge: `keep` takes the place of all of them, with edition `map`. */
export function merged(tree: Tree, slices: string[], keep: string, map: number): Transaction {
  const [lowest, highest] = [slices[0], slices.at(-1)];
  const low = tree.slices.get(lowest ?? '');
  const top = tree.slices.get(highest ?? '');
  if (low === undefined || top === undefined || highest === undefined || !slices.includes(keep)) {
    throw new Error(`slices ${slices} were merged into ${keep}, which is none of them`);
  }
  const entries: Record<string, SliceEntry | null> = {};
  const removed: Record<string, true> = {};
  const generations: NonNullable<Transaction['generations']> = {};
  for (const id of slices) {
    if (id === keep) continue;
    entries[id] = null;
    removed[id] = true;
  }
  entries[keep] = { ...low, map };
  if (keep !== highest) {
    for (const child of tree.children(highest)) {
      const entry = tree.slices.get(child);
      if (entry !== undefined) entries[child] = { ...entry, parent: keep };
    }
    const id = tree.generationAt(highest);
    const generation = id === undefined ? undefined : tree.generations.get(id);
    if (id !== undefined && generation !== undefined) {
      generations[id] = { ...generation, slice: keep };
    }
  }
  return { slices: entries, generations, removed };
}

/** The transaction that removes those of `slices` (leaves first) that are unwanted leaves now. */
export function removal(
  tree: Tree,
  slices: string[],
  inUse: (id: string) => boolean,
): { transaction: Transaction | undefined; ids: string[]; left: string[] } {
  const ids: string[] = [];
  const left: string[] = [];
  const gone = new Set<string>();
  for (const id of slices) {
    if (!tree.slices.has(id) || wanted(tree, id)) continue;
    if ([...tree.children(id)].some((child) => !gone.has(child))) continue;
    if (inUse(id)) {
      left.push(id);
      continue;
    }
    gone.add(id);
    ids.push(id);
  }
  if (ids.length === 0) return { transaction: undefined, ids, left };
  const transaction = {
    slices: Object.fromEntries(ids.map((id) => [id, null])),
    removed: Object.fromEntries(ids.map((id) => [id, true] as const)),
  };
  return { transaction, ids, left };
}

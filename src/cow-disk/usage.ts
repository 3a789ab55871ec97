import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { plan, wanted } from './gc.js';
import { diskOf, sliceOf } from './parts.js';
import { fileNames, replicaFiles, scanFolder } from './slice-files.js';
import type { StoreUsage } from './store-api.js';
import type { Tree } from './tree.js';

/**
 * Who takes how much space, by slices, in bytes allocated on the file system.
 *
 * A slice is *used by* every disk and generation at or above it. A disk owns what only its top and
 * its own generations use: what removing the disk gives back. A generation owns what nobody else
 * uses: with anything on its slice that is nothing. All else below is shared. Pages of a shared
 * slice that everybody above has overwritten still count as shared: they go when it is merged.
 */
export async function storeUsage(directory: string, tree: Tree): Promise<StoreUsage> {
  const bytes = await allocated(directory, tree);
  const of = (id: string) => bytes.get(id) ?? 0;
  const order = upperFirst(tree);
  const byDisk = soleUsers(tree, order, (id) => {
    const generation = tree.generations.get(tree.generationAt(id) ?? '');
    return tree.diskAt(id) ?? generation?.disk;
  });
  const byName = soleUsers(tree, order, (id) => tree.diskAt(id) ?? tree.generationAt(id));

  const waiting = waitingSlices(tree);
  const own = new Map<string, number>();
  let [total_bytes, unreferenced_bytes] = [0, 0];
  for (const id of order) {
    total_bytes += of(id);
    if (waiting.has(id)) unreferenced_bytes += of(id);
    const user = byDisk.get(id);
    if (typeof user === 'string') own.set(user, (own.get(user) ?? 0) + of(id));
  }
  const below = new Map<string, number>(); // bytes of a slice and all below it
  for (const id of order.toReversed()) {
    const { parent } = sliceOf(tree, id);
    below.set(id, of(id) + (parent === null ? 0 : (below.get(parent) ?? 0)));
  }

  const disks: StoreUsage['disks'] = [];
  for (const [name, { top, spare }] of tree.disks) {
    const spareBytes = spare === null ? 0 : of(spare);
    total_bytes += spareBytes;
    disks.push({
      name,
      virtual_bytes: sliceOf(tree, top).size_bytes,
      own_bytes: (own.get(name) ?? 0) + spareBytes,
      shared_bytes: sharedBytes(tree, name, byDisk, of),
    });
  }
  const generations: StoreUsage['generations'] = [];
  for (const [id, { slice, disk, name }] of tree.generations) {
    let at: string | null = slice;
    let own_bytes = 0;
    while (at !== null && byName.get(at) === id) {
      own_bytes += of(at);
      at = sliceOf(tree, at).parent;
    }
    generations.push({
      id,
      disk,
      name,
      virtual_bytes: sliceOf(tree, slice).size_bytes,
      own_bytes,
      shared_bytes: at === null ? 0 : (below.get(at) ?? 0),
    });
  }
  const replicas = await replicaUsage(directory, tree);
  for (const { own_bytes } of replicas) total_bytes += own_bytes;
  return { disks, generations, replicas, total_bytes, unreferenced_bytes };
}

/**
 * Slices that clean-up is going to remove or to merge away. One that nobody wants but a top lies on is
 * none of them: it holds what the disk reads, and stays until the top is sealed.
 */
function waitingSlices(tree: Tree): Set<string> {
  const found = new Set<string>();
  for (const step of plan(tree)) {
    if (step.kind !== 'remove' && step.kind !== 'merge') continue;
    for (const id of step.slices) if (!wanted(tree, id)) found.add(id);
  }
  return found;
}

async function replicaUsage(directory: string, tree: Tree): Promise<StoreUsage['replicas']> {
  const sizes = new Map<string, number>();
  for (const { base, size_bytes } of tree.slices.values()) {
    if (base?.kind === 'replica') sizes.set(base.generation, size_bytes);
  }
  const replicas: StoreUsage['replicas'] = [];
  for (const [generation, virtual_bytes] of sizes) {
    let own_bytes = 0;
    for (const name of replicaFiles(generation)) {
      own_bytes += await allocatedBytes(join(directory, name));
    }
    replicas.push({ generation, virtual_bytes, own_bytes });
  }
  return replicas;
}

/** Of a file; 0 if it is not there (merged, or made durable, meanwhile). E_IO. */
export async function allocatedBytes(path: string): Promise<number> {
  try {
    return 512 * (await stat(path)).blocks;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return 0;
    throw new SnowflockError('E_IO', `cannot look at ${path}: ${code}`, { cause: error });
  }
}

/** Bytes that a slice's files take, for all slices and spares. */
async function allocated(directory: string, tree: Tree): Promise<Map<string, number>> {
  const { slices } = await scanFolder(directory);
  const bytes = new Map<string, number>();
  const spares = [...tree.disks.values()].flatMap(({ spare }) => (spare === null ? [] : [spare]));
  for (const id of [...tree.slices.keys(), ...spares]) {
    const files = slices.get(id);
    let sum = 0;
    for (const name of files === undefined ? [] : fileNames(id, files)) {
      sum += await allocatedBytes(join(directory, name));
    }
    bytes.set(id, sum);
  }
  return bytes;
}

/** All slices, each before the one below it. */
function upperFirst(tree: Tree): string[] {
  const lowerFirst: string[] = [];
  for (const [id, { parent }] of tree.slices) if (parent === null) lowerFirst.push(id);
  for (let at = 0; at < lowerFirst.length; at++) {
    for (const child of tree.children(lowerFirst[at] as string)) lowerFirst.push(child);
  }
  return lowerFirst.reverse();
}

const MANY = Symbol('many');

/** Of each slice its only user, MANY, or nothing. */
function soleUsers(
  tree: Tree,
  order: string[],
  userAt: (id: string) => string | undefined,
): Map<string, string | typeof MANY> {
  const users = new Map<string, string | typeof MANY>();
  const add = (id: string, user: string | typeof MANY | undefined) => {
    if (user === undefined) return;
    const known = users.get(id);
    users.set(id, known === undefined || known === user ? user : MANY);
  };
  for (const id of order) {
    add(id, userAt(id));
    const { parent } = sliceOf(tree, id);
    if (parent !== null) add(parent, users.get(id));
  }
  return users;
}

function sharedBytes(
  tree: Tree,
  disk: string,
  users: Map<string, string | typeof MANY>,
  of: (id: string) => number,
): number {
  const seen = new Set<string>();
  let shared = 0;
  const names = [...tree.generationsOf(disk)].map((id) => tree.generations.get(id)?.slice ?? '');
  for (const from of [diskOf(tree, disk).top, ...names]) {
    for (const [id] of tree.down(from)) {
      if (seen.has(id)) break;
      seen.add(id);
      if (users.get(id) === MANY) shared += of(id);
    }
  }
  return shared;
}

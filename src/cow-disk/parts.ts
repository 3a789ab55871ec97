import { SnowflockError } from '../common/errors.js';
import type { BaseEntry } from './entries.js';
import type { Gate } from './gate.js';
import type { Ledger } from './ledger.js';
import type { NativeChain, NativeStore } from './native.js';
import type { DiskBase } from './store-api.js';
import type { Tree } from './tree.js';

/** The `handle` of a Replica object (medium `disk`). */
export type ReplicaHandle = unknown;

/** What an open store shares with its disks and with those who clean up. */
export interface StoreParts {
  readonly directory: string;
  readonly ledger: Ledger;
  readonly native: NativeStore;
  /** Shared: chains are read and opened. Alone: slices go away. */
  readonly gate: Gate;
  /** The tree changed, or something was let go: there may be something to clean up. */
  changed(): void;
}

/** The slices from the oldest up to `slice`, and the base, for the native store. */
export function nativeChain(tree: Tree, slice: string): NativeChain {
  const slices = [...tree.down(slice)].map(([id, { map }]) => {
    return { id, map, shared: tree.children(id).size > 1 };
  });
  slices.reverse();
  return { sizeBytes: sliceOf(tree, slice).size_bytes, slices, base: nativeBase(tree.base(slice)) };
}

export function sliceOf(tree: Tree, id: string) {
  const slice = tree.slices.get(id);
  if (slice === undefined) throw new SnowflockError('E_INTERNAL', `slice ${id} is not in the tree`);
  return slice;
}

export function diskOf(tree: Tree, name: string) {
  const disk = tree.disks.get(name);
  if (disk === undefined) throw new SnowflockError('E_NOT_FOUND', `the store has no disk ${name}`);
  return disk;
}

function nativeBase(base: BaseEntry): NativeChain['base'] {
  if (base.kind === 'image') {
    return { kind: 'image', path: base.path, imageBytes: base.image_bytes };
  }
  return base;
}

export function publicBase(base: BaseEntry): DiskBase {
  return base.kind === 'image' ? { kind: 'image', path: base.path } : base;
}

import { loadAddon } from '../common/native.js';

/** Opaque C++ objects that components hand to each other through JavaScript. */
export type ReplicaHandle = { readonly __replica: unique symbol };
export type ProviderHandle = { readonly __provider: unique symbol };

/**
 * A host's sparse copy of one generation: `path` and a presence bitmap in `path.map`. Opening an
 * existing one continues where the last process stopped. The last holder of a handle closes it.
 * Errors: E_REPLICA_MISMATCH (other generation, size or medium), E_IN_USE, E_IO, E_USERFAULTFD.
 */
export interface Replica {
  readonly handle: ReplicaHandle;
  readonly provider: ProviderHandle;
  /** Marks pages as known zero: they are never fetched. */
  fillZero(first: number, count: number): void;
  fill(page: number, data: Buffer): void;
  /** One page, or null if it is absent. For tests and tools. */
  read(page: number): Buffer | null;
  prefetch(page: number): void;
  /** Ends all waits for absent pages, now and later, with an error. */
  fail(code: string, message: string): void;
  stats(): { pages: number; present: number; zero: number; waiting: number };
  close(): void;
}

interface Addon {
  Replica: new (
    path: string,
    generation: string,
    pages: number,
    medium: 'memory' | 'disk',
  ) => Replica;
}

export function openReplica(
  path: string,
  generation: string,
  pages: number,
  medium: 'memory' | 'disk',
): Replica {
  return new (loadAddon<Addon>('dataplane').Replica)(path, generation, pages, medium);
}

import { asSnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';

/** Opaque C++ objects that components hand to each other through JavaScript. */
export type ReplicaHandle = { readonly __replica: unique symbol };
export type ProviderHandle = { readonly __provider: unique symbol };

/**
 * A host's sparse copy of one generation: `path` and a presence bitmap in `path.map`. Opening an
 * existing one continues where the last process stopped; after a power cut one of medium `disk` has
 * what the last `sync()` wrote. The last holder of a handle closes it.
 * Errors: E_REPLICA_MISMATCH (other generation, size or medium), E_IN_USE, E_IO, E_CORRUPT,
 * E_USERFAULTFD.
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
  /** While true a prefetch leaves nothing out: somebody may read who is no disk over it (yet). */
  needAll(all: boolean): void;
  /**
   * The absent pages, or those of them that are needed (see `needAll`), as [first, count, ...]; null
   * if they are more than `maxRuns` runs.
   */
  absentRuns(neededOnly: boolean, maxRuns: number): number[] | null;
  /** `complete`: no page is absent, no source is needed any more. */
  stats(): { pages: number; present: number; zero: number; waiting: number; complete: boolean };
  /** Called once when it is complete, also if it is already. One at a time. */
  onComplete(done: () => void): void;
  /** Makes durable what is here now. Errors: E_IO, E_NO_SPACE. */
  sync(): Promise<void>;
  close(): void;
}

/** What a prefetch has done; counts are since its start. */
export interface PrefetchProgress {
  state: 'idle' | 'running' | 'paused' | 'done' | 'failed' | 'closed';
  /** Pages of the replica. */
  total: number;
  /** Of those, here: data or known zeros, however they came. */
  present: number;
  /** Pages left out in the last pass: every disk over the replica has its own by now. */
  skipped: number;
  /** 0: no limit. */
  rateBytesPerS: number;
  /** `askedBytes` is never more than `rateBytesPerS` times the time since the start, plus this. */
  burstBytes: number;
  /** Bytes of pages asked for, without those that turned out to be zeros. */
  askedBytes: number;
  pages: number;
  failedPages: number;
  /** Turns given up because somebody waited for a page. */
  yields: number;
  underWay: number;
  elapsedMs: number;
  /** Lately. */
  bytesPerS: number;
  /** Why it failed. */
  error: Error | null;
}

/** Fills a replica in the background, see native/pagestore/prefetcher.h. */
export interface Prefetcher {
  /** Starts over, or sets the rate of one that runs; bytes a second, 0: no limit. */
  start(rateBytesPerS: number): void;
  pause(): void;
  resume(): void;
  progress(): PrefetchProgress;
  /** At once; the pages asked for last may still come. */
  close(): void;
}

interface Addon {
  Replica: new (
    path: string,
    generation: string,
    pages: number,
    medium: 'memory' | 'disk',
  ) => Replica;
  Prefetcher: new (replica: ReplicaHandle, onEnd: () => void) => Prefetcher;
}

export function openReplica(
  path: string,
  generation: string,
  pages: number,
  medium: 'memory' | 'disk',
): Replica {
  try {
    return new (loadAddon<Addon>('dataplane').Replica)(path, generation, pages, medium);
  } catch (error) {
    throw asSnowflockError(error);
  }
}

/** A prefetcher, idle. `onEnd` is called each time it has become `done` or `failed`. */
export function newPrefetcher(replica: Replica, onEnd: () => void): Prefetcher {
  return new (loadAddon<Addon>('dataplane').Prefetcher)(replica.handle, onEnd);
}

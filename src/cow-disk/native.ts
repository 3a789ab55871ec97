import { asSnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';
import type { ListenOptions, NbdServerStats } from './nbd-server.js';

/**
 * What src/cow-disk uses of the data plane's addon (native/blktap). It knows slices by id; which
 * slices there are, and what lies below what, is told to it (ledger.ts).
 */
export interface BlktapAddon {
  /** Takes DIRECTORY/store.lock. E_IN_USE, E_IO. */
  openStore(directory: string): Promise<NativeStore>;
  /** Files of a new slice, durable: map edition 0, state spare or open. */
  createSlice(directory: string, id: string, sizeBytes: number, spare: boolean): Promise<void>;
  /** For checks: reads all of a slice's metadata, changes nothing. */
  checkSlice(p: SliceFileSpec): Promise<SliceCheck>;
  /** Punches out what leakedBytes counts, of a sealed slice nobody has open. Bytes given back. */
  trimSlice(p: SliceFileSpec): Promise<number>;
  readPage(provider: unknown, page: number): Buffer | null;
  startNbdServer(options: ListenOptions): NativeNbdServer;
}

export interface SliceFileSpec {
  directory: string;
  id: string;
  /** Edition of its durable map. */
  map: number;
  sizeBytes: number;
}

export interface SliceCheck {
  /** null: no readable header. */
  state: 'spare' | 'open' | 'sealed' | null;
  pages: number;
  zeroPages: number;
  /** Allocated in the data file. */
  dataBytes: number;
  /** Allocated there under pages that the map has not as data. */
  leakedBytes: number;
  /** Pages that are data in the map and a hole in the data file: they read as zeros. */
  holes: number;
  errors: string[];
}

/** Oldest first. Of a disk the last is the top, of a view the generation's slice. */
export interface NativeChain {
  sizeBytes: number;
  /** `shared`: several lie on it, so its index is kept while it is used. */
  slices: (SliceRef & { shared: boolean })[];
  base: { kind: string; path?: string; imageBytes?: number; generation?: string };
}

export interface SliceRef {
  id: string;
  map: number;
}

export interface NativeStore {
  /** `spare`: id or ''. If it turns out to be the top already, `recovered()` names the generation. */
  openDisk(chain: NativeChain & { spare: string }, replica?: unknown): Promise<NativeDisk>;
  /** The image of a sealed or settling slice. At once if one is alive (also just after a fork). */
  openView(chain: NativeChain, replica?: unknown): Promise<NativeView>;
  /** True while a view of this slice is alive, or a disk has it as its top. */
  inUse(id: string): boolean;
  /** Merges a run of sealed slices, oldest first, each the only one on the one before. E_IN_USE. */
  mergeBegin(p: { slices: SliceRef[]; sizeBytes: number }): Promise<NativeMerge>;
  /** Punches pages of `slice` that every one of `children` (sealed or tops) covers. E_IN_USE. */
  punchBegin(p: { slice: SliceRef; children: SliceRef[]; sizeBytes: number }): Promise<NativeStep>;
  /** Removes the files of those slices that no disk or view uses any more; which they were. E_IO. */
  removeSlices(ids: string[]): Promise<string[]>;
  close(): Promise<void>;
}

export interface NativeStep {
  totalBytes: number;
  /** Does about `maxBytes` of work on a pool thread. */
  step(maxBytes: number): Promise<{ bytes: number; done: boolean }>;
  /** Gives back what the steps took, unless it was put in force, and lets go of all it holds. */
  abort(): Promise<void>;
}

export interface NativeMerge extends NativeStep {
  /** After the last step: syncs, writes the next edition of the map. Nothing is visible yet. */
  prepare(): Promise<{ keep: string; map: number; remove: string[] }>;
  /** Ends it as it is: nobody knows whether the journal names the new edition. */
  leave(): void;
  /** After the journal names it: readers go on in the slice that stays, the others' files go. */
  apply(): Promise<void>;
}

export interface NativePull extends NativeStep {
  /** `forked`: the disk was forked since the pull began, and nothing was cut loose. */
  detach(): Promise<{ forked: boolean }>;
}

export interface NativeDisk {
  /** The generation of a fork that the journal does not know of yet, or ''. */
  recovered(): string;
  fork(generation: string): ForkDone | Promise<ForkDone>;
  settle(): Promise<void>;
  attachSpare(id: string): Promise<void>;
  pullBegin(): Promise<NativePull>;
  info(): { top: string; depth: number; indexBytes: number; spare: boolean };
  stats(): NativeStats;
  /** What an NBD server serves. */
  device(): unknown;
  close(): Promise<void>;
}

export interface NativeView {
  /** A PageProvider handle (mcdist); it keeps the view alive. */
  provider(): unknown;
  /** What an NBD server serves; the export keeps it. */
  device(): unknown;
  close(): void;
}

export interface ForkDone {
  slice: string;
  durationUs: number;
}

export interface NativeStats {
  reads: number;
  writes: number;
  zeroes: number;
  flushes: number;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  fetched: number;
  ioErrors: number;
  noSpaceErrors: number;
  /** What the last failed flush said; else, if there were errors, the last about a file of the store. */
  lastError: string | null;
}

export interface NativeNbdServer {
  addExport(
    device: unknown,
    options: {
      exportName: string | undefined;
      description: string | undefined;
      isDefault: boolean | undefined;
      maxConnections: number | undefined;
    },
  ): void;
  removeExport(name: string): Promise<void>;
  close(): Promise<void>;
  stats(): NbdServerStats;
}

let loaded: BlktapAddon | undefined;

export function addon(): BlktapAddon {
  loaded ??= loadAddon<BlktapAddon>('dataplane');
  return loaded;
}

/** Runs a native call; its errors carry a code of the table and become SnowflockErrors. */
export async function native<T>(call: () => T | Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw asSnowflockError(error);
  }
}

/** The same for calls that answer at once. */
export function nativeSync<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw asSnowflockError(error);
  }
}

import { asSnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';
import type { ListenOptions, NbdServerStats } from './nbd-server.js';

/** What disk.ts uses of the data plane's addon (native/blktap/disk_js.cc). */
export interface BlktapAddon {
  openDisk(spec: NativeSpec, replica?: unknown): Promise<NativeDisk>;
  createSlice(directory: string, id: string, sizeBytes: number, spare: boolean): Promise<void>;
  removeSpare(directory: string, id: string, sizeBytes: number): Promise<void>;
  readPage(provider: unknown, page: number): Buffer | null;
  startNbdServer(options: ListenOptions): NativeNbdServer;
}

export interface NativeSpec {
  directory: string;
  sizeBytes: number;
  slices: { id: string; generation: string; keep: boolean }[];
  spare: string;
  base: { kind: string; path?: string; imageBytes?: number; generation?: string };
}

export interface NativeDisk {
  /** The generation of a fork that disk.json does not know of yet, or ''. */
  recovered(): string;
  fork(generation: string): ForkDone | Promise<ForkDone>;
  settle(): Promise<void>;
  attachSpare(id: string): Promise<void>;
  provider(generation: string): unknown;
  dropView(generation: string): void;
  info(): { slices: NativeSlice[]; indexBytes: number; spare: boolean };
  stats(): NativeStats;
  /** What an NBD server serves: the writable disk, or the image of a generation. */
  device(): unknown;
  viewDevice(generation: string): unknown;
  close(): Promise<void>;
}

export interface ForkDone {
  slice: string;
  durationUs: number;
}

export interface NativeSlice {
  id: string;
  state: 'open' | 'settling' | 'sealed';
  pages: number;
  allocatedBytes: number;
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
  /** What the last failed flush said. */
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

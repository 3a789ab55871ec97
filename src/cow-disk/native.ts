import { asSnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';

/** What disk.ts uses of the data plane's addon (native/blktap/disk_js.cc). */
export interface BlktapAddon {
  openDisk(spec: NativeSpec, replica?: unknown): Promise<NativeDisk>;
  createSlice(directory: string, id: string, sizeBytes: number, spare: boolean): Promise<void>;
  removeSpare(directory: string, id: string, sizeBytes: number): Promise<void>;
  readPage(provider: unknown, page: number): Buffer | null;
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
  serve(options: ServeOptions): NativeServer;
  serveView(generation: string, options: ServeOptions): NativeServer;
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

export interface NativeServer {
  close(): Promise<void>;
  stats(): { connections: number; accepted: number };
}

/** A Unix socket to serve on. `uid`, `gid`, `mode`: of the socket file (default: own, 0o600). */
export interface ServeOptions {
  socketPath: string;
  exportName?: string;
  description?: string;
  uid?: number;
  gid?: number;
  mode?: number;
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

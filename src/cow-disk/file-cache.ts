import { loadAddon } from '../common/native.js';
import { nativeSync } from './native.js';

/** Descriptors of sealed slices that this process holds open (native/blktap/file_cache.h). */
export interface FileCacheStats {
  /** `open` goes beyond it only by files that are being read, at most to twice as many. */
  capacity: number;
  open: number;
  /** Since the process began: files opened again after they were closed, and files closed. */
  opened: number;
  closed: number;
}

interface FileCacheAddon {
  setFileCacheCapacity(descriptors: number): void;
  fileCacheStats(): FileCacheStats;
  raceFileCache(
    directory: string,
    files: number,
    capacity: number,
    reads: number,
    seed: number,
  ): FileCacheRace;
}

/** What native/blktap/file_cache_race.h saw; `full` and `letGo` are errno values. */
export interface FileCacheRace {
  reads: number;
  wrong: number;
  stale: number;
  again: number;
  most: number;
  pinned: number;
  full: number;
  letGo: number;
}

/** Linux allows a process no more (fs.nr_open). */
export const MAX_OPEN_FILES = 1_048_576;

/** `descriptors`: 1 to MAX_OPEN_FILES. If never called: 2048, or a quarter of RLIMIT_NOFILE if that is less. E_ARGUMENT. */
export function setFileCacheCapacity(descriptors: number): void {
  nativeSync(() => loadAddon<FileCacheAddon>('dataplane').setFileCacheCapacity(descriptors));
}

export function fileCacheStats(): FileCacheStats {
  return loadAddon<FileCacheAddon>('dataplane').fileCacheStats();
}

/** For tests: threads read, hold, release and remove files of an empty folder. */
export const raceFileCache: FileCacheAddon['raceFileCache'] = (...options) =>
  nativeSync(() => loadAddon<FileCacheAddon>('dataplane').raceFileCache(...options));

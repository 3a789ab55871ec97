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
}

/** `descriptors`: 1 to 1048576, 256 if never called. E_ARGUMENT. */
export function setFileCacheCapacity(descriptors: number): void {
  nativeSync(() => loadAddon<FileCacheAddon>('dataplane').setFileCacheCapacity(descriptors));
}

export function fileCacheStats(): FileCacheStats {
  return loadAddon<FileCacheAddon>('dataplane').fileCacheStats();
}

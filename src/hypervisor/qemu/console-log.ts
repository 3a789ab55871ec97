/**
 * Keeps a console log within bounds. The VM process appends to the file; when it has grown past
 * `maxBytes` its content is moved to `<file>.1` and it starts anew, so that the newest output is
 * always there. While no daemon runs, the process's file size limit is the bound.
 */
import { copyFileSync, statSync, truncateSync } from 'node:fs';

const CHECK_MS = 1000;

export function rotateIfLarge(file: string, maxBytes: number): boolean {
  const size = statSync(file, { throwIfNoEntry: false })?.size ?? 0;
  if (size <= maxBytes) return false;
  // Copied, not renamed: the writer keeps its open file. What it writes between the two calls is
  // lost, which a log can bear.
  copyFileSync(file, `${file}.1`);
  truncateSync(file, 0);
  return true;
}

/**
 * File size limit of the VM process. It counts for the file that is guest RAM too, so it cannot be
 * less than that.
 */
export function hardLimit(maxBytes: number, ramBytes: number): number {
  return Math.max(8 * maxBytes, 16 << 20, ramBytes);
}

/** Rotates the log while the daemon runs; returns the function that stops it. */
export function keepBounded(
  file: string,
  maxBytes: number,
  onError: (e: Error) => void,
): () => void {
  const timer = setInterval(() => {
    try {
      rotateIfLarge(file, maxBytes);
    } catch (error) {
      clearInterval(timer);
      onError(error instanceof Error ? error : new Error(String(error)));
    }
  }, CHECK_MS);
  timer.unref();
  return () => clearInterval(timer);
}

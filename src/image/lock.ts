import { mkdir, open, readFile, rename, rm, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { SnowflockError } from '../common/errors.js';

const EMPTY_GRACE_MS = 2000;

async function startTime(pid: number): Promise<string | undefined> {
  try {
    const text = await readFile(`/proc/${pid}/stat`, 'latin1');
    return text.slice(text.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

/** True if the file's owner is gone. A file just made may not hold its owner's name yet. */
async function isStale(path: string): Promise<boolean> {
  try {
    const [pid, started] = (await readFile(path, 'utf8')).trim().split(' ');
    if (!pid || !started) return Date.now() - (await stat(path)).mtimeMs > EMPTY_GRACE_MS;
    return (await startTime(Number(pid))) !== started;
  } catch {
    return false; // it has just been removed: try to take it
  }
}

/**
 * Runs `work` while holding a lock file, which names its owner by process id and start time so that
 * one left by a killed process is recognized. Waits for another owner, at most `waitMs`; then
 * E_IN_USE. `waiting` is called once if it has to wait.
 */
export async function withLock<T>(
  path: string,
  waitMs: number,
  waiting: () => void,
  work: () => Promise<T>,
  signal?: AbortSignal,
): Promise<T> {
  await mkdir(dirname(path), { recursive: true });
  const deadline = Date.now() + waitMs;
  for (let first = true; ; first = false) {
    try {
      const file = await open(path, 'wx');
      await file.writeFile(`${process.pid} ${await startTime(process.pid)}\n`);
      await file.close();
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    }
    if (await isStale(path)) {
      // Moved away first: of two waiters only one can, and neither removes a lock just taken.
      const aside = `${path}.${process.pid}.stale`;
      await rename(path, aside).catch(() => {});
      await rm(aside, { force: true });
      continue;
    }
    if (first) waiting();
    if (Date.now() > deadline) {
      throw new SnowflockError('E_IN_USE', `another process is building (lock file ${path})`);
    }
    await sleep(200, undefined, { signal }).catch(() => {
      throw new SnowflockError('E_INTERRUPTED', 'interrupted while waiting for another build');
    });
  }
  try {
    return await work();
  } finally {
    await rm(path, { force: true });
  }
}

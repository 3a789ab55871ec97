/** One process at a time changes a host's gateways. */
import { spawn } from 'node:child_process';
import { closeSync, constants, mkdirSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';

const LIMIT_S = 30;

/**
 * Does the work while no other process does its own with the same folder. Who can open a file can
 * lock it, also for ever: this one is for its owner alone.
 * E_IN_USE (for more than 30 s), E_IO, E_REQUIREMENT (flock(1)).
 */
export async function withLock<T>(runDir: string, work: () => Promise<T>): Promise<T> {
  const path = join(runDir, 'nat.lock');
  const fd = openLock(runDir, path);
  try {
    await new Promise<void>((resolve, reject) => {
      // The lock belongs to the open file, which this process keeps.
      const args = ['--exclusive', '--timeout', String(LIMIT_S), '3'];
      const child = spawn('flock', args, { stdio: ['ignore', 'ignore', 'ignore', fd] });
      child.on('error', (error) =>
        reject(new SnowflockError('E_REQUIREMENT', `cannot run flock(1): ${error.message}`)),
      );
      child.on('close', (code) =>
        code === 0
          ? resolve()
          : reject(new SnowflockError('E_IN_USE', `another process changes gateways (${path})`)),
      );
    });
    return await work();
  } finally {
    closeSync(fd);
  }
}

function openLock(runDir: string, path: string): number {
  try {
    mkdirSync(runDir, { recursive: true, mode: 0o755 });
    return openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600);
  } catch (error) {
    throw new SnowflockError('E_IO', `cannot open ${path}: ${String(error)}`);
  }
}

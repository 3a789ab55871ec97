import { spawnSync } from 'node:child_process';
import { closeSync, openSync, writeSync } from 'node:fs';
import { SnowflockError } from '../common/errors.js';

/**
 * Takes an exclusive lock that ends with this process, however it ends. Node has no flock(2): the
 * `flock` tool (util-linux, part of every Debian) locks the descriptor that it inherits, and the
 * lock belongs to the open file, which this process keeps. Errors: E_IN_USE,
 * E_REQUIREMENT.
 */
export function flockSync(path: string, what: string): { release(): void } {
  const fd = openSync(path, 'a', 0o600);
  const { status, error } = spawnSync('flock', ['--exclusive', '--nonblock', '3'], {
    stdio: ['ignore', 'ignore', 'ignore', fd],
  });
  if (status !== 0) {
    closeSync(fd);
    if (error !== undefined) {
      throw new SnowflockError('E_REQUIREMENT', `cannot run flock(1): ${error.message}`);
    }
    throw new SnowflockError('E_IN_USE', `another daemon runs on ${what}`);
  }
  writeSync(fd, `${process.pid}\n`);
  return { release: () => closeSync(fd) };
}

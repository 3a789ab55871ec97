import { execFile } from 'node:child_process';
import { SnowflockError } from '../common/errors.js';

/**
 * Runs the `openssl` tool. It is given no configuration but ours: the system's openssl.cnf differs
 * between installations and would add extensions of its own.
 */
export function openssl(args: readonly string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    execFile(
      'openssl',
      args,
      { timeout: 30_000, env: { PATH: process.env.PATH, OPENSSL_CONF: '/dev/null' } },
      (error, _stdout, stderr) => {
        if (!error) return resolve();
        if (error.code === 'ENOENT') {
          reject(new SnowflockError('E_REQUIREMENT', 'openssl is not installed'));
        } else {
          const said = stderr.trim().split('\n').slice(0, 3).join('; ');
          reject(new SnowflockError('E_CONFIG', `openssl ${args[0]} failed: ${said}`));
        }
      },
    );
  });
}

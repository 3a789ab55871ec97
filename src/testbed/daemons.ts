/** Daemons on the hosts of a testbed, as an operator would start them. */
import type { ChildProcess } from 'node:child_process';
import { closeSync, existsSync, openSync, readFileSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockClient } from '../api/client.js';
import { SnowflockError } from '../common/errors.js';
import { projectRoot } from '../common/native.js';
import type { Testbed, TestbedHost } from './testbed.js';

const START_LIMIT_MS = 30_000;
const LOG_TAIL_BYTES = 2_000;

export interface TestbedDaemon {
  readonly host: TestbedHost;
  readonly process: ChildProcess;
  readonly client: SnowflockClient;
  readonly logPath: string;
}

/** Changes a host's configuration file before its daemon starts, e.g. `{ lease_ms: 3000 }`. */
export async function configure(
  host: TestbedHost,
  changes: Record<string, unknown>,
): Promise<void> {
  const config = JSON.parse(await readFile(host.configPath, 'utf8')) as Record<string, unknown>;
  await writeFile(host.configPath, JSON.stringify({ ...config, ...changes }, null, 2));
}

/** Starts a host's daemon and waits until it serves. Errors: E_DAEMON with the end of its log. */
export async function startDaemonOn(testbed: Testbed, host: TestbedHost): Promise<TestbedDaemon> {
  const logPath = join(host.dirs.state, 'sfld.log');
  const log = openSync(logPath, 'a', 0o600);
  const child = testbed.spawnIn(
    host,
    [
      process.execPath,
      join(projectRoot, 'dist', 'src', 'cli', 'main.js'),
      'sfld',
      '--config',
      host.configPath,
    ],
    { stdio: ['ignore', 'pipe', log] },
  );
  closeSync(log);
  const tail = (): string =>
    existsSync(logPath) ? readFileSync(logPath, 'utf8').slice(-LOG_TAIL_BYTES) : '';
  await new Promise<void>((resolve, reject) => {
    const fail = (what: string): void => {
      child.kill('SIGKILL');
      reject(new SnowflockError('E_DAEMON', `sfld on ${host.name} ${what}:\n${tail()}`));
    };
    const timer = setTimeout(() => fail(`not ready after ${START_LIMIT_MS} ms`), START_LIMIT_MS);
    child.once('exit', (code, signal) => {
      clearTimeout(timer);
      fail(`ended (${signal ?? code})`);
    });
    child.stdout?.once('data', () => {
      clearTimeout(timer);
      child.removeAllListeners('exit');
      resolve();
    });
  });
  child.stdout?.resume();
  const client = new SnowflockClient(join(host.dirs.run, 'sfld.sock'));
  return { host, process: child, client, logPath };
}

/** A daemon on every host of the testbed. */
export function startDaemons(testbed: Testbed): Promise<TestbedDaemon[]> {
  return Promise.all(testbed.hosts.map((host) => startDaemonOn(testbed, host)));
}

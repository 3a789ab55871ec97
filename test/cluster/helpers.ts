import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type ClusterConfig, initCluster, loadClusterConfig } from '../../src/cluster/index.js';

/** Loopback addresses of this process's own: all of 127.0.0.0/8 is loopback. */
export function loopback(index: number): string {
  return `127.${1 + (process.pid % 250)}.${Math.floor(process.pid / 250) % 250}.${index}`;
}

export function temporaryFolder(): { path: string; remove(): void } {
  const path = mkdtempSync(join(tmpdir(), 'sf-cluster-'));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
}

/** A cluster on loopback; each host's configuration by its name. */
export async function makeCluster(
  dir: string,
  names: readonly string[],
): Promise<Map<string, ClusterConfig>> {
  const files = await initCluster({
    dir,
    hosts: names.map((name, at) => ({ name, address: loopback(at + 1), uplink: 'lo' })),
  });
  return new Map([...files].map(([name, file]) => [name, loadClusterConfig(file)]));
}

export function get<T>(map: ReadonlyMap<string, T>, key: string): T {
  const value = map.get(key);
  if (value === undefined) throw new Error(`no ${key}`);
  return value;
}

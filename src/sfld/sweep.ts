/**
 * Removes what a daemon that died left half made: files, VM processes and filter entries that no
 * record names. Records are written before what they name is made, so everything else is a remnant.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { type Host, replicaPath } from './host.js';
import { memtapSocket } from './vms.js';

export async function sweep(host: Host): Promise<void> {
  const { config } = host;
  const vms = new Set(host.vms.all().map((record) => record.id));
  const forks = host.forks.all().filter((fork) => fork.state !== 'closed');
  const bases = host.vms.all().flatMap(({ base }) => (base === null ? [] : [base]));

  for (const pid of strayProcesses(memtapSocket(config), vms)) {
    host.log.warn({ pid }, 'ending a VM process that no record names');
    try {
      process.kill(pid, 'SIGKILL');
    } catch {
      // It ended by itself meanwhile.
    }
  }
  for (const { tap } of host.filter.vms()) {
    const known = host.vms.all().some((record) => record.tap === tap);
    if (!known) host.filter.removeVm(tap);
  }
  for (const kind of ['ram', 'disk'] as const) {
    const wanted = new Set(bases.map((base) => base[kind].generation));
    const names = await namesIn(join(replicaPath(config, kind, ''), '.'));
    for (const generation of names.filter((name) => !name.endsWith('.map'))) {
      if (wanted.has(generation)) continue;
      const path = replicaPath(config, kind, generation);
      await host.dataplane.call('replica.close', { generation, path });
    }
  }
  await removeOthers(host, join(config.stateDir, 'disk'), vms);
  await removeOthers(host, join(config.runDir, 'vm'), vms);
  await removeOthers(
    host,
    join(config.ramDir, 'generation'),
    new Set(forks.map((fork) => fork.ram.generation)),
  );
  await removeOthers(
    host,
    join(config.stateDir, 'descriptor'),
    new Set(forks.map((fork) => fork.id)),
  );
}

async function removeOthers(host: Host, folder: string, wanted: Set<string>): Promise<void> {
  for (const name of await namesIn(folder)) {
    if (wanted.has(name)) continue;
    host.log.warn({ path: join(folder, name) }, 'removing a remnant');
    await rm(join(folder, name), { recursive: true, force: true });
  }
}

async function namesIn(folder: string): Promise<string[]> {
  return readdir(folder).catch(() => []);
}

/** Processes with this host's memtap agent in them, of VMs that are not known. */
function strayProcesses(socket: string, known: Set<string>): number[] {
  const stray: number[] = [];
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    let environment: string[];
    try {
      environment = readFileSync(join('/proc', name, 'environ'), 'latin1').split('\0');
    } catch {
      continue; // ended, or a kernel thread
    }
    if (!environment.includes(`SF_MEMTAP_SOCKET=${socket}`)) continue;
    const vm = environment.find((entry) => entry.startsWith('SF_MEMTAP_VM='))?.slice(13);
    if (vm === undefined || !known.has(vm)) stray.push(Number(name));
  }
  return stray;
}

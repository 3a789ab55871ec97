/** The SnowFlock local daemon (paper section 3.8): makes the parts, finds what ran, serves. */
import { join } from 'node:path';
import { Resources, type ResourcesSnapshot } from '../allocator/resources.js';
import { TicketBook } from '../allocator/tickets.js';
import { Cluster } from '../cluster/cluster.js';
import type { ClusterConfig } from '../cluster/config.js';
import { asSnowflockError } from '../common/errors.js';
import { readJson } from '../common/files.js';
import type { Logger } from '../common/log.js';
import { newCounters } from '../dhcp/counters.js';
import { driverByName } from '../hypervisor/index.js';
import { GroupReserve } from '../mcdist/groups.js';
import { NetbackFilter } from '../netback-filter/filter.js';
import { expectVm, fill, openDisk } from './bases.js';
import { giveUp, serve } from './capture.js';
import { Clones } from './clones.js';
import { DataplaneSupervisor } from './dataplane.js';
import { FamilyNumbers } from './family-numbers.js';
import { noteEnd } from './fork.js';
import { type Host, makeFolders } from './host.js';
import { Leases } from './leases.js';
import { listenLocal } from './local-api.js';
import { LocalHost } from './local-host.js';
import { flockSync } from './lock.js';
import { NatKeeper } from './nat.js';
import { Orphans } from './orphans.js';
import { listenPeers } from './peer-api.js';
import { Peers, RemoteHost } from './peers.js';
import type { ForkRecord, VmRecord } from './records.js';
import { closeSessions } from './sessions.js';
import { Store } from './store.js';
import { sweep } from './sweep.js';
import { resourcesFile, ticketFile } from './tickets.js';
import { adoptVms, endSoon, endVm, memtapSocket } from './vms.js';

const ATTACH_LIMIT_MS = 5_000;

export interface Daemon {
  readonly host: Host;
  /** Path of the local API's socket. */
  readonly socket: string;
  /** Ends the daemon. VMs and the data plane go on unless `endVms` is set. */
  close(options: { endVms: boolean }): Promise<void>;
}

export function apiSocket(config: { runDir: string }): string {
  return join(config.runDir, 'sfld.sock');
}

/** Errors: E_IN_USE if a daemon already runs on this state. */
export async function startDaemon(config: ClusterConfig, log: Logger): Promise<Daemon> {
  await makeFolders(config);
  const lock = flockSync(join(config.stateDir, 'sfld.lock'), config.stateDir);
  const vms = await Store.open<VmRecord>(join(config.stateDir, 'vms'));
  const forks = await Store.open<ForkRecord>(join(config.stateDir, 'forks'));
  const families = await FamilyNumbers.open(join(config.stateDir, 'families.json'), config.number);
  const cluster = new Cluster(config);
  const dataplane = new DataplaneSupervisor(
    {
      socket: join(config.runDir, 'dataplane.sock'),
      memtapSocket: memtapSocket(config),
      vmGid: config.vmGid,
      address: config.address,
      mcdistPort: config.mcdistPort,
      maxOpenFiles: config.maxOpenFiles,
      logPath: join(config.stateDir, 'log', 'dataplane.log'),
    },
    log,
    (call) => restore(host, call),
  );
  const self = new LocalHost(
    config.name,
    () => host,
    () => clones,
    () => orphans,
  );
  const filter = await NetbackFilter.attach({ uplink: config.uplink });
  const nat = natKeeper(config, filter, vms, log, () => host.peers);
  const host: Host = {
    config,
    log,
    dataplane,
    driver: driverByName('qemu', {
      user: { uid: config.vmUid, gid: config.vmGid },
      cacheDir: config.stateDir,
    }),
    filter,
    ...(nat === undefined ? {} : { nat }),
    resources: new Resources(config.resources),
    tickets: new TicketBook(),
    peers: new Peers([self, ...cluster.others().map((client) => new RemoteHost(client))]),
    families,
    vms,
    forks,
    groups: new GroupReserve({ interfaceAddress: config.address }),
    dhcp: newCounters(),
    live: new Map(),
    closing: false,
  };
  for (const fork of forks.all()) {
    if (fork.state === 'closed') continue;
    for (const { source } of [fork.ram, fork.disk]) {
      host.groups.adopt({ group: source.group, port: source.group_port });
    }
  }
  const clones = new Clones(host);
  const leases = new Leases(host);
  const orphans = new Orphans(host);
  dataplane.on('event', (event) => {
    if (event.event === 'vm.lost') {
      log.error({ vm: event.vm, code: event.code }, event.message);
      endSoon(host, event.vm, { status: null, reason: 'lost', message: event.message });
    } else if (event.event === 'generation.failed') {
      log.error({ vm: event.vm, generation: event.generation }, event.message);
    } else if (event.event === 'replica.complete') {
      log.info({ generation: event.generation }, 'replica complete: its source is not needed');
    } else {
      log.error({ generation: event.generation, code: event.code }, event.message);
    }
  });
  const used = vms.all().map((record) => ({
    id: record.reservation,
    memory_bytes: record.ram_bytes,
    vcpus: record.vcpus,
  }));
  const before = (await readJson(resourcesFile(config))) as ResourcesSnapshot | undefined;
  const promised = (before?.entries ?? []).filter(
    ({ id, expires_ms }) => expires_ms !== undefined && !used.some((entry) => entry.id === id),
  );
  host.resources.restore({ version: 1, entries: [...used, ...promised] });
  const tickets = await readJson(ticketFile(config));
  if (tickets !== undefined) host.tickets.restore(tickets);
  await dataplane.start();
  await abandonHalfForks(host);
  await adoptVms(host);
  await sweep(host);
  nat?.start();
  const peerServer = await listenPeers(host, self);
  const socket = apiSocket(config);
  const local = await listenLocal(host, socket);
  void cluster.warm().catch((error: unknown) => log.warn({ error: String(error) }, 'warm-up'));
  return {
    host,
    socket,
    async close({ endVms }) {
      host.closing = true;
      leases.close();
      orphans.close();
      closeSessions();
      await local.close();
      if (endVms) {
        for (const record of vms.all()) {
          await endVm(host, record.id, {
            status: null,
            reason: 'killed',
            message: 'the daemon is ending',
          });
        }
      }
      closeSessions(); // those of other hosts that came meanwhile
      await peerServer.close();
      for (const live of host.live.values()) {
        live.channel.close();
        live.dhcp.stop();
        live.guard?.close();
        live.vm.release();
      }
      cluster.close();
      host.groups.close();
      await dataplane.close(endVms);
      await nat?.close(endVms);
      if (endVms) await host.filter.detach();
      lock.release();
    },
  };
}

function natKeeper(
  config: ClusterConfig,
  filter: NetbackFilter,
  vms: Store<VmRecord>,
  log: Logger,
  peers: () => Peers,
): NatKeeper | undefined {
  if (config.natPolicy === undefined) return undefined;
  const nameOf = (family: number): string | undefined =>
    vms.all().find((vm) => vm.family === family && vm.vmid === 0)?.name;
  const { name } = config;
  const others = () =>
    peers()
      .all()
      .filter((port) => port.name !== name);
  return new NatKeeper({ file: config.natPolicy, filter, log, nameOf, cluster: { name, others } });
}

/**
 * Tells a data plane, new or found again, all that should exist. What cannot be had again (a VM that
 * was half made, memory lost with a reboot) costs that VM or fork only, never the other VMs of the
 * host. Errors: E_DATAPLANE if it is gone again.
 */
async function restore(host: Host, call: Host['dataplane']['call']): Promise<void> {
  const attempt = async (what: Record<string, string>, step: () => Promise<unknown>) => {
    try {
      await step();
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (code === 'E_DATAPLANE') throw error;
      host.log.error({ ...what, code }, `not restored: ${message}`);
    }
  };
  for (const record of host.vms.all()) {
    if (record.state === 'ended' || record.state === 'ending') continue;
    await attempt({ vm: record.id }, async () => {
      await expectVm(call, host, record);
      await openDisk(call, host, record);
      if (record.base !== null) await fill(call, host, record.base.ram.generation, 'ram');
    });
  }
  for (const fork of host.forks.all()) {
    if (fork.state !== 'open') continue;
    // Lost with its memory: a server that refuses every page would be worse than none.
    const process = host.vms.get(fork.vm)?.hypervisor;
    if (process === undefined || process === null || !host.driver.alive(process)) continue;
    // Its memory can be read once the VM's process has come back to memtap, a moment later.
    await call('vm.attached', { vm: fork.vm, timeout_ms: ATTACH_LIMIT_MS }).catch(
      (error: unknown) =>
        host.log.warn({ vm: fork.vm, error: String(error) }, 'VM does not come back to memtap'),
    );
    await attempt({ fork: fork.id }, () =>
      serve(host, fork.ram, { vm: fork.vm }, fork.disjoint.ram, call),
    );
    await attempt({ fork: fork.id }, () =>
      serve(host, fork.disk, { disk: fork.vm }, fork.disjoint.disk, call),
    );
  }
}

/** Forks that an earlier daemon did not finish: their clones never ran, or nobody knows of them. */
async function abandonHalfForks(host: Host): Promise<void> {
  for (const fork of host.forks.all()) {
    if (fork.state === 'capturing') {
      await giveUp(host, fork, true);
      await host.forks.remove(fork.id);
      continue;
    }
    for (const clone of fork.clones) {
      if (clone.ok || clone.end !== null) continue;
      await noteEnd(host, fork.id, clone.vmid, {
        status: null,
        reason: 'failed',
        message: 'the daemon ended during the fork',
      });
    }
  }
}

import { constants } from 'node:fs';
import { chmod, copyFile, mkdir, rename, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { Resources } from '../allocator/resources.js';
import type { TicketBook } from '../allocator/tickets.js';
import type { GuestChannel } from '../api/guest-channel.js';
import type { ClusterConfig } from '../cluster/config.js';
import { SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { nativePath } from '../common/native.js';
import type { DhcpCounters } from '../dhcp/counters.js';
import type { DhcpService } from '../dhcp/service.js';
import type { HypervisorDriver, Vm } from '../hypervisor/driver.js';
import type { BuiltImage } from '../image/manifest.js';
import type { GroupReserve } from '../mcdist/groups.js';
import type { NetbackFilter } from '../netback-filter/filter.js';
import type { TcpGuard } from '../network/tcp-guard.js';
import type { DataplaneSupervisor } from './dataplane.js';
import type { FamilyNumbers } from './family-numbers.js';
import type { NatKeeper } from './nat.js';
import type { Peers } from './peers.js';
import type { ForkRecord, VmRecord } from './records.js';
import type { Store } from './store.js';

/** A VM that runs on this host, with what belongs to it in this process. */
export interface LiveVm {
  record: VmRecord;
  vm: Vm;
  channel: GuestChannel;
  /** Resolves when the guest has taken its identity on; programs can be run from then. */
  ready: Promise<unknown>;
  dhcp: DhcpService;
  /** Of guests that follow DHCP alone. */
  guard?: TcpGuard;
  /** Set while a fork of this VM is under way: one at a time. */
  forking: boolean;
  /** Forks and clones-of-checkpoints under way; the VM's end waits for them. */
  forks: Set<Promise<unknown>>;
}

/** All that the parts of the daemon share; made once in daemon.ts. */
export interface Host {
  readonly config: ClusterConfig;
  readonly log: Logger;
  readonly dataplane: DataplaneSupervisor;
  readonly driver: HypervisorDriver;
  readonly filter: NetbackFilter;
  /** Where host.json names a policy. */
  readonly nat?: NatKeeper;
  readonly resources: Resources;
  readonly tickets: TicketBook;
  readonly peers: Peers;
  /** Multicast groups of generations made here, listened to before they are used. */
  readonly groups: GroupReserve;
  readonly families: FamilyNumbers;
  readonly vms: Store<VmRecord>;
  readonly forks: Store<ForkRecord>;
  /** Of the DHCP servers of all VMs here since the daemon began. */
  readonly dhcp: DhcpCounters;
  readonly live: Map<string, LiveVm>;
  /** The daemon is ending: nothing is begun any more. */
  closing: boolean;
}

/** Paths of one VM's files. `run` holds sockets and must stay short (107 bytes for a socket). */
export function vmPaths(config: ClusterConfig, vm: string): Record<'run' | 'nbd', string> {
  const run = join(config.runDir, 'vm', vm);
  return { run, nbd: join(run, 'nbd.sock') };
}

/** The library that is loaded into VM processes: a copy that their user can reach. */
export function agentPath(config: ClusterConfig): string {
  return join(config.runDir, 'memtap-agent.so');
}

/**
 * Kernel and initramfs where the VMs' user can read them: the image's own folder may be in somebody's
 * home. Copied once for each version of an image.
 */
export async function placeBootFiles(
  config: ClusterConfig,
  image: BuiltImage,
): Promise<{ kernel: string; initrd: string }> {
  const folder = join(config.stateDir, 'boot', `${image.manifest.name}-${image.manifest.version}`);
  const place = async (from: string): Promise<string> => {
    const to = join(folder, basename(from));
    if ((await stat(to).catch(() => undefined)) !== undefined) return to;
    await mkdir(folder, { recursive: true, mode: 0o755 });
    const temporary = `${to}.${process.pid}.tmp`;
    await copyFile(from, temporary, constants.COPYFILE_FICLONE);
    await chmod(temporary, 0o644);
    await rename(temporary, to);
    return to;
  };
  return { kernel: await place(image.kernelPath), initrd: await place(image.initrdPath) };
}

export function replicaPath(
  config: ClusterConfig,
  kind: 'ram' | 'disk',
  generation: string,
): string {
  return kind === 'ram'
    ? join(config.ramDir, 'replica', generation)
    : join(config.stateDir, 'replica', generation);
}

export async function makeFolders(config: ClusterConfig): Promise<void> {
  for (const folder of [
    config.runDir,
    join(config.runDir, 'vm'),
    config.stateDir,
    join(config.stateDir, 'log'),
    join(config.stateDir, 'disk'),
    join(config.stateDir, 'replica'),
    join(config.stateDir, 'descriptor'),
    join(config.stateDir, 'boot'),
    config.ramDir,
    join(config.ramDir, 'replica'),
    join(config.ramDir, 'generation'),
  ]) {
    // Others may pass through, so that the VMs' user reaches its sockets; nobody may look around.
    await mkdir(folder, { recursive: true, mode: 0o711 });
  }
  // Renamed into place: VMs of an earlier daemon have the old one mapped.
  const agent = agentPath(config);
  await copyFile(nativePath('memtap-agent.so'), `${agent}.tmp`);
  await chmod(`${agent}.tmp`, 0o755);
  await rename(`${agent}.tmp`, agent);
}

export function liveVm(host: Host, id: string): LiveVm {
  const live = host.live.get(id);
  if (live === undefined) {
    throw new SnowflockError('E_NOT_FOUND', `no VM ${id} runs on host ${host.config.name}`);
  }
  return live;
}

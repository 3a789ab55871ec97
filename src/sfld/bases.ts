/**
 * What a VM stands on, as the data plane is told of it: memory, disk, and for a clone the replicas of
 * the two generations it was forked from (its base). Each step may be repeated: it is, after each
 * restart of the data plane.
 *
 * A base whose source is another host is served from here as well, so that the source may die once
 * the hosts of its clones hold together what they need (see orphans.ts).
 */
import { type Host, replicaPath, vmPaths } from './host.js';
import type { VmRecord } from './records.js';

type Call = Host['dataplane']['call'];
type Base = NonNullable<VmRecord['base']>;

export const KINDS = ['ram', 'disk'] as const;
export type Kind = (typeof KINDS)[number];

/** Background fill of replicas on this host, in bytes a second; 0: on demand only. */
export function fillRate(host: Host, kind: Kind): number {
  return kind === 'ram' ? host.config.prefetchRamBytesPerS : host.config.prefetchBytesPerS;
}

/** True if a clone's generations come from another host. */
export function isRemote(host: Host, record: VmRecord): record is VmRecord & { base: Base } {
  return record.base !== null && record.base.ram.source.address !== host.config.address;
}

/** Tells the data plane of a VM's memory. */
export async function expectVm(call: Call, host: Host, record: VmRecord): Promise<void> {
  const { base } = record;
  await openReplica(call, host, record, 'ram');
  await call('vm.expect', {
    vm: record.id,
    token: record.token,
    ram_bytes: record.ram_bytes,
    ...(base === null ? {} : { replica: base.ram.generation }),
    generations: host.forks
      .all()
      .filter((fork) => fork.vm === record.id && fork.state === 'open')
      .sort((a, b) => a.created_ms - b.created_ms)
      .map((fork) => ({ generation: fork.ram.generation, directory: fork.ram_directory })),
  });
}

export async function openDisk(call: Call, host: Host, record: VmRecord): Promise<void> {
  const { base } = record;
  await openReplica(call, host, record, 'disk');
  await call('disk.open', {
    disk: record.id,
    directory: record.disk_directory,
    ...(base === null ? {} : { replica: base.disk.generation }),
    socket: vmPaths(host.config, record.id).nbd,
    export_name: record.id,
    uid: record.uid,
    gid: host.config.vmGid,
  });
  // After its disk is open, so that what the clone has overwritten is left out.
  if (base !== null) await fill(call, host, base.disk.generation, 'disk');
}

/** For RAM: once the pages known to be zero are marked, so that they are not asked for. */
export async function fill(call: Call, host: Host, generation: string, kind: Kind): Promise<void> {
  const rate = fillRate(host, kind);
  if (rate > 0) await call('replica.prefetch', { generation, rate_bytes_per_s: rate });
}

async function openReplica(call: Call, host: Host, record: VmRecord, kind: Kind): Promise<void> {
  if (record.base === null) return;
  const { generation, pages, source } = record.base[kind];
  await call('replica.open', {
    generation,
    path: replicaPath(host.config, kind, generation),
    pages,
    medium: kind === 'ram' ? 'memory' : 'disk',
    source,
    serve: isRemote(host, record),
  });
}

/** After the VM's record is gone; nothing happens while another VM stands on the same base. */
export async function closeReplicas(host: Host, record: VmRecord): Promise<void> {
  const { base } = record;
  if (base === null) return;
  const shared = host.vms
    .all()
    .some((vm) => vm.id !== record.id && vm.base?.ram.generation === base.ram.generation);
  if (shared) return;
  // Both are asked at once: a new clone of the generation that comes now finds both gone, and opens
  // both anew. Between two waits it would find one that is about to be closed under it.
  await Promise.all(
    KINDS.map((kind) =>
      host.dataplane.call('replica.close', {
        generation: base[kind].generation,
        path: replicaPath(host.config, kind, base[kind].generation),
      }),
    ),
  );
}

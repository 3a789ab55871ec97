/**
 * What sfld remembers: one JSON file each, so that a daemon that died finds everything again.
 * Field names are those of the JSON (snake case, units last).
 */

import type { GenerationRef } from '../descriptor/index.js';
import type { VmRecord as HypervisorRecord, MachineShape } from '../hypervisor/driver.js';
import type { Connection } from '../network/tcp-guard.js';

export type { GenerationRef };

export type VmState = 'starting' | 'running' | 'ending' | 'ended';

/** How a VM ended: what a join reports. `status` is the clone's own (0 to 255), null if it had none. */
export interface EndReport {
  status: number | null;
  reason: 'exit' | 'killed' | 'shutdown' | 'crashed' | 'lost' | 'failed';
  message: string;
  /** Pages of RAM this VM waited for in its life, where they could still be counted. */
  pages_fetched?: number;
}

/**
 * Who gives a guest its address: its agent, told by sfld, or nobody but DHCP. Such a guest needs no
 * agent; after a fork it is made to ask (readdress.ts).
 */
export type Addressing = 'agent' | 'dhcp';

export interface VmRecord {
  id: string;
  name: string;
  kind: 'parent' | 'clone';
  image: string;
  family: number;
  /** Host that gives out this family's vmids: the one the family's first VM was started on. */
  family_host: string;
  vmid: number;
  ram_bytes: number;
  disk_bytes: number;
  vcpus: number;
  /** Absent: agent. */
  addressing?: Addressing;
  state: VmState;
  created_ms: number;
  /** Secret by which the memtap agent of this VM proves itself to the data plane. */
  token: string;
  /** Marks this identity; see the guest protocol's `hello`. */
  epoch: string;
  reservation: string;
  disk_directory: string;
  tap: string;
  /** User that this VM's process runs as, and no other VM of this host. */
  uid: number;
  /** The hypervisor driver's own record, by which it finds the VM again. */
  hypervisor: HypervisorRecord | null;
  /** Machine shape, as the driver gave it; clones must match it. */
  shape: MachineShape | null;
  /** Next vmid of the family; used only on the family's host, in the first VM's record. */
  next_vmid: number;
  /** Clones only: the generations it stands on and the VM it was forked from. */
  base: { ram: GenerationRef; disk: GenerationRef; fork: string } | null;
  parent: { host: string; vm: string; fork: string } | null;
  /** For forks from now on; not multicast. */
  disjoint: Disjoint;
  end: EndReport | null;
}

export interface CloneResult {
  vm: string;
  vmid: number;
  /** The ticket it was made with. */
  ticket: string;
  host: string;
  ip: string;
  wire_mac: string;
  ok: boolean;
  /** From the request until this clone's host was asked; its own times count from then. */
  asked_ms: number;
  /** From the request to the clone's first instruction. */
  running_ms: number | null;
  /** From the request until the clone's guest was at its new address: its agent said so, or it took
   * the lease. */
  reply_ms: number | null;
  error: { code: string; message: string } | null;
  end: EndReport | null;
}

export type ForkState = 'capturing' | 'open' | 'closed';

/** A checkpoint of a VM and the clones made of it: one pair of generations. */
export interface ForkRecord {
  id: string;
  vm: string;
  state: ForkState;
  /** True until released: the generations stay although no clone runs. */
  held: boolean;
  /** The guest's call that made it: each clone gets its answer to it. */
  pending: string | null;
  ticket: string | null;
  ram: GenerationRef;
  disk: GenerationRef;
  ram_directory: string;
  descriptor_path: string;
  descriptor_bytes: number;
  created_ms: number;
  parent_pause_ms: number | null;
  fork_ms: number | null;
  dirty_pages: number | null;
  /** The mcdist server's last counters of both generations, taken when they were closed. */
  wire: Record<'ram' | 'disk', Record<string, number>> | null;
  /** As the VM's, when it was forked. */
  disjoint: Disjoint;
  clones: CloneResult[];
  /** The guest's TCP connections at the capture, where its agent does not end them in clones. */
  connections?: Connection[];
}

/** Regions of which each clone needs a part of its own, as runs of pages [first, count, ...]. */
export interface Disjoint {
  ram: number[];
  disk: number[];
}

/** What a host is asked to make ready while the descriptor is being put together. */
export interface PrepareRequest {
  fork: string;
  parent: { host: string; vm: string };
  family: number;
  family_host: string;
  image: string;
  name: string;
  ram_bytes: number;
  vcpus: number;
  shape: MachineShape;
  ram: GenerationRef;
  disk: GenerationRef;
  reservation: string;
  /** Absent: agent. With dhcp: what clones inherit, and under which address. */
  addressing?: Addressing;
  inherited?: { address: string; connections: Connection[] };
  clones: { vm: string; vmid: number; epoch: string; seed: string; reply: PendingReply | null }[];
}

/** The guest's own sf_clone call, answered in each clone under the same id. */
export interface PendingReply {
  id: string;
  args: Record<string, string>;
}

/** What the host says of each clone; times count from the arrival of the request there. */
export interface StartReport {
  vmid: number;
  ok: boolean;
  running_ms: number | null;
  reply_ms: number | null;
  error: { code: string; message: string } | null;
}

type ShownGeneration = Omit<GenerationRef, 'source'> & {
  source: Omit<GenerationRef['source'], 'key'>;
};

/** A fork as users see it: without the keys of its generations, which nobody should paste anywhere. */
export type ShownFork = Omit<ForkRecord, 'ram' | 'disk'> & {
  ram: ShownGeneration;
  disk: ShownGeneration;
};

export function showFork(fork: ForkRecord): ShownFork {
  return { ...fork, ram: showGeneration(fork.ram), disk: showGeneration(fork.disk) };
}

function showGeneration({ source, ...rest }: GenerationRef): ShownGeneration {
  const { key: _secret, ...shown } = source;
  return { ...rest, source: shown };
}

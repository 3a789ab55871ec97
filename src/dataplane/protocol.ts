/**
 * What sfld asks of its data plane: one JSON object a line over a Unix socket. Every method can be
 * repeated: after a crash on either side sfld tells the data plane all that should exist, and what
 * exists already is left as it is. No page passes through here.
 */

import type { VmRecord } from '../hypervisor/driver.js';

/** Where a host gets the pages of a generation that it does not hold itself. */
export interface GenerationSource {
  address: string;
  port: number;
  group: string;
  group_port: number;
  /** 32 bytes, hexadecimal. */
  key: string;
}

export interface ReplicaStats {
  pages: number;
  present: number;
  zero: number;
  waiting: number;
  /** Pages this host asked for itself; the rest of `present` came with answers to other hosts. */
  requested: number;
  /** No page is absent: the source is not needed any more. */
  complete: boolean;
  /** `closed`: complete. `lost`: absent pages end with E_SOURCE_LOST. */
  source: 'open' | 'lost' | 'closed';
  /** Other hosts can fetch from here what this replica holds. */
  served: boolean;
  prefetch: PrefetchStats | null;
}

/** Pages a replica does not hold, as runs [first, count, ...]; null: more than MISSING_RUNS_MAX. */
export interface MissingPages {
  absent: number[] | null;
  /** Those of them that somebody here may still read: not what all disks over it have overwritten. */
  needed: number[] | null;
}

/** As JSON some 80 KB at most. */
export const MISSING_RUNS_MAX = 4096;

/** See PrefetchProgress of the page store; `present` and `total` are those of the replica. */
export interface PrefetchStats {
  state: 'idle' | 'running' | 'paused' | 'done' | 'failed' | 'closed';
  skipped: number;
  rate_bytes_per_s: number;
  bytes_per_s: number;
  pages: number;
  failed_pages: number;
  error: { code: string; message: string } | null;
}

export interface ForkCommit {
  dirty_pages: number;
  /** Runs of pages known to be zero, as [first, count, ...]. */
  zero_runs: number[];
  duration_us: number;
}

export interface DataplaneMethods {
  ping: { params: Record<string, never>; result: { pid: number } };
  'replica.open': {
    params: {
      generation: string;
      path: string;
      pages: number;
      medium: 'memory' | 'disk';
      source: GenerationSource;
      /**
       * Others may fetch from here what it holds, until it is closed. Not on the source's own host:
       * a generation is served there already.
       */
      serve: boolean;
    };
    result: Record<string, never>;
  };
  /**
   * Another server of the same generation and key from now on; one that was lost is tried again. What
   * it does not hold is asked of the others.
   */
  'replica.server': {
    params: {
      generation: string;
      address: string;
      port: number;
      others: { address: string; port: number }[];
    };
    result: Record<string, never>;
  };
  'replica.missing': { params: { generation: string }; result: MissingPages };
  'replica.zero': {
    params: { generation: string; runs: number[] };
    result: Record<string, never>;
  };
  /**
   * Fills the replica in the background, at most so many bytes a second (0: no limit), without the
   * pages that all disks over it have overwritten. Repeated: sets the rate, or starts again.
   */
  'replica.prefetch': {
    params: { generation: string; rate_bytes_per_s: number };
    result: Record<string, never>;
  };
  'replica.stats': { params: { generation: string }; result: ReplicaStats };
  'replica.close': {
    params: { generation: string; path: string };
    result: Record<string, never>;
  };
  'vm.expect': {
    params: {
      vm: string;
      token: string;
      ram_bytes: number;
      /** The RAM generation a clone stands on; absent for a booted VM. */
      replica?: string;
      /** Open generations of this VM, oldest first: adopted if this data plane is a new one. */
      generations: { generation: string; directory: string }[];
    };
    result: Record<string, never>;
  };
  'vm.attached': { params: { vm: string; timeout_ms: number }; result: { pid: number } };
  'vm.fork_begin': {
    params: {
      vm: string;
      generation: string;
      directory: string;
      /** The hypervisor's record of the VM: the watchdog resumes it if the caller goes away. */
      rescue: VmRecord;
    };
    result: Record<string, never>;
  };
  'vm.fork_commit': { params: { vm: string; generation: string }; result: ForkCommit };
  /** The VM runs again: the watchdog stands down. */
  'vm.fork_end': { params: { vm: string }; result: Record<string, never> };
  'vm.fork_abort': { params: { vm: string; generation: string }; result: Record<string, never> };
  'vm.drop_generation': {
    params: { vm: string; generation: string; directory: string };
    result: Record<string, never>;
  };
  'vm.remove': { params: { vm: string }; result: Record<string, never> };
  'vm.stats': { params: { vm: string }; result: Record<string, number> };
  'disk.create': {
    params: { directory: string; size_bytes: number; image?: string; replica?: string };
    result: Record<string, never>;
  };
  'disk.open': {
    params: {
      disk: string;
      directory: string;
      replica?: string;
      socket: string;
      export_name: string;
      uid: number;
      gid: number;
    };
    result: { size_bytes: number };
  };
  /**
   * Makes the next slice in advance, so that `disk.fork` only puts it in place, and writes out what
   * is dirty: the hypervisor flushes while the VM is paused, and should find little to do.
   */
  'disk.prepare_fork': { params: { disk: string }; result: Record<string, never> };
  'disk.fork': {
    params: { disk: string; generation: string };
    result: { duration_us: number };
  };
  'disk.drop_generation': {
    params: { disk: string; generation: string };
    result: Record<string, never>;
  };
  'disk.close': { params: { disk: string }; result: Record<string, never> };
  'disk.stats': { params: { disk: string }; result: Record<string, number> };
  'generation.serve': {
    params: {
      generation: string;
      of: { vm: string } | { disk: string };
      key: string;
      group: string;
      group_port: number;
      /**
       * Of the pages that clones of this generation, or of the one before it of the same VM or disk,
       * touched first, so many are sent to each new host before it asks; 0: none.
       */
      replay_pages: number;
      /** Regions each clone needs for itself, as runs [first, count, ...]: not multicast. */
      disjoint: number[];
    };
    result: { port: number };
  };
  'generation.unserve': { params: { generation: string }; result: Record<string, never> };
  /** Bytes put on the wire for a generation, headers included, and the pages they carried. */
  'generation.stats': { params: { generation: string }; result: Record<string, number> };
}

export type Method = keyof DataplaneMethods;
export type Params<M extends Method> = DataplaneMethods[M]['params'];
export type Result<M extends Method> = DataplaneMethods[M]['result'];

/** What the data plane says unasked. */
export type DataplaneEvent =
  | { event: 'vm.lost'; vm: string; code: string; message: string }
  | { event: 'generation.failed'; vm: string; generation: string; message: string }
  /** Every page is here; the source may go. */
  | { event: 'replica.complete'; generation: string }
  /** A prefetch failed, or pages could not be made durable. Pages on demand go on if they can. */
  | { event: 'replica.trouble'; generation: string; code: string; message: string };

/** Longest line either side takes: zero maps of large VMs are the longest that occur. */
export const LINE_LIMIT_BYTES = 32 * 1024 * 1024;

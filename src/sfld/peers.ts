/**
 * The hosts of the cluster as this daemon sees them: its own by direct calls, the others over mutual
 * TLS. Both have the same face, so that nothing else asks where a clone runs.
 */
import type { PeerClient } from '../cluster/client.js';
import { SnowflockError } from '../common/errors.js';
import type { DhcpCounters } from '../dhcp/counters.js';
import type { Holding } from './holdings.js';
import type { CloneName, Standing } from './orphans.js';
import type { EndReport, PrepareRequest, StartReport } from './records.js';

export interface Capacity {
  memory_bytes: number;
  vcpus: number;
}

/** What a VM looks like to `snowflock ps`. */
export interface VmSummary {
  id: string;
  name: string;
  host: string;
  kind: 'parent' | 'clone';
  state: string;
  family: number;
  vmid: number;
  ip: string;
  wire_mac: string;
  image: string;
  ram_bytes: number;
  vcpus: number;
  parent: string | null;
  created_ms: number;
}

export interface VmCounters {
  ram_pages: number;
  /** Pages of the generation on this host, however they came. */
  replica_present: number;
  replica_zero: number;
  /** Pages this VM itself waited for. */
  pages_fetched: number;
  /** Of its DHCP server. */
  dhcp: DhcpCounters | null;
}

/** A replica as `snowflock replicas` shows it. */
export interface ReplicaSummary {
  generation: string;
  kind: 'ram' | 'disk';
  host: string;
  /** VMs of this host that stand on it. */
  vms: string[];
  pages: number;
  held_pages: number;
  complete: boolean;
  /** Others may fetch from it. */
  served: boolean;
  source: {
    host: string;
    /**
     * `lost`: not heard of; `ended`: its host is back, without the parent. Either way the clones
     * live on while `unheld_pages` is 0.
     */
    state: 'live' | 'lost' | 'ended';
    /** When it was heard last, Unix time; null while it lives. */
    heard_ms: number | null;
  };
  /** Without the source: pages still needed here; held by no other host; and who holds the rest. */
  needed_pages: number | null;
  unheld_pages: number | null;
  held_by: string[];
}

export interface HostPort {
  readonly name: string;
  capacity(): Promise<Capacity>;
  /** Reserves up to n shares, `ID/0` to `ID/n-1`; returns how many were. */
  reserve(id: string, n: number, need: { memory_bytes: number; vcpus: number }): Promise<number>;
  release(id: string): Promise<void>;
  prepare(request: PrepareRequest): Promise<void>;
  start(fork: string, descriptor: Buffer): Promise<StartReport[]>;
  abort(fork: string, vms: string[]): Promise<void>;
  endClone(vm: string, end: EndReport): Promise<void>;
  reportEnd(fork: string, vmid: number, end: EndReport): Promise<void>;
  reportReply(fork: string, vmid: number, replyMs: number): Promise<void>;
  allocateVmids(family: number, n: number): Promise<number[]>;
  /** Renews the lease of clones there; returns those of them that are alive. */
  renew(from: string, vms: string[]): Promise<string[]>;
  /** How the parent's host there counts clones that run on `from`. */
  standings(from: string, clones: CloneName[]): Promise<Standing[]>;
  /** What it holds of these generations, for others to fetch. */
  holdings(generations: string[]): Promise<Holding[]>;
  /** For the router of NAT gateways: the families on the host that calls are others now. */
  familiesChanged(): Promise<void>;
  replicas(): Promise<ReplicaSummary[]>;
  list(): Promise<VmSummary[]>;
  counters(vm: string): Promise<VmCounters>;
}

/** Short calls are answered at once by a healthy host; starting clones takes as long as they do. */
const SHORT_MS = 3_000;
const START_MS = 20_000;
const END_MS = 10_000;

export class RemoteHost implements HostPort {
  readonly #client: PeerClient;
  constructor(client: PeerClient) {
    this.#client = client;
  }
  get name(): string {
    return this.#client.host.name;
  }
  capacity(): Promise<Capacity> {
    return this.#client.request('GET', '/v1/capacity', { timeoutMs: SHORT_MS });
  }
  async reserve(
    id: string,
    n: number,
    need: { memory_bytes: number; vcpus: number },
  ): Promise<number> {
    const { granted } = await this.#client.request<{ granted: number }>(
      'POST',
      '/v1/reservations',
      { body: { id, n, ...need }, timeoutMs: SHORT_MS },
    );
    return granted;
  }
  async release(id: string): Promise<void> {
    await this.#client.request('DELETE', `/v1/reservations/${encodeURIComponent(id)}`, {
      timeoutMs: SHORT_MS,
    });
  }
  async prepare(request: PrepareRequest): Promise<void> {
    await this.#client.request('POST', '/v1/forks', { body: request, timeoutMs: SHORT_MS });
  }
  async start(fork: string, descriptor: Buffer): Promise<StartReport[]> {
    const { reports } = await this.#client.request<{ reports: StartReport[] }>(
      'POST',
      `/v1/forks/${fork}/descriptor`,
      { binary: descriptor, timeoutMs: START_MS },
    );
    return reports;
  }
  async abort(fork: string, vms: string[]): Promise<void> {
    await this.#client.request('POST', `/v1/forks/${fork}/abort`, {
      body: { vms },
      timeoutMs: END_MS,
    });
  }
  async endClone(vm: string, end: EndReport): Promise<void> {
    await this.#client.request('POST', `/v1/clones/${vm}/end`, { body: end, timeoutMs: END_MS });
  }
  async reportEnd(fork: string, vmid: number, end: EndReport): Promise<void> {
    await this.#client.request('POST', `/v1/forks/${fork}/ended`, {
      body: { vmid, end },
      timeoutMs: SHORT_MS,
    });
  }
  async reportReply(fork: string, vmid: number, replyMs: number): Promise<void> {
    await this.#client.request('POST', `/v1/forks/${fork}/reply`, {
      body: { vmid, reply_ms: replyMs },
      timeoutMs: SHORT_MS,
    });
  }
  async allocateVmids(family: number, n: number): Promise<number[]> {
    const { vmids } = await this.#client.request<{ vmids: number[] }>(
      'POST',
      `/v1/families/${family}/vmids`,
      { body: { n }, timeoutMs: SHORT_MS },
    );
    return vmids;
  }
  async renew(from: string, vms: string[]): Promise<string[]> {
    const { alive } = await this.#client.request<{ alive: string[] }>('POST', '/v1/leases', {
      body: { from, vms },
      timeoutMs: SHORT_MS,
    });
    return alive;
  }
  async standings(from: string, clones: CloneName[]): Promise<Standing[]> {
    const { standings } = await this.#client.request<{ standings: Standing[] }>(
      'POST',
      '/v1/standings',
      { body: { from, clones }, timeoutMs: SHORT_MS },
    );
    return standings;
  }
  async holdings(generations: string[]): Promise<Holding[]> {
    const { holdings } = await this.#client.request<{ holdings: Holding[] }>(
      'POST',
      '/v1/holdings',
      { body: { generations }, timeoutMs: SHORT_MS },
    );
    return holdings;
  }
  async familiesChanged(): Promise<void> {
    await this.#client.request('POST', '/v1/nat/families', { body: {}, timeoutMs: SHORT_MS });
  }
  async replicas(): Promise<ReplicaSummary[]> {
    const { replicas } = await this.#client.request<{ replicas: ReplicaSummary[] }>(
      'GET',
      '/v1/replicas',
      { timeoutMs: SHORT_MS },
    );
    return replicas;
  }
  async list(): Promise<VmSummary[]> {
    const { vms } = await this.#client.request<{ vms: VmSummary[] }>('GET', '/v1/vms', {
      timeoutMs: SHORT_MS,
    });
    return vms;
  }
  counters(vm: string): Promise<VmCounters> {
    return this.#client.request('GET', `/v1/vms/${vm}/counters`, { timeoutMs: SHORT_MS });
  }
}

export class Peers {
  readonly #ports = new Map<string, HostPort>();

  constructor(ports: HostPort[]) {
    for (const port of ports) this.#ports.set(port.name, port);
  }

  /** Errors: E_PEER if the cluster has no such host. */
  get(name: string): HostPort {
    const port = this.#ports.get(name);
    if (port === undefined) throw new SnowflockError('E_PEER', `no host ${name} in this cluster`);
    return port;
  }

  all(): HostPort[] {
    return [...this.#ports.values()];
  }
}

import { SnowflockError } from '../common/errors.js';
import { writeJson } from '../common/files.js';
import { addressOfVmid, wireMac } from '../network/addresses.js';
import type { Clones } from './clones.js';
import { cloneReplied, noteEnd } from './fork.js';
import { type Holding, holdings } from './holdings.js';
import type { Host } from './host.js';
import { type CloneName, type Orphans, type Standing, standings } from './orphans.js';
import type { Capacity, HostPort, ReplicaSummary, VmCounters, VmSummary } from './peers.js';
import type { EndReport, PrepareRequest, StartReport, VmRecord } from './records.js';
import { replicasHere } from './replicas.js';
import { RESERVATION_LIFE_MS, resourcesFile, shareOf, takeVmids } from './tickets.js';
import { endVm } from './vms.js';

/** This host's own port: what others reach through the peer API, and this daemon directly. */
export class LocalHost implements HostPort {
  readonly #host: () => Host;
  readonly #clones: () => Clones;
  readonly #orphans: () => Orphans;
  readonly name: string;

  constructor(name: string, host: () => Host, clones: () => Clones, orphans: () => Orphans) {
    this.name = name;
    this.#host = host;
    this.#clones = clones;
    this.#orphans = orphans;
  }

  async capacity(): Promise<Capacity> {
    const free = this.#host().resources.free();
    return { memory_bytes: free.memoryBytes, vcpus: free.vcpus };
  }

  async reserve(
    id: string,
    n: number,
    need: { memory_bytes: number; vcpus: number },
  ): Promise<number> {
    const host = this.#host();
    const each = { memoryBytes: need.memory_bytes, vcpus: need.vcpus };
    for (let share = 0; share < n; share++) {
      try {
        host.resources.reserve(shareOf(id, share), each, RESERVATION_LIFE_MS);
      } catch (error) {
        if (!(error instanceof SnowflockError) || error.code !== 'E_CAPACITY') throw error;
        n = share;
      }
    }
    await writeJson(resourcesFile(host.config), host.resources.snapshot());
    return n;
  }

  async release(id: string): Promise<void> {
    const { resources } = this.#host();
    for (let share = 0; resources.release(shareOf(id, share)); share++);
  }

  async prepare(request: PrepareRequest): Promise<void> {
    this.#clones().prepare(request);
  }

  preparedBy(fork: string): string | undefined {
    return this.#clones().preparedBy(fork);
  }

  start(fork: string, descriptor: Buffer): Promise<StartReport[]> {
    const host = this.#host();
    return this.#clones().start(fork, descriptor, ({ parentHost, vmid, replyMs }) => {
      host.peers
        .get(parentHost)
        .reportReply(fork, vmid, replyMs)
        .catch((error: unknown) => {
          host.log.warn({ fork, vmid, error: String(error) }, 'cannot report a reply');
        });
    });
  }

  async abort(fork: string, vms: string[]): Promise<void> {
    await this.#clones().abort(fork);
    // Those that had run already: the parent's host gave them up.
    for (const vm of vms) {
      await endVm(this.#host(), vm, {
        status: null,
        reason: 'failed',
        message: 'the fork was given up by the parent host',
      });
    }
  }

  async endClone(vm: string, end: EndReport): Promise<void> {
    await endVm(this.#host(), vm, end);
  }

  async reportEnd(fork: string, vmid: number, end: EndReport): Promise<void> {
    await noteEnd(this.#host(), fork, vmid, end);
  }

  async reportReply(fork: string, vmid: number, replyMs: number): Promise<void> {
    cloneReplied(this.#host(), fork, vmid, replyMs);
  }

  allocateVmids(family: number, n: number): Promise<number[]> {
    return takeVmids(this.#host(), family, n);
  }

  async renew(from: string, vms: string[]): Promise<string[]> {
    return this.#orphans().renewed(from, vms);
  }

  async standings(from: string, clones: CloneName[]): Promise<Standing[]> {
    return standings(this.#host(), from, clones);
  }

  holdings(generations: string[]): Promise<Holding[]> {
    return holdings(this.#host(), generations);
  }

  async familiesChanged(): Promise<void> {
    this.#host().nat?.familiesChanged();
  }

  replicas(): Promise<ReplicaSummary[]> {
    return replicasHere(this.#host(), this.#orphans());
  }

  async list(): Promise<VmSummary[]> {
    const host = this.#host();
    return host.vms.all().map((record) => summary(host.config.name, record));
  }

  async counters(vm: string): Promise<VmCounters> {
    const host = this.#host();
    const record = host.vms.get(vm);
    if (record === undefined) throw new SnowflockError('E_NOT_FOUND', `no VM ${vm} here`);
    const stats = await host.dataplane.call('vm.stats', { vm });
    const replica =
      record.base === null
        ? undefined
        : await host.dataplane.call('replica.stats', { generation: record.base.ram.generation });
    return {
      ram_pages: record.ram_bytes / 4096,
      replica_present: replica?.present ?? 0,
      replica_zero: replica?.zero ?? 0,
      pages_fetched: stats.pagesFetched ?? 0,
      dhcp: host.live.get(vm)?.dhcp.counters() ?? null,
    };
  }
}

export function summary(host: string, record: VmRecord): VmSummary {
  return {
    id: record.id,
    name: record.name,
    host,
    kind: record.kind,
    state: record.state,
    family: record.family,
    vmid: record.vmid,
    ip: addressOfVmid(record.vmid),
    wire_mac: wireMac(record),
    image: record.image,
    ram_bytes: record.ram_bytes,
    vcpus: record.vcpus,
    parent: record.parent?.vm ?? null,
    created_ms: record.created_ms,
  };
}

import { mkdirSync, rmSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { Disk } from '../cow-disk/disk.js';
import { setFileCacheCapacity } from '../cow-disk/file-cache.js';
import type { VmRecord } from '../hypervisor/driver.js';
import { rescueVm } from '../hypervisor/index.js';
import { McdistServer } from '../mcdist/mcdist.js';
import { MemtapServer } from '../memtap/memtap.js';
import { RemoteReplica } from '../pagestore/remote-replica.js';
import {
  type DataplaneEvent,
  type GenerationSource,
  MISSING_RUNS_MAX,
  type PrefetchStats,
  type ReplicaStats,
} from './protocol.js';
import type { Handlers } from './rpc.js';
import { TouchOrders } from './touch-orders.js';

/** 116 bytes to the group; a source counts as lost after 30 s. */
const LENT_ANNOUNCE_MS = 1000;

export interface DataplaneOptions {
  memtapSocket: string;
  /** Group whose members (the VMs' user) may connect to memtap. */
  vmGid: number;
  /** This host's address on the uplink: requests are answered from it, groups joined on it. */
  address: string;
  mcdistPort: number;
  /** Files of disks' sealed slices open at once. */
  maxOpenFiles: number;
}

interface Fork {
  generation: string;
  /** Takes the watchdog off the caller's connection. */
  stand_down: () => void;
}

/**
 * The objects of the data plane and the methods sfld calls on them. States of a fork here:
 * begun (pre-protected, watchdog armed) -> committed (generation open) -> ended (watchdog off).
 * If the caller's connection closes before `ended`, the watchdog gives the generation up, committed
 * or not, and resumes the VM: a parent never stays paused because sfld is gone.
 */
export class Dataplane {
  readonly #options: DataplaneOptions;
  readonly #log: Logger;
  readonly #emit: (event: DataplaneEvent) => void;
  readonly #memtap: MemtapServer;
  readonly #mcdist: McdistServer;
  readonly #replicas = new Map<string, RemoteReplica>();
  readonly #disks = new Map<string, Disk>();
  readonly #forks = new Map<string, Fork>();
  readonly #served = new Set<string>();
  readonly #touched: TouchOrders;
  /** Replicas that other hosts may fetch from. */
  readonly #lent = new Map<string, RemoteReplica>();
  /** Such that were closed and may still be read by the server. */
  readonly #returning = new Map<string, Promise<void>>();
  readonly #vms = new Set<string>();

  constructor(options: DataplaneOptions, log: Logger, emit: (event: DataplaneEvent) => void) {
    this.#options = options;
    this.#log = log;
    this.#emit = emit;
    setFileCacheCapacity(options.maxOpenFiles);
    this.#memtap = new MemtapServer({ socketPath: options.memtapSocket, socketGid: options.vmGid });
    this.#mcdist = new McdistServer({
      bindAddress: options.address,
      port: options.mcdistPort,
      interfaceAddress: options.address,
    });
    this.#touched = new TouchOrders((generation) => this.#mcdist.history(generation));
    this.#memtap.on('lost', ({ vm, code, message }) =>
      emit({ event: 'vm.lost', vm, code, message }),
    );
    this.#memtap.on('generation-failed', ({ vm, generation, message }) =>
      emit({ event: 'generation.failed', vm, generation, message }),
    );
  }

  get handlers(): Handlers {
    return {
      ping: () => ({ pid: process.pid }),
      'replica.open': async (p) => {
        if (this.#replicas.has(p.generation)) return {};
        mkdirSync(dirname(p.path), { recursive: true });
        // Nothing is awaited from here on: clones of one fork ask for the same replica at once.
        const { generation } = p;
        const remote = new RemoteReplica({
          path: p.path,
          generation,
          pages: p.pages,
          medium: p.medium,
          source: {
            address: p.source.address,
            port: p.source.port,
            group: p.source.group,
            groupPort: p.source.group_port,
            key: Buffer.from(p.source.key, 'hex'),
          },
          interfaceAddress: this.#options.address,
          history: true,
        });
        remote.on('complete', () => this.#emit({ event: 'replica.complete', generation }));
        remote.on('trouble', ({ code, message }) =>
          this.#emit({ event: 'replica.trouble', generation, code, message }),
        );
        this.#replicas.set(generation, remote);
        if (p.serve) await this.#lend(generation, remote, p.source);
        return {};
      },
      'replica.server': (p) => {
        this.#replica(p.generation).reconnect({ address: p.address, port: p.port }, p.others);
        return {};
      },
      'replica.missing': (p) => {
        const { replica } = this.#replica(p.generation);
        return {
          absent: replica.absentRuns(false, MISSING_RUNS_MAX),
          needed: replica.absentRuns(true, MISSING_RUNS_MAX),
        };
      },
      'replica.zero': (p) => {
        const { replica } = this.#replica(p.generation);
        for (let i = 0; i + 1 < p.runs.length; i += 2) {
          replica.fillZero(p.runs[i] ?? 0, p.runs[i + 1] ?? 0);
        }
        return {};
      },
      'replica.prefetch': (p) => {
        this.#replica(p.generation).prefetch({ rateBytesPerS: p.rate_bytes_per_s });
        return {};
      },
      'replica.stats': (p) =>
        replicaStats(this.#replica(p.generation), this.#lent.has(p.generation)),
      'replica.close': async (p) => {
        const open = this.#replicas.get(p.generation);
        this.#replicas.delete(p.generation);
        // Removed at once, not after the wait below: a new replica of the same generation may be
        // made at this path meanwhile. The files live on for those that have them open.
        rmSync(p.path, { force: true });
        rmSync(`${p.path}.map`, { force: true });
        if (open !== undefined) await this.#takeBack(p.generation, open);
        await open?.close();
        return {};
      },
      'vm.expect': (p) => {
        if (this.#vms.has(p.vm)) return {};
        this.#memtap.expect({
          id: p.vm,
          token: p.token,
          ramBytes: p.ram_bytes,
          ...(p.replica === undefined ? {} : { replica: this.#replica(p.replica).replica.handle }),
        });
        this.#vms.add(p.vm);
        for (const { generation, directory } of p.generations) {
          try {
            this.#memtap.adoptGeneration(p.vm, { generation, directory });
          } catch (error) {
            // Its clones get an error instead of pages; the VM itself, and its disk, go on.
            const { message } = asSnowflockError(error);
            this.#emit({ event: 'generation.failed', vm: p.vm, generation, message });
          }
        }
        return {};
      },
      'vm.attached': (p) => this.#memtap.attached(p.vm, p.timeout_ms),
      'vm.fork_begin': async (p, caller) => {
        if (this.#forks.has(p.vm)) {
          throw new SnowflockError('E_STATE', `VM ${p.vm} is being forked already`);
        }
        const gone = (): void => this.#abandoned(p.vm, p.rescue);
        caller.closed.once('closed', gone);
        this.#forks.set(p.vm, {
          generation: p.generation,
          stand_down: () => caller.closed.off('closed', gone),
        });
        try {
          await mkdir(p.directory, { recursive: true });
          await this.#memtap.forkBegin(p.vm, { generation: p.generation, directory: p.directory });
        } catch (error) {
          this.#forkEnded(p.vm);
          throw error;
        }
        return {};
      },
      'vm.fork_commit': async (p) => {
        const done = await this.#memtap.forkCommit(p.vm, p.generation);
        return {
          dirty_pages: done.dirtyPages,
          zero_runs: [...done.zeroRuns],
          duration_us: done.durationUs,
        };
      },
      'vm.fork_end': (p) => {
        this.#forkEnded(p.vm);
        return {};
      },
      'vm.fork_abort': async (p) => {
        this.#forkEnded(p.vm);
        if (this.#vms.has(p.vm)) await this.#giveUp(p.vm, p.generation);
        return {};
      },
      'vm.drop_generation': async (p) => {
        try {
          await this.#memtap.dropGeneration(p.vm, p.generation);
        } catch (error) {
          // Closed while this data plane's predecessor died: it was not adopted, its files are here.
          if (asSnowflockError(error).code !== 'E_NOT_FOUND') throw error;
        }
        await rm(p.directory, { recursive: true, force: true });
        return {};
      },
      'vm.remove': (p) => {
        this.#forkEnded(p.vm);
        if (this.#vms.delete(p.vm)) this.#memtap.remove(p.vm);
        this.#touched.forget({ vm: p.vm });
        return {};
      },
      'vm.stats': (p) => ({ ...this.#memtap.stats(p.vm) }),
      'disk.create': async (p) => {
        await Disk.create(p.directory, {
          sizeBytes: p.size_bytes,
          base:
            p.replica !== undefined
              ? { kind: 'replica', generation: p.replica }
              : p.image !== undefined
                ? { kind: 'image', path: p.image }
                : { kind: 'none' },
        });
        return {};
      },
      'disk.open': async (p) => {
        const known = this.#disks.get(p.disk);
        if (known !== undefined) return { size_bytes: known.info().sizeBytes };
        const disk = await Disk.open(
          p.directory,
          p.replica === undefined ? {} : { replica: this.#replica(p.replica).replica.handle },
        );
        try {
          await disk.serve({
            socketPath: p.socket,
            exportName: p.export_name,
            uid: p.uid,
            gid: p.gid,
          });
        } catch (error) {
          await disk.close();
          throw error;
        }
        this.#disks.set(p.disk, disk);
        return { size_bytes: disk.info().sizeBytes };
      },
      'disk.prepare_fork': async (p) => {
        await this.#disk(p.disk).prepareFork();
        await this.#disk(p.disk).flush();
        return {};
      },
      'disk.fork': async (p) => {
        const { durationUs } = await this.#disk(p.disk).fork(p.generation);
        return { duration_us: durationUs };
      },
      'disk.drop_generation': async (p) => {
        await this.#disk(p.disk).dropGeneration(p.generation);
        return {};
      },
      'disk.close': async (p) => {
        const disk = this.#disks.get(p.disk);
        this.#disks.delete(p.disk);
        this.#touched.forget({ disk: p.disk });
        await disk?.close();
        return {};
      },
      'disk.stats': (p) => {
        const { lastError: _text, ...counters } = this.#disk(p.disk).stats();
        return counters;
      },
      'generation.serve': async (p) => {
        if (this.#served.has(p.generation)) return { port: this.#mcdist.port };
        const provider =
          'vm' in p.of
            ? this.#memtap.provider(p.of.vm, p.generation)
            : await this.#disk(p.of.disk).provider(p.generation);
        const history = p.replay_pages === 0 ? undefined : await this.#touched.latest(p.of);
        // Nothing is awaited from here on: two calls may come at once.
        if (!this.#served.has(p.generation)) {
          this.#mcdist.serve({
            generation: p.generation,
            key: Buffer.from(p.key, 'hex'),
            provider,
            group: p.group,
            groupPort: p.group_port,
            policy: {
              historyPages: p.replay_pages,
              ...(history === undefined ? {} : { history }),
              disjoint: pageRanges(p.disjoint),
            },
          });
          this.#served.add(p.generation);
          this.#touched.began(p.of, p.generation);
        }
        return { port: this.#mcdist.port };
      },
      'generation.unserve': async (p) => {
        if (!this.#served.delete(p.generation)) return {};
        await this.#touched.ending(p.generation);
        await this.#mcdist.unserve(p.generation);
        return {};
      },
      'generation.stats': (p) => ({ ...this.#mcdist.stats(p.generation) }),
    };
  }

  async close(): Promise<void> {
    // What guests wait at goes first: they then wait for the next data plane. If their sources went
    // first they would get errors.
    for (const disk of this.#disks.values()) await disk.close();
    this.#memtap.close();
    await this.#mcdist.close();
    for (const remote of this.#replicas.values()) await remote.close();
  }

  /** Serves what a replica holds. Not being able to costs the other hosts a server, and no VM here. */
  async #lend(generation: string, remote: RemoteReplica, source: GenerationSource): Promise<void> {
    await this.#returning.get(generation);
    // Closed, or another one in its place meanwhile.
    if (this.#replicas.get(generation) !== remote || this.#lent.has(generation)) return;
    try {
      this.#mcdist.serve({
        generation,
        key: Buffer.from(source.key, 'hex'),
        provider: remote.replica.provider,
        group: source.group,
        groupPort: source.group_port,
        // Nobody asks here while the source lives; when it is dead it is late to be heard of. Then no
        // host is new to the generation, so none is sent what others touched.
        policy: { announceMs: LENT_ANNOUNCE_MS, historyPages: 0 },
      });
      this.#lent.set(generation, remote);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      this.#emit({ event: 'replica.trouble', generation, code, message: `not served: ${message}` });
    }
  }

  async #takeBack(generation: string, remote: RemoteReplica): Promise<void> {
    if (this.#lent.get(generation) !== remote) return;
    this.#lent.delete(generation);
    const done = this.#mcdist.unserve(generation).finally(() => this.#returning.delete(generation));
    this.#returning.set(generation, done);
    await done;
  }

  #replica(generation: string): RemoteReplica {
    const open = this.#replicas.get(generation);
    if (open === undefined) {
      throw new SnowflockError('E_NOT_FOUND', `no replica of generation ${generation} is open`);
    }
    return open;
  }

  #disk(id: string): Disk {
    const disk = this.#disks.get(id);
    if (disk === undefined) throw new SnowflockError('E_NOT_FOUND', `disk ${id} is not open`);
    return disk;
  }

  #forkEnded(vm: string): void {
    this.#forks.get(vm)?.stand_down();
    this.#forks.delete(vm);
  }

  #abandoned(vm: string, rescue: VmRecord): void {
    const fork = this.#forks.get(vm);
    this.#forks.delete(vm);
    this.#log.warn({ vm }, 'sfld went away during a fork: resuming the parent');
    const cannot = (what: string) => (error: unknown) =>
      this.#log.error({ vm, error: String(error) }, what);
    void (async () => {
      // Whatever becomes of the generation, the parent runs again.
      if (fork !== undefined && this.#vms.has(vm)) {
        await this.#giveUp(vm, fork.generation).catch(cannot('cannot give up a generation'));
      }
      await rescueVm(rescue).catch(cannot('cannot resume the parent'));
    })();
  }

  /** Ends a generation that nobody will use, however far its fork had come. */
  async #giveUp(vm: string, generation: string): Promise<void> {
    try {
      await this.#memtap.forkAbort(vm, generation);
    } catch (error) {
      if (asSnowflockError(error).code !== 'E_STATE') throw error;
      // It is committed already, or never began.
      await this.#memtap.dropGeneration(vm, generation).catch((dropError: unknown) => {
        if (asSnowflockError(dropError).code !== 'E_NOT_FOUND') throw dropError;
      });
    }
  }
}

function pageRanges(runs: number[]): { first: number; count: number }[] {
  const ranges = [];
  for (let i = 0; i + 1 < runs.length; i += 2) {
    ranges.push({ first: runs[i] ?? 0, count: runs[i + 1] ?? 0 });
  }
  return ranges;
}

function replicaStats(remote: RemoteReplica, served: boolean): ReplicaStats {
  const { prefetch, client: _counters, ...stats } = remote.stats();
  if (prefetch === null) return { ...stats, served, prefetch: null };
  let error: PrefetchStats['error'] = null;
  if (prefetch.error !== null) {
    const { code, message } = asSnowflockError(prefetch.error);
    error = { code, message };
  }
  return {
    ...stats,
    served,
    prefetch: {
      state: prefetch.state,
      skipped: prefetch.skipped,
      rate_bytes_per_s: prefetch.rateBytesPerS,
      bytes_per_s: Math.round(prefetch.bytesPerS),
      pages: prefetch.pages,
      failed_pages: prefetch.failedPages,
      error,
    },
  };
}

/**
 * memtap: the memory of running VMs under the data plane's control (paper sections 3.2, 3.4).
 *
 * A VM's life here: `expect` (its process may now attach) -> `attached` -> any number of forks ->
 * `remove`. A fork: `forkBegin` (VM runs) -> pause and device state, by the caller -> `forkCommit`
 * (VM paused: the generation's instant) -> `provider` for the memory server -> `dropGeneration` when
 * no clone needs it any more. Page data never passes through JavaScript.
 *
 * After the data plane was killed, a new one says `expect` for each VM, `adoptGeneration` for each
 * generation whose `forkCommit` was called (even if the answer never came; `E_STATE` then says that
 * it did not happen), oldest first, and the agents come back by themselves.
 */
import { EventEmitter } from 'node:events';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { loadAddon, nativePath } from '../common/native.js';

/** A `Replica` object's `handle`. */
export type ReplicaHandle = unknown;
/** A generation's pages, for the memory server; like a `Replica` object's `provider`. */
export type ProviderHandle = unknown;

export interface MemtapServerOptions {
  /** Unix socket (SEQPACKET) for the agents; at most 107 bytes. A stale one is replaced. */
  socketPath: string;
  /** Permission bits of the socket; the VMs' user must be able to write to it. Default 0o660. */
  socketMode?: number;
  /** Owner and group of the socket; default: unchanged. */
  socketUid?: number;
  socketGid?: number;
  /**
   * Protect memory that was never touched by mapping the zero page first. Always so on kernels
   * before 6.4, which have no other way; here so that it can be tested on newer ones.
   */
  populate?: boolean;
  /** How long a guest's write waits for space for the old page before the generation is given up. */
  saveWaitMs?: number;
}

export interface ExpectedVm {
  id: string;
  /** Secret shared with the VM's process; at most 135 characters. */
  token: string;
  ramBytes: number;
  /** A clone's memory; without it the VM boots with empty memory. */
  replica?: ReplicaHandle;
}

export interface ForkCommit {
  /** Pages written between forkBegin and forkCommit, protected again while the VM was paused. */
  dirtyPages: number;
  /** Pages known to be zero at the instant: first, count, first, count, ... */
  zeroRuns: Uint32Array;
  durationUs: number;
}

export interface MemtapStats {
  /** Faults on pages that were not in the replica. */
  missingFaults: number;
  /** Writes to protected pages. */
  wpFaults: number;
  /** Faulted pages that had to be fetched into the replica first. */
  pagesFetched: number;
  /** Faults answered with zeros. */
  zeroPages: number;
  /** Old pages copied into a generation. */
  savedPages: number;
  /** Writes to pages that were protected without need. */
  spuriousFaults: number;
  /** Writes between forkBegin and forkCommit. */
  dirtiedPages: number;
  /** Saved pages handed on to an older generation by dropGeneration. */
  movedPages: number;
  /** Reads of generations that looked at the running VM. */
  liveReads: number;
  /** Generations in existence. */
  generations: number;
}

export interface MemtapEvents {
  attached: [event: { vm: string; pid: number }];
  /** The VM's process has ended. */
  detached: [event: { vm: string; pid: number }];
  /** A page of a clone cannot be had any more; the guest waits for it for ever: end the VM. */
  lost: [event: { vm: string; code: string; message: string }];
  /** The generation lost a page to its running parent (no space); it reads as an error. */
  'generation-failed': [event: { vm: string; generation: string; code: string; message: string }];
}

interface NativeServer {
  expect(id: string, token: string, ramBytes: number, replica?: ReplicaHandle): void;
  pid(id: string): number;
  forkBegin(id: string, generation: string, directory: string): Promise<void>;
  forkCommit(id: string, generation: string): Promise<ForkCommit>;
  forkAbort(id: string, generation: string): Promise<void>;
  dropGeneration(id: string, generation: string): Promise<void>;
  adoptGeneration(id: string, generation: string, directory: string): void;
  provider(id: string, generation: string): ProviderHandle;
  remove(id: string): void;
  stats(id: string): MemtapStats;
  close(): void;
}

interface NativeSource {
  served(): number;
  close(): void;
}

type NativeEvent = {
  [K in keyof MemtapEvents]: { type: K } & MemtapEvents[K][0];
}[keyof MemtapEvents];

interface Addon {
  MemtapServer: new (
    options: Required<MemtapServerOptions>,
    emit: (event: NativeEvent) => void,
  ) => NativeServer;
  LocalSource: new (
    replica: ReplicaHandle,
    provider: ProviderHandle,
    patienceMs: number,
  ) => NativeSource;
  readPages(provider: ProviderHandle, first: number, count: number): Promise<Buffer>;
}

const addon = (): Addon => loadAddon<Addon>('dataplane');

function guard<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw asSnowflockError(error);
  }
}

async function guardAsync<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw asSnowflockError(error);
  }
}

/** What a VM's process needs in its environment to attach to the server at `socketPath`. */
export function agentEnvironment(vm: {
  socketPath: string;
  id: string;
  token: string;
}): Record<string, string> {
  return {
    LD_PRELOAD: nativePath('memtap-agent.so'),
    SF_MEMTAP_SOCKET: vm.socketPath,
    SF_MEMTAP_VM: vm.id,
    SF_MEMTAP_TOKEN: vm.token,
  };
}

/** Serves the memory of a host's VMs. Errors are SnowflockErrors. Keeps the process alive. */
export class MemtapServer extends EventEmitter<MemtapEvents> {
  readonly #native: NativeServer;
  /** Ends the waits of `attached` when the VM is removed or the server closed. */
  readonly #waits = new Map<string, Set<(error: SnowflockError) => void>>();

  /** @throws SnowflockError E_USERFAULTFD, E_IN_USE (another server at the socket), E_IO */
  constructor(options: MemtapServerOptions) {
    super();
    this.#native = guard(
      () =>
        new (addon().MemtapServer)(
          {
            socketMode: 0o660,
            socketUid: -1,
            socketGid: -1,
            populate: false,
            saveWaitMs: 1000,
            ...options,
          },
          (event) => this.#deliver(event),
        ),
    );
  }

  #deliver(event: NativeEvent): void {
    const { type, ...rest } = event;
    (this as EventEmitter).emit(type, rest);
  }

  /** Lets the VM's process attach. @throws SnowflockError E_EXISTS, E_REPLICA_MISMATCH */
  expect(vm: ExpectedVm): void {
    guard(() => this.#native.expect(vm.id, vm.token, vm.ramBytes, vm.replica));
  }

  /**
   * Resolves when the VM's process has handed its memory over.
   * @throws SnowflockError E_TIMEOUT, E_NOT_FOUND, E_CLOSED (removed while waiting)
   */
  async attached(id: string, timeoutMs: number): Promise<{ pid: number }> {
    const pid = guard(() => this.#native.pid(id));
    if (pid >= 0) return { pid };
    return await new Promise((resolve, reject) => {
      const waits = this.#waits.get(id) ?? new Set();
      this.#waits.set(id, waits);
      const end = (): void => {
        clearTimeout(timer);
        this.off('attached', onAttached);
        waits.delete(fail);
        if (waits.size === 0) this.#waits.delete(id);
      };
      const fail = (error: SnowflockError): void => {
        end();
        reject(error);
      };
      const onAttached = (event: { vm: string; pid: number }): void => {
        if (event.vm !== id) return;
        end();
        resolve({ pid: event.pid });
      };
      const timer = setTimeout(
        () => fail(new SnowflockError('E_TIMEOUT', `VM ${id} did not attach in ${timeoutMs} ms`)),
        timeoutMs,
      );
      waits.add(fail);
      this.on('attached', onAttached);
    });
  }

  /**
   * Protects all RAM while the VM runs. `directory` (made if missing, on tmpfs) will hold the
   * generation's saved pages.
   * @throws SnowflockError E_STATE (not attached, or being forked), E_EXISTS, E_NO_SPACE, E_IO
   */
  async forkBegin(id: string, fork: { generation: string; directory: string }): Promise<void> {
    await guardAsync(() => this.#native.forkBegin(id, fork.generation, fork.directory));
  }

  /**
   * Makes the generation of this instant. The VM must be paused from before its device state was
   * captured until this resolves; otherwise the pages are of different instants.
   * @throws SnowflockError E_STATE; the fork is then still to be aborted
   */
  async forkCommit(id: string, generation: string): Promise<ForkCommit> {
    return await guardAsync(() => this.#native.forkCommit(id, generation));
  }

  /** Undoes forkBegin. @throws SnowflockError E_STATE */
  async forkAbort(id: string, generation: string): Promise<void> {
    await guardAsync(() => this.#native.forkAbort(id, generation));
  }

  /**
   * Takes over a generation of an earlier data plane; oldest first, before the VM's process is back.
   * @throws SnowflockError E_STATE (never committed; its files are removed), E_NOT_FOUND,
   *   E_REPLICA_MISMATCH, E_IN_USE, E_EXISTS
   */
  adoptGeneration(id: string, fork: { generation: string; directory: string }): void {
    guard(() => this.#native.adoptGeneration(id, fork.generation, fork.directory));
  }

  /** No clone needs it any more. Its files are removed. @throws SnowflockError E_NOT_FOUND, E_STATE */
  async dropGeneration(id: string, generation: string): Promise<void> {
    await guardAsync(() => this.#native.dropGeneration(id, generation));
  }

  /**
   * The generation's pages, for the memory server. A read gives an error once the generation is
   * dropped or failed or its VM gone. It gives "absent" for a nested parent's page that this host is
   * fetching itself, and while a VM is about to attach again: ask again.
   * @throws SnowflockError E_NOT_FOUND
   */
  provider(id: string, generation: string): ProviderHandle {
    return guard(() => this.#native.provider(id, generation));
  }

  /** The VM is no more; its generations and their files go. @throws SnowflockError E_NOT_FOUND */
  remove(id: string): void {
    guard(() => this.#native.remove(id));
    this.#endWaits(id, `VM ${id} was removed`);
  }

  /** @throws SnowflockError E_NOT_FOUND */
  stats(id: string): MemtapStats {
    return guard(() => this.#native.stats(id));
  }

  /** Stops serving. VMs run on until they fault, and then wait for the next server. */
  close(): void {
    this.#native.close();
    for (const id of [...this.#waits.keys()]) this.#endWaits(id, 'the memtap server was closed');
  }

  #endWaits(id: string, message: string): void {
    for (const fail of [...(this.#waits.get(id) ?? [])])
      fail(new SnowflockError('E_CLOSED', message));
  }
}

/** Fills a replica from a generation of this same process, without a network. */
export class LocalSource {
  readonly #native: NativeSource;

  /**
   * `patienceMs`: how long a page that the generation does not have yet is waited for.
   * @throws SnowflockError E_REPLICA_MISMATCH
   */
  constructor(replica: ReplicaHandle, provider: ProviderHandle, patienceMs = 30_000) {
    this.#native = guard(() => new (addon().LocalSource)(replica, provider, patienceMs));
  }
  /** Pages served so far. */
  get served(): number {
    return this.#native.served();
  }
  close(): void {
    this.#native.close();
  }
}

/**
 * A generation's bytes, zeros included; for checks and tools.
 * @throws SnowflockError E_STATE (a page is not here yet), E_SOURCE_LOST (it cannot be read)
 */
export async function readPages(
  provider: ProviderHandle,
  first: number,
  count: number,
): Promise<Buffer> {
  return await guardAsync(() => addon().readPages(provider, first, count));
}

import { SnowflockError } from '../common/errors.js';
import { checkGenerationId, checkGenerationName } from './entries.js';
import { addon, type NativeDisk, type NativeStats, native, nativeSync } from './native.js';
import {
  type ServedExport,
  type ServeOptions,
  type SharedServer,
  serveDevice,
} from './nbd-server.js';
import {
  diskOf,
  nativeChain,
  publicBase,
  type ReplicaHandle,
  type StoreParts,
  sliceOf,
} from './parts.js';
import { createSingle, openSingle } from './single.js';
import { newSliceId } from './slice-files.js';
import type { DiskBase } from './store-api.js';
import { type OpenGeneration, openView } from './view.js';

export type { ServedExport, ServeOptions, SharedServer } from './nbd-server.js';
export type { ReplicaHandle } from './parts.js';
export type { DiskBase } from './store-api.js';

export interface ForkResult {
  generation: string;
  /** The slice that was sealed: the newest one of the generation. */
  slice: string;
  /** How long writes were held off, in microseconds. */
  durationUs: number;
}

export interface SliceInfo {
  id: string;
  /** `settling`: immutable already, not durable or not in the journal yet. */
  state: 'open' | 'settling' | 'sealed';
  /** The generation it was sealed as, if somebody still wants it. */
  generation: string | undefined;
  /** False when its generation was dropped: it waits to be merged with the one on it. */
  referenced: boolean;
}

export interface DiskInfo {
  sizeBytes: number;
  /** Pages of the disk; the last one may go beyond its size. */
  pages: number;
  base: DiskBase;
  /** Oldest first; the last is the top. */
  slices: SliceInfo[];
  /** Those of this disk's own that its top lies on, oldest first. */
  generations: string[];
  indexBytes: number;
}

export interface DiskStats extends NativeStats {
  errors: number;
  connections: number;
}

/** A fork that the journal does not tell of yet. */
interface Pending {
  generation: string;
  name: string | null;
  /** The slice sealed by it. */
  slice: string;
  created_ms: number;
  /** False: whoever forked was told that it failed, so it gets no entry. */
  wanted: boolean;
  release(): void;
}

/** What a disk needs of its store besides. */
export interface DiskOwner {
  parts: StoreParts;
  replica: ReplicaHandle | undefined;
  /** Takes a generation id and, if given, a name for this disk. E_EXISTS, E_CAPACITY. */
  reserve(disk: string, generation: string, name: string | null): { release(): void };
  removeGeneration(disk: string, generation: string): Promise<void>;
  /** The native disk is closed. */
  closed(disk: Disk): Promise<void>;
}

/**
 * An open disk of a store: slices of 4 KiB pages over a base, served by NBD, forked in constant time.
 *
 * A fork needs a *spare*, an empty slice made ahead of time and named in the journal, so that while
 * the VM is paused nothing is created and nothing synced. After a fork, in the background: the
 * sealed slice is made durable, a new spare is made, a transaction names both. `prepareFork()` waits
 * for that and is to be called before the VM is paused. A kill or power cut anywhere in between
 * leaves a store that opens: see docs/disk-format.md.
 */
export class Disk {
  readonly name: string;
  readonly directory: string;
  /** Where it can be reached; kept by those who serve it (list() shows it). */
  readonly exports: { socket: string; name: string }[] = [];
  readonly #owner: DiskOwner;
  readonly #native: NativeDisk;
  #pending: Pending | undefined;
  #renewing = false;
  /** All forks so far are durable and in the journal; a spare may be lacking. */
  #settled = true;
  /** A spare made, but not named by the journal yet. */
  #made: string | undefined;
  /** Settled when a spare is attached and the journal up to date; rejected if that failed. */
  #ready: Promise<void> = Promise.resolve();
  #turn: Promise<unknown> = Promise.resolve();
  #served = new Set<ServedExport>();
  /** What works on the disk for long (flatten): it ends soon after the disk is closed. */
  readonly #works = new Set<Promise<unknown>>();
  #closing: Promise<void> | undefined;

  /** By Store.openDisk() only. */
  constructor(name: string, owner: DiskOwner, opened: NativeDisk) {
    this.name = name;
    this.directory = owner.parts.directory;
    this.#owner = owner;
    this.#native = opened;
  }

  /**
   * Makes a store with one disk, named `disk`, in `directory`, which is created if missing and must
   * not hold one (E_EXISTS). An image base is not larger than the disk, a replica exactly as large.
   */
  static async create(
    directory: string,
    options: { sizeBytes: number; base?: DiskBase },
  ): Promise<void> {
    await createSingle(directory, options);
  }

  /**
   * Opens the disk named `disk` of a store, which has one owner at a time (E_IN_USE); closing it
   * closes the store. A disk over a replica needs the replica of that generation
   * (`options.replica`, else E_ARGUMENT; of another one: E_REPLICA_MISMATCH).
   */
  static async open(directory: string, options: { replica?: ReplicaHandle } = {}): Promise<Disk> {
    return openSingle(directory, options);
  }

  get closing(): boolean {
    return this.#closing !== undefined;
  }

  /** The native disk, for an NBD server with several exports. */
  get device(): NativeDisk {
    this.#check();
    return this.#native;
  }

  /** Serves the writable disk: on a socket of its own, or as an export of a server. */
  async serve(options: ServeOptions | SharedServer): Promise<ServedExport> {
    this.#check();
    const socket = 'server' in options ? options.server.socketPath : options.socketPath;
    const served = await serveDevice(
      nativeSync(() => this.#native.device()),
      options,
    );
    const address = { socket: socket ?? '', name: options.exportName ?? '' };
    if (socket !== undefined) this.exports.push(address);
    return this.#keep(served, () => {
      const at = this.exports.indexOf(address);
      if (at >= 0) this.exports.splice(at, 1);
    });
  }

  /** Serves a generation read-only; closing the result ends it. E_NOT_FOUND. */
  async serveGeneration(
    generation: string,
    options: ServeOptions | SharedServer,
  ): Promise<ServedExport> {
    const view = await this.openGeneration(generation);
    try {
      return await this.#keep(await view.serve(options), () => undefined);
    } finally {
      view.close(); // its server keeps it
    }
  }

  /** What is served ends with the disk. */
  async #keep(served: ServedExport, ended: () => void): Promise<ServedExport> {
    const close = async () => {
      await served.close();
      this.#served.delete(kept);
      ended();
    };
    const kept = { ...served, close };
    if (this.#closing !== undefined) {
      await close(); // the disk was closed meanwhile, and did not know of it
      this.#check();
    }
    this.#served.add(kept);
    return kept;
  }

  /** Waits until a fork can be done without making or syncing anything. Repeats what failed. */
  async prepareFork(): Promise<void> {
    this.#check();
    await this.#ready.catch(() => undefined); // what failed is repeated, and its error thrown, here
    if (this.#pending === undefined && this.#native.info().spare) return;
    if (!this.#renewing) this.#renewLater();
    await this.#ready;
  }

  /** Waits until the journal tells of every fork so far. Needs no spare. */
  async journalled(): Promise<void> {
    if (this.#pending === undefined) return;
    try {
      await this.prepareFork();
    } catch (error) {
      if (!this.#settled) throw error;
    }
  }

  /** A fork that the journal could not be told of: once it can, the generation gets no entry. */
  giveUp(generation: string): void {
    if (this.#pending?.generation !== generation) return;
    this.#pending.wanted = false;
    this.#pending.release();
  }

  /**
   * Seals the top slice as `generation` (32 hex digits) and goes on in the spare. The generation
   * survives the death of this process at once; a power cut once `prepareFork()` resolves, or the
   * guest has flushed. On an error nothing has changed. E_EXISTS, E_ARGUMENT, E_NO_SPACE, E_IO.
   */
  async fork(generation: string, options: { name?: string } = {}): Promise<ForkResult> {
    return this.#inTurn(async () => {
      checkGenerationId(generation);
      const name = options.name ?? null;
      if (name !== null) checkGenerationName(name);
      const reserved = this.#owner.reserve(this.name, generation, name);
      try {
        await this.prepareFork();
        const done = await native(() => this.#native.fork(generation));
        const { release } = reserved;
        const { slice } = done;
        this.#pending = {
          generation,
          name,
          slice,
          created_ms: Date.now(),
          wanted: true,
          release,
        };
        this.#settled = false;
        this.#renewLater();
        return { generation, slice: done.slice, durationUs: done.durationUs };
      } catch (error) {
        reserved.release();
        throw error;
      }
    });
  }

  /** The generation's pages, for a page server. Readable until dropped by all who hold it. */
  async provider(generation: string): Promise<unknown> {
    const view = await this.openGeneration(generation);
    try {
      return view.provider();
    } finally {
      view.close(); // the provider keeps it
    }
  }

  /** A generation of the disk, by id, also one just forked. Read-only. E_NOT_FOUND. */
  async openGeneration(generation: string): Promise<OpenGeneration> {
    this.#check();
    const { parts, replica } = this.#owner;
    return openView(parts, replica, (tree) => {
      if (generation === this.#pending?.generation) return this.#pending.slice;
      const entry = tree.generations.get(generation);
      if (entry === undefined || !this.#has(generation)) {
        throw new SnowflockError(
          'E_NOT_FOUND',
          `disk ${this.name} has no generation ${generation}`,
        );
      }
      return entry.slice;
    });
  }

  /** Nobody will ask for this generation any more: its space is given back in time. E_NOT_FOUND. */
  async dropGeneration(generation: string): Promise<void> {
    this.#check();
    await this.journalled();
    await this.#owner.removeGeneration(this.name, generation);
  }

  /** Makes everything written so far durable. */
  async flush(): Promise<void> {
    this.#check();
    await native(() => this.#native.settle());
  }

  info(): DiskInfo {
    this.#check();
    const { tree } = this.#owner.parts.ledger;
    const { top } = diskOf(tree, this.name);
    const { indexBytes } = nativeSync(() => this.#native.info());
    const slices: SliceInfo[] = [];
    const generations: string[] = [];
    if (this.#pending !== undefined) {
      const id = nativeSync(() => this.#native.info()).top;
      slices.push({ id, state: 'open', generation: undefined, referenced: true });
    }
    for (const [id] of tree.down(top)) {
      const settling = id === this.#pending?.slice;
      const generation = settling ? this.#pending?.generation : tree.generationAt(id);
      const state = settling ? 'settling' : id === top ? 'open' : 'sealed';
      slices.push({ id, state, generation, referenced: generation !== undefined || id === top });
      if (generation === undefined) continue;
      if (settling || tree.generations.get(generation)?.disk === this.name) {
        generations.push(generation);
      }
    }
    const sizeBytes = sliceOf(tree, top).size_bytes;
    return {
      sizeBytes,
      pages: Math.ceil(sizeBytes / 4096),
      base: publicBase(tree.base(top)),
      slices: slices.reverse(),
      generations: generations.reverse(),
      indexBytes,
    };
  }

  stats(): DiskStats {
    this.#check();
    const stats = this.#native.stats();
    let connections = 0;
    for (const served of this.#served) connections += served.connections();
    return { ...stats, errors: stats.ioErrors + stats.noSpaceErrors, connections };
  }

  /** Runs what goes on beside everything else; `check` throws E_CLOSED when it has to end. */
  async during<T>(work: (check: () => void) => Promise<T>): Promise<T> {
    this.#check();
    const done = work(() => this.#check());
    const quiet = done.then(
      () => undefined,
      () => undefined, // its caller has the error
    );
    this.#works.add(quiet);
    try {
      return await done;
    } finally {
      this.#works.delete(quiet);
    }
  }

  /** Runs `work` while the disk is not forked, with all forks so far in the journal. */
  async withoutForks<T>(work: () => Promise<T>): Promise<T> {
    return this.#inTurn(async () => {
      await this.journalled();
      return work();
    });
  }

  /**
   * Ends the servers, makes everything durable and gives up the disk, also if that fails (the error
   * is thrown after). Providers handed out stay readable.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    await Promise.all([...this.#served].map((served) => served.close()));
    await Promise.all(this.#works);
    await this.#turn.catch(() => undefined);
    const renewed = await this.#ready.then(
      () => undefined,
      (error: unknown) => ({ error }),
    );
    try {
      await native(() => this.#native.close());
    } finally {
      await this.#owner.closed(this);
    }
    if (renewed !== undefined && !this.#settled) throw renewed.error;
  }

  #check(): void {
    if (this.#closing !== undefined) {
      throw new SnowflockError('E_CLOSED', `disk ${this.name} of ${this.directory} is closed`);
    }
  }

  /** One fork at a time. */
  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    this.#check();
    const turn = this.#turn.then(work, work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  /** Sealed from this disk, or one that its top lies on. */
  #has(generation: string): boolean {
    const { tree } = this.#owner.parts.ledger;
    const entry = tree.generations.get(generation);
    if (entry?.disk === this.name) return true;
    for (const [id] of tree.down(diskOf(tree, this.name).top)) if (id === entry?.slice) return true;
    return false;
  }

  #renewLater(): void {
    this.#renewing = true;
    this.#ready = this.#renew().finally(() => {
      this.#renewing = false;
    });
    this.#ready.catch(() => undefined); // whoever needs the spare learns of it
  }

  /** The order matters: nothing is named in the journal before it is durable. */
  async #renew(): Promise<void> {
    const { ledger } = this.#owner.parts;
    this.#settled = false;
    await native(() => this.#native.settle());
    const { top, spare } = diskOf(ledger.tree, this.name);
    if ((this.#pending !== undefined || spare === null) && this.#made === undefined) {
      const id = newSliceId();
      const { size_bytes } = sliceOf(ledger.tree, top);
      await native(() => addon().createSlice(this.directory, id, size_bytes, true));
      this.#made = id;
    }
    await this.#journal();
    this.#settled = true;
    if (!this.#native.info().spare) {
      const attach = diskOf(ledger.tree, this.name).spare;
      if (attach === null) throw new SnowflockError('E_INTERNAL', `disk ${this.name} has no spare`);
      await native(() => this.#native.attachSpare(attach));
    }
  }

  /** One transaction for the fork that happened and the spare of the next one. */
  async #journal(): Promise<void> {
    const [pending, made] = [this.#pending, this.#made];
    if (made === undefined) return;
    const { ledger, changed } = this.#owner.parts;
    await ledger.commit((tree) => {
      const disk = diskOf(tree, this.name);
      if (pending === undefined) return { disks: { [this.name]: { ...disk, spare: made } } };
      if (disk.spare === null || pending.slice !== disk.top) {
        throw new SnowflockError('E_INTERNAL', `disk ${this.name} forked without a spare`);
      }
      const { size_bytes } = sliceOf(tree, disk.top);
      const { slice, generation, name, created_ms, wanted } = pending;
      const entry = { slice, disk: this.name, name, created_ms };
      return {
        slices: { [disk.spare]: { parent: disk.top, size_bytes, map: 0 } },
        ...(wanted ? { generations: { [generation]: entry } } : {}),
        disks: { [this.name]: { ...disk, top: disk.spare, spare: made } },
      };
    });
    this.#made = undefined;
    this.#pending = undefined;
    pending?.release();
    changed();
  }

  /** After a death: the fork that the journal does not tell of. By the store, before anything else. */
  async recover(): Promise<void> {
    const generation = this.#native.recovered();
    if (generation === '') return;
    const { top } = diskOf(this.#owner.parts.ledger.tree, this.name);
    const release = () => undefined;
    const created_ms = Date.now();
    this.#pending = { generation, name: null, slice: top, created_ms, wanted: true, release };
    await this.#renew();
  }

  /** The chain as the native store wants it. */
  static chain(parts: StoreParts, name: string) {
    const disk = diskOf(parts.ledger.tree, name);
    return { ...nativeChain(parts.ledger.tree, disk.top), spare: disk.spare ?? '' };
  }
}

import { SnowflockError } from '../common/errors.js';
import { newGenerationId } from '../common/ids.js';
import { Cleaner } from './cleaner.js';
import { describeDisk } from './create.js';
import type { Disk } from './disk.js';
import { checkDiskName, ID, MAX_GENERATIONS, MAX_SLICES } from './entries.js';
import { type FileCacheStats, fileCacheStats, setFileCacheCapacity } from './file-cache.js';
import { flatten } from './flatten.js';
import { Gate } from './gate.js';
import { Journal, makeFolder } from './journal.js';
import { Ledger } from './ledger.js';
import { diskEntry, generationEntry } from './listing.js';
import { addon, native } from './native.js';
import { OpenDisks } from './open-disks.js';
import { diskOf, type ReplicaHandle, type StoreParts, sliceOf } from './parts.js';
import { checkNamedFiles, removeStrays } from './recover.js';
import { commitClone, removedDisk, renamedDisk, rolledBack } from './reshape.js';
import { newSliceId, removeFiles } from './slice-files.js';
import type {
  CreateDisk,
  DiskEntry,
  DiskErrors,
  GenerationEntry,
  StoreApi,
  StoreListing,
  StoreTask,
  StoreUsage,
} from './store-api.js';
import type { Tree } from './tree.js';
import { storeUsage } from './usage.js';
import { type OpenGeneration, openView } from './view.js';

export interface StoreOptions {
  /** Bytes a second that clean-up may read and write; 64 MiB by default, 0: no clean-up. */
  gc_bytes_per_s?: number;
  /** Files of sealed slices open at once in this process, from now on (setFileCacheCapacity()). */
  max_open_files?: number;
  /** The replica of a generation of another host, for disks over one that no caller opens. */
  replica?: (
    generation: string,
    size_bytes: number,
  ) => ReplicaHandle | undefined | Promise<ReplicaHandle | undefined>;
  /** The store closes with the first disk that is closed (a store of one disk). */
  closeWithDisk?: boolean;
}

/** What disks and generations of a store read of a replica. */
export interface ReplicaUse {
  size_bytes: number;
  /** False: also something that no open disk tells the replica of, so it needs all its pages. */
  told: boolean;
}

/**
 * An open store: its journal and tree, the disks that are open, and clean-up in the background.
 *
 * Order of things: files are made and synced, then a transaction names them; a transaction stops
 * naming files (and lists them as `removed`), then they go. So a death at any point leaves files
 * that no entry names, never an entry without its files. What nobody names is removed when the store
 * is opened if it provably holds nothing (recover.ts).
 */
export class Store implements StoreApi {
  readonly directory: string;
  readonly #parts: StoreParts;
  readonly #options: StoreOptions;
  readonly #cleaner: Cleaner;
  readonly #disks: OpenDisks;
  readonly #flattening = new Map<string, StoreTask>();
  /** Generations being made: id, and `DISK@NAME` if it has one. */
  readonly #reserved = new Map<string, string | null>();
  #closing: Promise<void> | undefined;

  private constructor(parts: Omit<StoreParts, 'changed'>, options: StoreOptions) {
    this.directory = parts.directory;
    this.#parts = { ...parts, changed: () => this.#cleaner.wake() };
    this.#options = options;
    this.#cleaner = new Cleaner(this.#parts, options.gc_bytes_per_s ?? 64 * 2 ** 20);
    this.#disks = new OpenDisks(this.#parts, {
      replicaBelow: (slice) => this.#replicaBelow(slice),
      reserve: (disk, generation, name) => this.#reserve(disk, generation, name),
      removeGeneration: (disk, generation) => this.removeGeneration({ disk, generation }),
      closed: (owned) => this.#diskClosed(owned),
    });
  }

  /** Makes an empty store in `directory`, which is created if missing. E_EXISTS, E_NO_SPACE, E_IO. */
  static async create(directory: string): Promise<void> {
    await makeFolder(directory).catch((error: unknown) => {
      const { code } = error as NodeJS.ErrnoException;
      throw new SnowflockError('E_IO', `cannot make ${directory}: ${code}`, { cause: error });
    });
    await Journal.create(directory);
  }

  /**
   * Opens a store. One owner at a time (E_IN_USE). Puts right what a death left half done. E_CORRUPT
   * if journal and files do not fit together; then nothing was changed. E_NOT_FOUND, E_IO, E_ARGUMENT.
   */
  static async open(directory: string, options: StoreOptions = {}): Promise<Store> {
    if (options.max_open_files !== undefined) setFileCacheCapacity(options.max_open_files);
    await Journal.exists(directory); // before a lock file is made where no store is
    const opened = await native(() => addon().openStore(directory));
    let ledger: Ledger | undefined;
    try {
      ledger = await Ledger.open(directory);
      const strays = await checkNamedFiles(directory, ledger.tree);
      await removeStrays(directory, strays);
      const gate = new Gate();
      const store = new Store({ directory, ledger, native: opened, gate }, options);
      await store.#disks.recover();
      store.#cleaner.wake();
      return store;
    } catch (error) {
      await ledger?.close();
      await native(() => opened.close()).catch(() => undefined);
      throw error;
    }
  }

  /** What createDisk() would refuse, without making anything. E_ARGUMENT, E_IMAGE_UNKNOWN. */
  static async checkDisk(p: CreateDisk): Promise<void> {
    await describeDisk(p);
  }

  async createDisk(p: CreateDisk): Promise<DiskEntry> {
    this.#check();
    const { base, size_bytes } = await describeDisk(p);
    return this.#newDisk(p.name, size_bytes, (top) => ({
      [top]: { parent: null, base, size_bytes, map: 0 },
    }));
  }

  async clone(p: { disk: string; generation: string; name: string }): Promise<DiskEntry> {
    this.#check();
    checkDiskName(p.name);
    await this.#disks.journalled(p.disk);
    const { tree } = this.#parts.ledger;
    const { slice } = this.#generation(tree, p.disk, p.generation);
    const { size_bytes } = sliceOf(tree, slice);
    return this.#newDisk(p.name, size_bytes, (top, now) => ({
      [top]: { parent: this.#generation(now, p.disk, p.generation).slice, size_bytes, map: 0 },
    }));
  }

  async snapshot(p: { disk: string; name?: string }): Promise<GenerationEntry> {
    this.#check();
    const id = newGenerationId();
    await this.#disks.with(p.disk, async (disk) => {
      await disk.fork(id, p.name === undefined ? {} : { name: p.name });
      try {
        await disk.journalled();
      } catch (error) {
        disk.giveUp(id); // what is told to have failed must not be there later
        throw error;
      }
    });
    return generationEntry(this.#parts.ledger.tree, id);
  }

  async removeGeneration(p: { disk: string; generation: string }): Promise<void> {
    this.#check();
    await this.#disks.journalled(p.disk);
    await this.#parts.ledger.commit((tree) => {
      const { id } = this.#generation(tree, p.disk, p.generation);
      return { generations: { [id]: null } };
    });
    this.#parts.changed();
  }

  async removeDisk(p: { disk: string }): Promise<void> {
    this.#check();
    await this.#parts.ledger.commit((tree) => {
      this.#disks.checkUnused(p.disk);
      return removedDisk(tree, p.disk);
    });
    this.#disks.removed(p.disk);
    this.#parts.changed();
  }

  /** A disk that is not open gets another name, at once. E_EXISTS, E_NOT_FOUND, E_IN_USE. */
  async renameDisk(p: { disk: string; name: string }): Promise<DiskEntry> {
    this.#check();
    checkDiskName(p.name);
    await this.#disks.journalled(p.disk);
    await this.#parts.ledger.commit((tree) => {
      this.#disks.checkUnused(p.disk);
      this.#checkFree(tree, p.name);
      return renamedDisk(tree, p.disk, p.name);
    });
    return this.#entry(p.name);
  }

  async rollback(p: { disk: string; generation: string }): Promise<void> {
    this.#check();
    this.#disks.checkUnused(p.disk);
    await this.#disks.journalled(p.disk);
    const { tree } = this.#parts.ledger;
    const { size_bytes } = sliceOf(tree, this.#generation(tree, p.disk, p.generation).slice);
    await this.#withNewSlice(size_bytes, (top) =>
      this.#parts.ledger.commit((now) => {
        this.#disks.checkUnused(p.disk);
        return rolledBack(now, p.disk, this.#generation(now, p.disk, p.generation).slice, top);
      }),
    );
    this.#parts.changed();
  }

  async flatten(p: {
    disk: string;
    rate_bytes_per_s?: number;
    signal?: AbortSignal;
  }): Promise<void> {
    this.#check();
    if (this.#flattening.has(p.disk)) {
      throw new SnowflockError('E_STATE', `disk ${p.disk} is being flattened already`);
    }
    const task: StoreTask = {
      kind: 'flatten',
      disk: p.disk,
      done_bytes: 0,
      total_bytes: null,
      error: null,
    };
    this.#flattening.set(p.disk, task);
    try {
      await this.#disks.with(p.disk, (disk) =>
        flatten(
          this.#parts,
          disk,
          task,
          p.rate_bytes_per_s ?? Number.POSITIVE_INFINITY,
          p.signal ?? new AbortController().signal,
        ),
      );
    } finally {
      this.#flattening.delete(p.disk);
    }
    this.#parts.changed();
  }

  async commit(p: { disk: string; discard?: boolean }): Promise<{ origin: string }> {
    this.#check();
    await this.#disks.journalled(p.disk);
    const origin = await commitClone(this.#parts, p.disk, p.discard === true, (name) =>
      this.#disks.checkUnused(name),
    );
    this.#parts.changed();
    return { origin };
  }

  async list(): Promise<StoreListing> {
    this.#check();
    const { tree } = this.#parts.ledger;
    const disks: DiskEntry[] = [];
    for (const name of tree.disks.keys()) disks.push(await this.#entry(name));
    const generations = [...tree.generations.keys()].map((id) => generationEntry(tree, id));
    return { directory: this.directory, disks, generations };
  }

  async usage(): Promise<StoreUsage> {
    this.#check();
    return storeUsage(this.directory, this.#parts.ledger.tree);
  }

  async tasks(): Promise<StoreTask[]> {
    this.#check();
    return [
      ...this.#cleaner.tasks(),
      ...[...this.#flattening.values()].map((task) => ({ ...task })),
    ];
  }

  async settled(): Promise<void> {
    this.#check();
    await this.#cleaner.settled();
  }

  /** Clean-up goes on at this rate; 0 stops it. */
  setCleanupRate(bytes_per_s: number): void {
    this.#cleaner.setRate(bytes_per_s);
  }

  /**
   * Sealed slices' files that are open, of all stores of this process. Besides, an open disk has
   * seven files or fewer of its top, its spare and a slice that settles, each, and a clean-up one.
   */
  openFiles(): FileCacheStats {
    this.#check();
    return fileCacheStats();
  }

  /**
   * Opens a disk for reading, writing and serving. One caller at a time has it (E_IN_USE). A disk
   * over a replica needs that replica: `options.replica`, or what StoreOptions.replica() gives.
   */
  async openDisk(name: string, options: { replica?: ReplicaHandle } = {}): Promise<Disk> {
    this.#check();
    return this.#disks.take(name, options.replica);
  }

  /** Opens a generation for reading; to be closed by the caller. E_NOT_FOUND. */
  async openGeneration(
    disk: string,
    generation: string,
    options: { replica?: ReplicaHandle } = {},
  ): Promise<OpenGeneration> {
    this.#check();
    await this.#disks.journalled(disk);
    const { tree } = this.#parts.ledger;
    const { slice } = this.#generation(tree, disk, generation);
    return openView(
      this.#parts,
      options.replica ?? (await this.#replicaBelow(slice)),
      (now) => this.#generation(now, disk, generation).slice,
    );
  }

  /** Of the disks that are open, what their clients met. */
  errors(): { disk: string; errors: DiskErrors }[] {
    return this.#disks.errors();
  }

  /** The replicas that slices lie on, by generation. */
  replicas(): Map<string, ReplicaUse> {
    const { tree } = this.#parts.ledger;
    const told = new Set<string>();
    for (const name of this.#disks.opened()) {
      const top = tree.disks.get(name)?.top;
      let root: string | undefined;
      if (top !== undefined) for (const [id] of tree.down(top)) root = id;
      if (root !== undefined) told.add(root);
    }
    const found = new Map<string, ReplicaUse>();
    for (const [id, { base, size_bytes }] of tree.slices) {
      if (base?.kind !== 'replica') continue;
      const before = found.get(base.generation)?.told ?? true;
      found.set(base.generation, { size_bytes, told: before && told.has(id) });
    }
    return found;
  }

  /** Closes all disks, then the store. Views and providers handed out stay readable. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const errors: unknown[] = [];
    const note = (error: unknown) => errors.push(error);
    await this.#cleaner.close();
    await this.#disks.close(note);
    await this.#shut().catch(note);
    if (errors.length > 0) throw errors[0];
  }

  async #shut(): Promise<void> {
    try {
      await this.#parts.ledger.close();
    } finally {
      await native(() => this.#parts.native.close());
    }
  }

  #check(): void {
    if (this.#closing === undefined) return;
    throw new SnowflockError('E_CLOSED', `store ${this.directory} is closed`);
  }

  #checkFree(tree: Tree, name: string): void {
    if (!tree.disks.has(name)) return;
    throw new SnowflockError('E_EXISTS', `${this.directory} has a disk ${name} already`);
  }

  #entry(name: string): Promise<DiskEntry> {
    return diskEntry(this.#parts.ledger.tree, name, this.#disks.get(name));
  }

  /** The generation that `ref` means for a disk: an id of one of its own or below it, or a name. */
  #generation(tree: Tree, disk: string, ref: string): { id: string; slice: string } {
    const { top } = diskOf(tree, disk);
    const id = ID.test(ref) ? ref : tree.named(disk, ref);
    const entry = id === undefined ? undefined : tree.generations.get(id);
    if (id !== undefined && entry !== undefined) {
      if (entry.disk === disk) return { id, slice: entry.slice };
      for (const [below] of tree.down(top)) if (below === entry.slice) return { id, slice: below };
    }
    throw new SnowflockError('E_NOT_FOUND', `disk ${disk} has no generation ${ref.slice(0, 80)}`);
  }

  async #replicaBelow(slice: string): Promise<ReplicaHandle | undefined> {
    const { tree } = this.#parts.ledger;
    const base = tree.base(slice);
    if (base.kind !== 'replica') return undefined;
    return this.#options.replica?.(base.generation, sliceOf(tree, slice).size_bytes);
  }

  /** Makes a slice's files for a transaction to name; they go again if that fails. */
  async #withNewSlice(size_bytes: number, work: (id: string) => Promise<void>): Promise<void> {
    const id = newSliceId();
    try {
      await native(() => addon().createSlice(this.directory, id, size_bytes, false));
      await work(id);
    } catch (error) {
      if (!this.#parts.ledger.tree.slices.has(id) && !this.#parts.ledger.journal.broken) {
        const made = [`${id}.data`, `${id}.0.map`];
        await removeFiles(this.directory, made).catch(() => undefined); // else when next opened
      }
      throw error;
    }
  }

  async #newDisk(
    name: string,
    size_bytes: number,
    slices: (top: string, tree: Tree) => NonNullable<Parameters<Tree['apply']>[0]['slices']>,
  ): Promise<DiskEntry> {
    this.#checkFree(this.#parts.ledger.tree, name);
    await this.#withNewSlice(size_bytes, (top) =>
      this.#parts.ledger.commit((tree) => {
        this.#checkFree(tree, name);
        const disk = { top, spare: null, created_ms: Date.now() };
        return { slices: slices(top, tree), disks: { [name]: disk } };
      }),
    );
    return this.#entry(name);
  }

  async #diskClosed(owned: boolean): Promise<void> {
    if (!owned || this.#options.closeWithDisk !== true || this.#closing !== undefined) return;
    this.#closing = this.#cleaner.close().then(() => this.#shut());
    await this.#closing;
  }

  #reserve(disk: string, generation: string, name: string | null): { release(): void } {
    const { tree } = this.#parts.ledger;
    const full = name === null ? null : `${disk}@${name}`;
    if (tree.generations.has(generation) || this.#reserved.has(generation)) {
      throw new SnowflockError('E_EXISTS', `the store has generation ${generation} already`);
    }
    if (name !== null && (tree.named(disk, name) || [...this.#reserved.values()].includes(full))) {
      throw new SnowflockError('E_EXISTS', `the store has a generation ${full} already`);
    }
    const more = this.#reserved.size + 1;
    if (tree.generations.size + more > MAX_GENERATIONS || tree.slices.size + more > MAX_SLICES) {
      throw new SnowflockError('E_CAPACITY', `the store has as many generations as it can have`);
    }
    this.#reserved.set(generation, full);
    return { release: () => this.#reserved.delete(generation) };
  }
}

import { randomBytes } from 'node:crypto';
import { mkdir, readdir, rm, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { SnowflockError } from '../common/errors.js';
import {
  type DiskFile,
  readDiskFile,
  type SliceEntry,
  syncFolder,
  writeDiskFile,
} from './disk-file.js';
import {
  addon,
  type NativeDisk,
  type NativeServer,
  type NativeStats,
  native,
  nativeSync,
  type ServeOptions,
} from './native.js';

export type { ServeOptions } from './native.js';

/** What lies below a disk's first slice. `path` is kept as given: make it absolute. */
export type DiskBase =
  | { kind: 'none' }
  | { kind: 'image'; path: string }
  | { kind: 'replica'; generation: string };

/** The `handle` of a Replica object (medium `disk`). */
export type ReplicaHandle = unknown;

export interface ForkResult {
  generation: string;
  /** The slice that was sealed: the newest one of the generation. */
  slice: string;
  /** How long writes were held off, in microseconds. */
  durationUs: number;
}

export interface SliceInfo {
  id: string;
  /** `settling`: immutable already, not durable yet. */
  state: 'open' | 'settling' | 'sealed';
  /** Pages with data or known to be zero. */
  pages: number;
  allocatedBytes: number;
  /** The generation it was sealed as, if any. */
  generation: string | undefined;
  /** False when its generation was dropped: it waits to be merged into the next one. */
  referenced: boolean;
}

export interface DiskInfo {
  sizeBytes: number;
  pages: number;
  base: DiskBase;
  slices: SliceInfo[];
  generations: string[];
  indexBytes: number;
}

export interface DiskStats extends NativeStats {
  errors: number;
  connections: number;
}

const ID = /^[0-9a-f]{32}$/;

function newId(): string {
  return randomBytes(16).toString('hex');
}

/**
 * A virtual disk: slices of 4 KiB pages over a base, served by NBD, forked in constant time.
 *
 * A fork needs a *spare*, an empty slice made ahead of time and named in disk.json, so that while
 * the VM is paused nothing is created and nothing synced. After a fork, in the background: the
 * sealed slice is made durable, a new spare is made, disk.json is replaced. `prepareFork()` waits
 * for that and is to be called before the VM is paused. A kill or power cut anywhere in between
 * leaves a disk that opens: see docs/disk-format.md.
 */
export class Disk {
  readonly directory: string;
  readonly #native: NativeDisk;
  readonly #sizeBytes: number;
  readonly #base: DiskFile['base'];
  #slices: SliceEntry[];
  #spare: string | null;
  /** Settled when a spare is attached and disk.json is up to date; rejected if that failed. */
  #ready: Promise<void> = Promise.resolve();
  #turn: Promise<unknown> = Promise.resolve();
  #servers = new Set<NativeServer>();
  #closing: Promise<void> | undefined;

  private constructor(directory: string, file: DiskFile, opened: NativeDisk) {
    this.directory = directory;
    this.#native = opened;
    this.#sizeBytes = file.size_bytes;
    this.#base = file.base;
    this.#slices = file.slices.map((slice) => ({ ...slice }));
    this.#spare = file.spare;
  }

  /**
   * Makes a disk in `directory`, which is created if missing and must not hold one (E_EXISTS).
   * `sizeBytes` is a multiple of 4096, at least an image base's size and exactly a replica's.
   */
  static async create(
    directory: string,
    options: { sizeBytes: number; base?: DiskBase },
  ): Promise<void> {
    const { sizeBytes } = options;
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 4096 || sizeBytes % 4096 !== 0) {
      throw new SnowflockError('E_ARGUMENT', `disk size ${sizeBytes} is not a multiple of 4096`);
    }
    if (sizeBytes > 2 ** 46) {
      throw new SnowflockError('E_ARGUMENT', `disk size ${sizeBytes} is more than 64 TiB`);
    }
    const base = await describeBase(options.base ?? { kind: 'none' }, sizeBytes);
    await makeFolder(directory);
    if ((await readdir(directory)).some((name) => name === 'disk.json')) {
      throw new SnowflockError('E_EXISTS', `${directory} holds a disk already`);
    }
    const [top, spare] = [newId(), newId()];
    try {
      await native(() => addon().createSlice(directory, top, sizeBytes, false));
      await native(() => addon().createSlice(directory, spare, sizeBytes, true));
      await writeDiskFile(directory, {
        format: 'snowflock-disk',
        version: 1,
        page_bytes: 4096,
        size_bytes: sizeBytes,
        base,
        slices: [{ id: top }],
        spare,
      });
    } catch (error) {
      const made = [top, spare].flatMap((id) => [`${id}.data`, `${id}.map`]);
      for (const name of [...made, 'disk.json', 'disk.json.new']) {
        await rm(join(directory, name), { force: true });
      }
      throw error;
    }
  }

  /**
   * Opens a disk. One owner at a time (E_IN_USE). A disk over a replica needs the replica of that
   * generation (`options.replica`, else E_ARGUMENT; of another one: E_REPLICA_MISMATCH).
   */
  static async open(directory: string, options: { replica?: ReplicaHandle } = {}): Promise<Disk> {
    for (let attempt = 0; attempt < 3; attempt++) {
      const file = await readDiskFile(directory);
      const opened = await native(() =>
        addon().openDisk(
          {
            directory,
            sizeBytes: file.size_bytes,
            slices: file.slices.map((slice) => ({
              id: slice.id,
              generation: slice.generation ?? '',
              keep: slice.dropped !== true,
            })),
            spare: file.spare ?? '',
            base: nativeBase(file.base),
          },
          options.replica,
        ),
      );
      const disk = new Disk(directory, file, opened);
      try {
        // Read again under the lock: its last owner may have changed it since.
        if (isDeepStrictEqual(file, await readDiskFile(directory))) {
          // A killed owner may have renamed disk.json and not synced the folder.
          await syncFolder(directory);
          await disk.#recover();
          return disk;
        }
      } catch (error) {
        await native(() => opened.close()).catch(() => undefined);
        throw error;
      }
      await native(() => opened.close());
    }
    throw new SnowflockError('E_IN_USE', `disk ${directory} changes while it is being opened`);
  }

  /** Serves the writable disk. The socket appears with its owner and mode, ready to connect to. */
  async serve(options: ServeOptions): Promise<void> {
    this.#check();
    this.#servers.add(await native(() => this.#native.serve(options)));
  }

  /** Serves a generation read-only; closing the result ends it. */
  async serveGeneration(
    generation: string,
    options: ServeOptions,
  ): Promise<{ close(): Promise<void> }> {
    this.#check();
    const server = await native(() => this.#native.serveView(generation, options));
    this.#servers.add(server);
    return {
      close: async () => {
        this.#servers.delete(server);
        await native(() => server.close());
      },
    };
  }

  /** Waits until a fork can be done without making or syncing anything. Repeats what failed. */
  async prepareFork(): Promise<void> {
    this.#check();
    try {
      await this.#ready;
    } catch {
      this.#renewLater();
      await this.#ready;
    }
  }

  /**
   * Seals the top slice as `generation` (32 hex digits) and goes on in the spare. The generation
   * survives the death of this process at once; a power cut once `prepareFork()` resolves, or the
   * guest has flushed. On an error nothing has changed.
   */
  async fork(generation: string): Promise<ForkResult> {
    return this.#inTurn(async () => {
      if (!ID.test(generation)) {
        throw new SnowflockError('E_ARGUMENT', `generation ${generation} is not 32 hex digits`);
      }
      if (this.#slices.some((slice) => slice.generation === generation)) {
        throw new SnowflockError('E_EXISTS', `the disk has generation ${generation} already`);
      }
      await this.prepareFork();
      const done = await native(() => this.#native.fork(generation));
      this.#append(generation);
      this.#renewLater();
      return { generation, slice: done.slice, durationUs: done.durationUs };
    });
  }

  /** The generation's pages, for a page server. Readable until dropped by all who hold it. */
  provider(generation: string): unknown {
    this.#check();
    return nativeSync(() => this.#native.provider(generation));
  }

  /**
   * Nobody will ask for this generation any more. Its slice stays, as later ones may need its
   * pages, and is remembered as unreferenced. E_NOT_FOUND.
   */
  async dropGeneration(generation: string): Promise<void> {
    await this.#inTurn(async () => {
      await this.prepareFork(); // disk.json may name only forks that are durable
      const slice = this.#slices.find((entry) => entry.generation === generation);
      if (slice === undefined || slice.dropped === true) {
        throw new SnowflockError('E_NOT_FOUND', `the disk has no generation ${generation}`);
      }
      slice.dropped = true;
      try {
        await this.#save();
      } catch (error) {
        delete slice.dropped;
        throw error;
      }
      this.#native.dropView(generation);
    });
  }

  /** Makes everything written so far durable. */
  async flush(): Promise<void> {
    this.#check();
    await native(() => this.#native.settle());
  }

  info(): DiskInfo {
    this.#check();
    const { slices, indexBytes } = nativeSync(() => this.#native.info());
    const entries = new Map(this.#slices.map((entry) => [entry.id, entry]));
    return {
      sizeBytes: this.#sizeBytes,
      pages: this.#sizeBytes / 4096,
      base: publicBase(this.#base),
      slices: slices.map((slice) => {
        const entry = entries.get(slice.id);
        return { ...slice, generation: entry?.generation, referenced: entry?.dropped !== true };
      }),
      generations: this.#slices.flatMap((slice) =>
        slice.generation !== undefined && slice.dropped !== true ? [slice.generation] : [],
      ),
      indexBytes,
    };
  }

  stats(): DiskStats {
    this.#check();
    const stats = this.#native.stats();
    let connections = 0;
    for (const server of this.#servers) connections += server.stats().connections;
    return { ...stats, errors: stats.ioErrors + stats.noSpaceErrors, connections };
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
    const servers = [...this.#servers];
    this.#servers.clear();
    await Promise.all(servers.map((server) => native(() => server.close())));
    await this.#turn.catch(() => undefined);
    const renewed = await this.#ready.then(
      () => undefined,
      (error: unknown) => ({ error }),
    );
    await native(() => this.#native.close());
    if (renewed !== undefined) throw renewed.error;
  }

  #check(): void {
    if (this.#closing !== undefined) {
      throw new SnowflockError('E_CLOSED', `disk ${this.directory} is closed`);
    }
  }

  /** One fork or drop at a time. */
  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    this.#check();
    const turn = this.#turn.then(work, work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  #append(generation: string): void {
    const top = this.#slices.at(-1);
    if (top === undefined || this.#spare === null) {
      throw new SnowflockError('E_INTERNAL', `disk ${this.directory} forked without a spare`);
    }
    top.generation = generation;
    this.#slices.push({ id: this.#spare });
    this.#spare = null;
  }

  #renewLater(): void {
    this.#ready = this.#renew();
    this.#ready.catch(() => undefined); // whoever needs the spare learns of it
  }

  /** The order matters: nothing is named in disk.json before it is durable. */
  async #renew(): Promise<void> {
    await native(() => this.#native.settle());
    if (this.#spare === null) {
      const id = newId();
      await native(() => addon().createSlice(this.directory, id, this.#sizeBytes, true));
      this.#spare = id;
    }
    await this.#save();
    if (!this.#native.info().spare) {
      const id = this.#spare;
      await native(() => this.#native.attachSpare(id));
    }
  }

  async #save(): Promise<void> {
    await writeDiskFile(this.directory, {
      format: 'snowflock-disk',
      version: 1,
      page_bytes: 4096,
      size_bytes: this.#sizeBytes,
      base: this.#base,
      slices: this.#slices,
      spare: this.#spare,
    });
  }

  /** After a death: a fork that disk.json does not tell of, spares that nobody came to name. */
  async #recover(): Promise<void> {
    const recovered = this.#native.recovered();
    if (recovered !== '') this.#append(recovered);
    const known = new Set(this.#slices.map((slice) => slice.id));
    if (this.#spare !== null) known.add(this.#spare);
    const strays = new Set(
      (await readdir(this.directory)).flatMap((name) => {
        const id = /^([0-9a-f]{32})\.(?:data|map)$/.exec(name)?.[1];
        return id === undefined || known.has(id) ? [] : [id];
      }),
    );
    for (const id of strays) {
      await native(() => addon().removeSpare(this.directory, id, this.#sizeBytes));
    }
    if (this.#spare === null) await this.#renew();
  }
}

/** Makes a folder, with those above it, whose names outlive a power cut. */
async function makeFolder(directory: string): Promise<void> {
  const first = await mkdir(directory, { recursive: true, mode: 0o700 });
  if (first === undefined) return;
  const top = dirname(resolve(first));
  for (let above = resolve(directory); above !== top; ) {
    above = dirname(above);
    await syncFolder(above);
  }
}

async function describeBase(base: DiskBase, sizeBytes: number): Promise<DiskFile['base']> {
  if (base.kind === 'none') return { kind: 'none' };
  if (base.kind === 'replica') {
    if (!ID.test(base.generation)) {
      throw new SnowflockError('E_ARGUMENT', `generation ${base.generation} is not 32 hex digits`);
    }
    return { kind: 'replica', generation: base.generation };
  }
  let bytes: number;
  try {
    const found = await stat(base.path);
    if (!found.isFile()) {
      throw new SnowflockError('E_ARGUMENT', `base image ${base.path} is not a regular file`);
    }
    bytes = found.size;
  } catch (error) {
    if (error instanceof SnowflockError) throw error;
    throw new SnowflockError('E_IMAGE_UNKNOWN', `base image ${base.path} cannot be read`, {
      cause: error,
    });
  }
  if (bytes > sizeBytes) {
    throw new SnowflockError('E_ARGUMENT', `base image ${base.path} is larger than the disk`);
  }
  return { kind: 'image', path: base.path, image_bytes: bytes };
}

function nativeBase(base: DiskFile['base']) {
  if (base.kind === 'image') {
    return { kind: base.kind, path: base.path, imageBytes: base.image_bytes };
  }
  return base;
}

function publicBase(base: DiskFile['base']): DiskBase {
  return base.kind === 'image' ? { kind: 'image', path: base.path } : base;
}

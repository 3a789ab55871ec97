/**
 * The owner of a store: its calls, and its exports.
 *
 * A command opens one for itself; `disk serve` opens one that has exports and answers on the control
 * socket. States: open -> (serve) -> closed.
 *
 * - An export holds its disk or generation open. What must not be open (a disk that is removed, rolled
 *   back or committed) is withdrawn first, if no client is connected to it, and exported again after.
 * - Disks and generations named `in-progress-…` belong to an import or export under way in this
 *   process. They are not listed, and removed when the store is served or imported into next: a
 *   process that died left them.
 * - Changes of exports are done one after the other; calls of the store that change no export do not
 *   wait for them.
 */
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { ImportTarget, OpenView, StoreService } from '../cow-disk/control-protocol.js';
import { originOf } from '../cow-disk/lineage.js';
import type { LocalListenOptions, NbdServer } from '../cow-disk/nbd-server.js';
import { Store, type StoreOptions } from '../cow-disk/store.js';
import type {
  CreateDisk,
  DiskEntry,
  DiskErrors,
  GenerationEntry,
  StoreListing,
  StoreTask,
  StoreUsage,
} from '../cow-disk/store-api.js';
import { Exports, MAX_EXPORTS, type Servable } from './exports.js';
import { type Publication, Publications, type PublishPlan } from './publications.js';
import { Replicas, type ReplicasOptions } from './replicas.js';
import type { Source } from './source-file.js';

const IN_PROGRESS = /^in-progress-[0-9a-f]{16}$/;

/** One disk, or one generation (id or name) of it. */
export interface Exported {
  disk: string;
  generation: string | null;
}

export interface ServePlan extends LocalListenOptions {
  /** All disks, those made later too. */
  disks?: boolean;
  /** Besides: `named` generations or `all` of them, those made later too. */
  generations?: 'named' | 'all';
  /** Besides. */
  also?: Exported[];
  /** Disks can only be read. */
  readOnly?: boolean;
}

export class StoreServer implements StoreService {
  readonly directory: string;
  readonly #store: Store;
  #exports: Exports | undefined;
  #plan: ServePlan | undefined;
  /** The folder of the socket of a store that is not served. */
  #private: string | undefined;
  #turn: Promise<unknown> = Promise.resolve();
  readonly #served = new Map<string, Exported>();
  readonly #replicas: Replicas;
  readonly #publications: Publications;
  readonly #warn: (message: string) => void;
  readonly #imports = new Map<string, { name: string; size_bytes: number }>();
  #swept = false;

  private constructor(
    store: Store,
    directory: string,
    replicas: Replicas,
    warn: (message: string) => void,
  ) {
    this.#store = store;
    this.directory = directory;
    this.#replicas = replicas;
    this.#publications = new Publications(store);
    this.#warn = warn;
  }

  /** E_IN_USE, E_NOT_FOUND, E_CORRUPT. */
  static async open(
    directory: string,
    options: Pick<StoreOptions, 'gc_bytes_per_s' | 'max_open_files'> & ReplicasOptions = {},
  ): Promise<StoreServer> {
    const { gc_bytes_per_s, max_open_files, ...others } = options;
    const replicas = new Replicas(directory, others);
    const store = await Store.open(directory, {
      ...(gc_bytes_per_s === undefined ? {} : { gc_bytes_per_s }),
      ...(max_open_files === undefined ? {} : { max_open_files }),
      replica: (generation, size_bytes) => replicas.handle(generation, size_bytes),
    });
    replicas.watch(() => store.replicas());
    return new StoreServer(store, directory, replicas, options.warn ?? (() => undefined));
  }

  /**
   * Exports what the plan says. On an error nothing is exported; but of a whole store, what cannot be
   * opened is left out, and warned of, if anything else can. E_CAPACITY, E_NOT_FOUND.
   */
  serve(plan: ServePlan): Promise<void> {
    return this.#inTurn(async () => {
      await this.#sweep();
      this.#exports = new Exports(plan);
      this.#plan = plan;
      try {
        const wanted = this.#wanted(await this.list(), plan);
        if (wanted.length > MAX_EXPORTS) {
          throw new SnowflockError(
            'E_CAPACITY',
            `${wanted.length} exports are wanted, and a server has at most ${MAX_EXPORTS}: name the disks and generations to serve, or leave generations out`,
          );
        }
        await this.#exports.listen();
        await this.#addWanted(wanted, plan.also ?? []);
      } catch (error) {
        this.#plan = undefined;
        this.#served.clear();
        await this.#exports.close().catch(() => undefined);
        throw error;
      }
    });
  }

  /** What is exported, in order. */
  exported(): (Exported & { socket: string; name: string })[] {
    return [...this.#served].map(([name, one]) => ({
      ...one,
      name,
      socket: this.#exports?.place.socketPath ?? '',
    }));
  }

  /** What clients met of the disks that are open. */
  errors(): { disk: string; errors: DiskErrors }[] {
    return this.#store.errors();
  }

  /** Once it serves. */
  server(): Promise<NbdServer> | undefined {
    return this.#exports?.listen();
  }

  /** E_NOT_FOUND, and see Publications. */
  async publish(one: Exported & { generation: string }, plan: PublishPlan): Promise<Publication> {
    return this.#publications.add(await this.#generation(one), plan);
  }

  async cloneFromSource(p: { name: string; source: Source }): Promise<DiskEntry> {
    checkFree(p.name);
    const { generation, size_bytes } = p.source;
    const made = await this.#replicas.adopt(p.source, () =>
      this.#store.createDisk({
        name: p.name,
        size_bytes,
        base: { kind: 'replica', generation },
      }),
    );
    return this.#shown(made);
  }

  async createDisk(p: CreateDisk): Promise<DiskEntry> {
    checkFree(p.name);
    return this.#shown(await this.#store.createDisk(p));
  }

  async clone(p: { disk: string; generation: string; name: string }): Promise<DiskEntry> {
    checkFree(p.name);
    return this.#shown(await this.#store.clone(p));
  }

  async snapshot(p: { disk: string; name?: string }): Promise<GenerationEntry> {
    if (p.name !== undefined) checkFree(p.name);
    const made = await this.#store.snapshot(p);
    if (this.#plan !== undefined && wantsGeneration(this.#plan, made)) {
      await this.#inTurn(() => this.#addMade(made.disk, made.name ?? made.id));
    }
    return made;
  }

  removeGeneration(p: { disk: string; generation: string }): Promise<void> {
    return this.#inTurn(async () => {
      const found = await this.#generation(p);
      this.#publications.check(({ id }) => id === found.id);
      await this.#withdrawn(
        (one) =>
          one.disk === p.disk &&
          one.generation !== null &&
          (one.generation === found.id || one.generation === found.name),
        () => this.#store.removeGeneration(p),
      );
    });
  }

  removeDisk(p: { disk: string }): Promise<void> {
    return this.#inTurn(async () => {
      this.#publications.check((one) => one.disk === p.disk);
      await this.#withdrawn(
        (one) => one.disk === p.disk,
        () => this.#store.removeDisk(p),
      );
    });
  }

  rollback(p: { disk: string; generation: string }): Promise<void> {
    return this.#inTurn(() =>
      this.#withdrawn(
        (one) => one.disk === p.disk && one.generation === null,
        () => this.#store.rollback(p),
      ),
    );
  }

  commit(p: { disk: string; discard?: boolean }): Promise<{ origin: string }> {
    return this.#inTurn(async () => {
      const listing = await this.#store.list();
      const disk = listing.disks.find((one) => one.name === p.disk);
      const origin = disk === undefined ? undefined : originOf(listing, disk)?.disk;
      this.#publications.check((one) => one.disk === p.disk);
      return this.#withdrawn(
        (one) => one.disk === p.disk || (one.disk === origin && one.generation === null),
        () => this.#store.commit(p),
      );
    });
  }

  async flatten(p: {
    disk: string;
    rate_bytes_per_s?: number;
    signal?: AbortSignal;
  }): Promise<void> {
    await this.#store.flatten(p);
    await this.#replicas.look(); // the one it lay on may have been its own
  }

  async list(): Promise<StoreListing> {
    const listing = await this.#store.list();
    return {
      directory: listing.directory,
      disks: listing.disks
        .filter((disk) => !IN_PROGRESS.test(disk.name))
        .map((disk) => this.#withExports(disk)),
      generations: listing.generations.filter((one) => !IN_PROGRESS.test(one.name ?? '')),
    };
  }

  usage(): Promise<StoreUsage> {
    return this.#store.usage();
  }

  async tasks(): Promise<StoreTask[]> {
    const imports = [...this.#imports.values()].map(
      ({ name, size_bytes }): StoreTask => ({
        kind: 'import',
        disk: name,
        done_bytes: 0,
        total_bytes: size_bytes,
        error: null,
      }),
    );
    const { disks } = await this.list();
    const prefetches = this.#replicas.tasks((generation) =>
      disks
        .filter(({ base }) => base.kind === 'replica' && base.generation === generation)
        .map(({ name }) => name),
    );
    return [...(await this.#store.tasks()), ...imports, ...prefetches];
  }

  async settled(): Promise<void> {
    await this.#store.settled();
    await this.#replicas.look();
  }

  async beginImport(p: { name: string; size_bytes: number }): Promise<ImportTarget> {
    checkFree(p.name);
    const { exports, temporary } = await this.#inTurn(async () => {
      await this.#sweep();
      if ((await this.#store.list()).disks.some((disk) => disk.name === p.name)) {
        throw new SnowflockError('E_EXISTS', `${this.directory} has a disk ${p.name} already`);
      }
      const temporary = newTemporary();
      const exports = await this.#anyExports();
      await this.#store.createDisk({ name: temporary, size_bytes: p.size_bytes });
      try {
        await exports.add(temporary, `import of ${p.name}`, await this.#store.openDisk(temporary));
      } catch (error) {
        await this.#store.removeDisk({ disk: temporary });
        throw error;
      }
      this.#imports.set(temporary, p);
      return { exports, temporary };
    });
    let open = true;
    const abandon = () =>
      this.#inTurn(async () => {
        if (!open) return;
        open = false;
        this.#imports.delete(temporary);
        await exports.remove(temporary).catch(() => undefined); // what could not be synced goes
        await this.#store.removeDisk({ disk: temporary });
      });
    return {
      socket: exports.place.socketPath,
      export_name: temporary,
      size_bytes: p.size_bytes,
      abandon,
      finish: async () => {
        const made = await this.#inTurn(async () => {
          if (!open) throw new SnowflockError('E_STATE', `the import of ${p.name} has ended`);
          await exports.remove(temporary); // closing a disk makes it durable
          const disk = await this.#store.renameDisk({ disk: temporary, name: p.name });
          open = false;
          this.#imports.delete(temporary);
          return disk;
        });
        return this.#shown(made);
      },
    };
  }

  async openView(p: { disk: string; generation: string | null }): Promise<OpenView> {
    await this.#inTurn(() => this.#sweep());
    const passing =
      p.generation === null
        ? await this.#store.snapshot({ disk: p.disk, name: newTemporary() })
        : undefined;
    const drop = async () => {
      if (passing === undefined) return;
      await this.#store.removeGeneration({ disk: p.disk, generation: passing.id });
    };
    try {
      const found = passing ?? (await this.#generation({ ...p, generation: p.generation ?? '' }));
      const name = newTemporary();
      const exports = await this.#inTurn(() => this.#anyExports());
      const view = await this.#store.openGeneration(p.disk, found.id);
      await exports.add(name, `${p.disk}@${found.name ?? found.id}, read-only`, view);
      let open = true;
      return {
        socket: exports.place.socketPath,
        export_name: name,
        size_bytes: found.size_bytes,
        close: async () => {
          if (!open) return;
          open = false;
          await exports.remove(name);
          await drop();
        },
      };
    } catch (error) {
      await drop().catch(() => undefined); // swept later
      throw error;
    }
  }

  /** Ends the exports (their clients see the connection end), makes all durable, gives the store up. */
  async close(): Promise<void> {
    await this.#turn.catch(() => undefined);
    try {
      await this.#publications.close();
      await this.#exports?.close();
    } finally {
      this.#served.clear();
      if (this.#private !== undefined) await rm(this.#private, { recursive: true, force: true });
      await this.#replicas.look();
      await this.#store.close().finally(() => this.#replicas.close());
    }
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#turn.then(work, work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  /** The exports, on a socket of their own if the store is not served. */
  async #anyExports(): Promise<Exports> {
    if (this.#exports === undefined) {
      this.#private = await mkdtemp(join(tmpdir(), 'snowflock-'));
      this.#exports = new Exports({ socketPath: join(this.#private, 'nbd') });
    }
    return this.#exports;
  }

  #wanted(listing: StoreListing, plan: ServePlan): Exported[] {
    const all = [
      ...(plan.disks === true ? listing.disks : []).map((disk) => ({
        disk: disk.name,
        generation: null,
      })),
      ...listing.generations
        .filter((one) => wantsGeneration(plan, one))
        .map((one) => ({ disk: one.disk, generation: one.name ?? one.id })),
      ...(plan.also ?? []),
    ];
    return [...new Map(all.map((one) => [exportName(one), one])).values()];
  }

  /** Those in `named` must be exported; one of the others that is damaged keeps no disk from users. */
  async #addWanted(wanted: Exported[], named: Exported[]): Promise<void> {
    const must = new Set(named.map(exportName));
    let first: unknown;
    for (const one of wanted) {
      try {
        await this.#add(one);
      } catch (error) {
        if (must.has(exportName(one))) throw error;
        first ??= error;
        const { code, message } = asSnowflockError(error);
        this.#warn(`${exportName(one)} is not exported: ${code}: ${message}`);
      }
    }
    if (first !== undefined && this.#served.size === 0) throw first;
  }

  /** What was made is there whether it can be exported or not. */
  async #addMade(disk: string, generation: string | null): Promise<void> {
    try {
      await this.#add({ disk, generation });
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (code !== 'E_CAPACITY') throw error;
      this.#warn(`${exportName({ disk, generation })} is not exported: ${message}`);
    }
  }

  async #add(one: Exported): Promise<void> {
    if (this.#exports === undefined) return;
    const name = exportName(one);
    if (this.#served.has(name)) return;
    const [thing, what] =
      one.generation !== null
        ? [
            await this.#store.openGeneration(one.disk, one.generation),
            `generation ${one.generation} of disk ${one.disk}, read-only`,
          ]
        : this.#plan?.readOnly === true
          ? [await this.#openReadOnly(one.disk), `disk ${one.disk}, read-only`]
          : [await this.#store.openDisk(one.disk), `disk ${one.disk}`];
    await this.#exports.add(name, what, thing);
    this.#served.set(name, one);
  }

  /** What a disk holds: only this process could change it. */
  async #openReadOnly(disk: string): Promise<Servable> {
    const { id } = await this.#store.snapshot({ disk, name: newTemporary() });
    const drop = () => this.#store.removeGeneration({ disk, generation: id });
    try {
      const view = await this.#store.openGeneration(disk, id);
      return {
        serve: (options) => view.serve(options),
        close: async () => {
          view.close();
          await drop();
        },
      };
    } catch (error) {
      await drop().catch(() => undefined); // swept later
      throw error;
    }
  }

  /** Does `work` while nothing that `concerns` it is exported. E_IN_USE if a client is connected. */
  async #withdrawn<T>(concerns: (one: Exported) => boolean, work: () => Promise<T>): Promise<T> {
    const exports = this.#exports;
    const away = [...this.#served].filter(([, one]) => concerns(one));
    for (const [name] of away) {
      const clients = exports?.connections(name) ?? 0;
      if (clients > 0) {
        throw new SnowflockError(
          'E_IN_USE',
          `export ${name} has ${clients} NBD client${clients > 1 ? 's' : ''} connected`,
        );
      }
    }
    for (const [name] of away) {
      this.#served.delete(name);
      await exports?.remove(name);
    }
    try {
      return await work();
    } finally {
      const { disks, generations } = await this.#store.list();
      for (const [, one] of away) {
        const exists =
          one.generation === null
            ? disks.some((disk) => disk.name === one.disk)
            : generations.some(
                (gen) => gen.disk === one.disk && (gen.name ?? gen.id) === one.generation,
              );
        if (exists) await this.#add(one);
      }
    }
  }

  async #shown(disk: DiskEntry): Promise<DiskEntry> {
    if (this.#plan?.disks === true) {
      await this.#inTurn(() => this.#addMade(disk.name, null));
    }
    return this.#withExports(disk);
  }

  #withExports(disk: DiskEntry): DiskEntry {
    const socket = this.#served.has(disk.name) ? this.#exports?.place.socketPath : undefined;
    const replica =
      disk.base.kind === 'replica' ? this.#replicas.status(disk.base.generation) : undefined;
    return {
      ...disk,
      ...(socket === undefined ? {} : { open: true, exports: [{ socket, name: disk.name }] }),
      ...(replica === undefined ? {} : { replica }),
    };
  }

  /** E_NOT_FOUND. */
  async #generation(p: { disk: string; generation: string }): Promise<GenerationEntry> {
    const found = (await this.#store.list()).generations.find(
      (one) => one.disk === p.disk && (one.id === p.generation || one.name === p.generation),
    );
    if (found === undefined) {
      throw new SnowflockError('E_NOT_FOUND', `disk ${p.disk} has no generation ${p.generation}`);
    }
    return found;
  }

  /** Removes what imports and exports of dead processes left. */
  async #sweep(): Promise<void> {
    if (this.#swept) return;
    const { disks, generations } = await this.#store.list();
    for (const one of generations) {
      if (!IN_PROGRESS.test(one.name ?? '')) continue;
      await this.#store.removeGeneration({ disk: one.disk, generation: one.id });
    }
    for (const disk of disks) {
      if (IN_PROGRESS.test(disk.name)) await this.#store.removeDisk({ disk: disk.name });
    }
    this.#swept = true;
  }
}

function wantsGeneration(plan: ServePlan, one: GenerationEntry): boolean {
  if (plan.generations === undefined) return false;
  return one.name === null ? plan.generations === 'all' : !IN_PROGRESS.test(one.name);
}

function exportName({ disk, generation }: Exported): string {
  return generation === null ? disk : `${disk}@${generation}`;
}

function newTemporary(): string {
  return `in-progress-${randomBytes(8).toString('hex')}`;
}

function checkFree(name: string): void {
  if (!IN_PROGRESS.test(name)) return;
  throw new SnowflockError('E_ARGUMENT', `names like ${name} are kept for imports under way`);
}

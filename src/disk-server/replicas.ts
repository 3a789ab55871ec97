/**
 * The replicas of a store: sparse copies of generations of other hosts, on which disks lie.
 *
 * One for each generation, shared by the disks over it: `GENERATION.replica(.map)` in the store's
 * folder, filled from where `GENERATION.source` says. It is opened with the first disk or generation
 * that lies on it, and closed with the store.
 *
 * States of a source: answering -> lost -> (tried again after 1 s, doubled up to 60 s) -> answering;
 * or not needed: the replica is complete. While it is lost, absent pages are I/O errors and all
 * others go on.
 * Once no slice of the store names the generation, the files go: nobody can ask for its pages.
 */
import { randomBytes } from 'node:crypto';
import { open, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { syncFolder } from '../cow-disk/journal.js';
import { removeFiles, replicaFiles } from '../cow-disk/slice-files.js';
import type { ReplicaUse } from '../cow-disk/store.js';
import type { ReplicaStatus, StoreTask } from '../cow-disk/store-api.js';
import type { ReplicaHandle } from '../pagestore/replica.js';
import {
  checkSame,
  type KnownGeneration,
  openRemoteGeneration,
  type RemoteGeneration,
  type RemoteOptions,
} from './remote-generation.js';
import { readSourceFile, type Source } from './source-file.js';

export interface ReplicasOptions {
  /** This host's address towards the sources; default: what the routing table says. */
  interfaceAddress?: string;
  /** Fill them in the background, in bytes a second; 0: no limit; absent: on demand only. */
  prefetch?: number;
  /** A source silent for so long while it is asked is lost; default 30 s. */
  sourceTimeoutMs?: number;
  /** Told what an operator should know. */
  warn?: (message: string) => void;
}

interface Opened {
  readonly generation: KnownGeneration;
  readonly remote: RemoteGeneration;
  /** What is in GENERATION.source: not used yet if it could not be (no route). */
  lost: { until_ms: number; wait_ms: number } | null;
  /** Pages that were here when the source was tried again. */
  present: number;
  /** What its prefetch was last told; 0: no limit. */
  rate: number | null;
}

const TICK_MS = 500;
const RETRY_MIN_MS = 1000;
const RETRY_MAX_MS = 60_000;

export class Replicas {
  readonly #directory: string;
  readonly #options: ReplicasOptions;
  readonly #open = new Map<string, Promise<Opened>>();
  readonly #opened = new Map<string, Opened>();
  /** Generations that slices name, as of the last look. */
  #named = new Set<string>();
  /** Made just now: slices will name them. */
  readonly #wanted = new Map<string, number>();
  readonly #removing = new Map<string, Promise<void>>();
  #use: (() => Map<string, ReplicaUse>) | undefined;
  #timer: NodeJS.Timeout | undefined;
  #looking: Promise<void> = Promise.resolve();

  constructor(directory: string, options: ReplicasOptions) {
    this.#directory = directory;
    this.#options = options;
  }

  /** From now on it looks after them. `use` tells what the store's slices lie on. */
  watch(use: () => Map<string, ReplicaUse>): void {
    this.#use = use;
    this.#named = new Set(use().keys());
    this.#timer = setInterval(() => void this.look(), TICK_MS);
    this.#timer.unref();
  }

  /** E_REPLICA_MISMATCH, E_IN_USE, E_IO, E_CORRUPT. That a source is gone is no error. */
  async handle(generation: string, size_bytes: number): Promise<ReplicaHandle> {
    let found = this.#open.get(generation);
    if (found === undefined) {
      found = this.#start({ generation, size_bytes });
      this.#open.set(generation, found);
      found.then(
        (opened) => this.#opened.set(generation, opened),
        () => this.#open.delete(generation),
      );
    }
    return (await found).remote.replica;
  }

  /**
   * Keeps a source in the store and does `work`, which makes a slice that names its generation. One
   * that was there before is replaced, and used from now on. E_REPLICA_MISMATCH, E_IO.
   */
  async adopt<T>(source: Source, work: () => Promise<T>): Promise<T> {
    const { generation } = source;
    await this.#removing.get(generation);
    const used = this.#use?.().get(generation);
    if (used !== undefined) checkSame(source, { generation, size_bytes: used.size_bytes });
    this.#wanted.set(generation, (this.#wanted.get(generation) ?? 0) + 1);
    try {
      await this.#writeSource(source);
      const result = await work();
      this.#named.add(generation);
      const opened = this.#opened.get(generation);
      if (opened !== undefined && !opened.remote.stats().complete) {
        await this.#useSource(opened, source).catch((error: unknown) =>
          this.#warn(asSnowflockError(error).message),
        );
      }
      return result;
    } catch (error) {
      this.#named.add(generation); // and its files go, if no slice names it
      throw error;
    } finally {
      const users = (this.#wanted.get(generation) ?? 1) - 1;
      if (users > 0) this.#wanted.set(generation, users);
      else this.#wanted.delete(generation);
    }
  }

  status(generation: string): ReplicaStatus | undefined {
    const opened = this.#opened.get(generation);
    if (opened === undefined) return undefined;
    const { present, zero, pages, complete, source } = opened.remote.stats();
    const { size_bytes } = opened.generation;
    return {
      generation,
      size_bytes,
      present_bytes: presentBytes(size_bytes, present + zero, pages),
      complete,
      source,
    };
  }

  /** Prefetches under way or failed. `disks`: those that lie on a generation. */
  tasks(disks: (generation: string) => string[]): StoreTask[] {
    const tasks: StoreTask[] = [];
    for (const { generation, remote } of this.#opened.values()) {
      const { prefetch, present, zero, pages, complete } = remote.stats();
      if (complete || prefetch === null) continue;
      if (prefetch.state === 'done' || prefetch.state === 'idle') continue;
      const names = disks(generation.generation);
      tasks.push({
        kind: 'prefetch',
        disk: names.length === 1 ? (names[0] ?? null) : null,
        done_bytes: presentBytes(generation.size_bytes, present + zero, pages),
        total_bytes: generation.size_bytes,
        error: prefetch.error === null ? null : asSnowflockError(prefetch.error).message,
      });
    }
    return tasks;
  }

  /** Looks at what is needed, tries lost sources again, removes what nobody names. One at a time. */
  look(): Promise<void> {
    this.#looking = this.#looking.then(() => this.#look());
    return this.#looking;
  }

  /** After the store's disks are closed. */
  async close(): Promise<void> {
    clearInterval(this.#timer);
    await this.#looking;
    for (const opening of this.#open.values()) {
      const opened = await opening.catch(() => undefined); // who wanted it has the error
      await opened?.remote.close();
    }
  }

  async #look(): Promise<void> {
    try {
      if (this.#use === undefined || this.#named.size + this.#opened.size === 0) return;
      const use = this.#use();
      for (const [generation, opened] of this.#opened) {
        const told = use.get(generation)?.told;
        if (told !== undefined) opened.remote.needAll(!told);
        await this.#attend(opened);
      }
      for (const generation of this.#named) {
        // Asked anew: a disk may have been made while the others were attended to.
        if (this.#wanted.has(generation) || this.#use().has(generation)) continue;
        await this.#remove(generation);
      }
      for (const generation of use.keys()) this.#named.add(generation);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (code !== 'E_CLOSED') this.#warn(`replicas of ${this.#directory}: ${message}`);
    }
  }

  async #start(known: KnownGeneration): Promise<Opened> {
    const [pages, , file] = replicaFiles(known.generation);
    await this.#removing.get(known.generation);
    const path = join(this.#directory, pages);
    const { interfaceAddress, sourceTimeoutMs } = this.#options;
    const options: RemoteOptions = {
      ...(interfaceAddress === undefined ? {} : { interfaceAddress }),
      ...(sourceTimeoutMs === undefined ? {} : { sourceTimeoutMs }),
    };
    let remote: RemoteGeneration | undefined;
    let why = '';
    try {
      const source = await readSourceFile(join(this.#directory, file));
      checkSame(source, known);
      remote = await openRemoteGeneration(source, path, options);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      // What is here can be read all the same, and perhaps that is everything.
      if (!['E_NOT_FOUND', 'E_CONFIG', 'E_NETWORK'].includes(code)) throw error;
      why = message;
    }
    remote ??= await openRemoteGeneration(known, path, options);
    if (why !== '' && !remote.stats().complete) this.#warn(why);
    remote.events.once('complete', () =>
      this.#warn(`generation ${known.generation} is here as a whole; its source is not needed`),
    );
    remote.needAll(true); // until something else is known
    return { generation: known, remote, lost: null, present: 0, rate: null };
  }

  async #attend(opened: Opened): Promise<void> {
    const { remote, generation } = opened;
    const stats = remote.stats();
    if (stats.complete) return;
    const here = stats.present + stats.zero;
    const now = performance.now();
    if (stats.source === 'lost') {
      if (opened.lost === null) {
        opened.lost = { wait_ms: RETRY_MIN_MS, until_ms: now + RETRY_MIN_MS };
        const left = stats.pages - here;
        this.#warn(
          `the source of generation ${generation.generation} does not answer; ${left} pages that are not here yet are I/O errors until it does`,
        );
      } else if (now >= opened.lost.until_ms) {
        opened.lost.wait_ms = Math.min(2 * opened.lost.wait_ms, RETRY_MAX_MS);
        opened.lost.until_ms = now + opened.lost.wait_ms;
        opened.present = here;
        await this.#tryAgain(opened);
      }
    } else if (opened.lost !== null && here > opened.present) {
      opened.lost = null;
      this.#warn(`the source of generation ${generation.generation} answers again`);
    }
    if (this.#options.prefetch === undefined) return;
    const { prefetch } = remote.stats();
    const changed = prefetch?.state === 'running' && opened.rate !== this.#share();
    if (prefetch === null || changed) this.#prefetch(opened);
  }

  #prefetch(opened: Opened): void {
    if (this.#options.prefetch === undefined) return;
    opened.rate = this.#share();
    opened.remote.prefetch(opened.rate);
  }

  /** The rate is of all prefetches together: those under way have equal shares. 0: no limit. */
  #share(): number {
    const rate = this.#options.prefetch ?? 0;
    const busy = [...this.#opened.values()].filter(({ remote }) => {
      const { complete, prefetch } = remote.stats();
      return !complete && (prefetch === null || prefetch.state === 'running');
    });
    return rate === 0 ? 0 : Math.max(1, Math.floor(rate / Math.max(1, busy.length)));
  }

  async #tryAgain(opened: Opened): Promise<void> {
    const { remote, generation } = opened;
    const { client, prefetch } = remote.stats();
    if (client === null) {
      const [, , file] = replicaFiles(generation.generation);
      const source = await readSourceFile(join(this.#directory, file)).catch(() => undefined);
      if (source !== undefined) await this.#useSource(opened, source).catch(() => undefined);
    } else if (prefetch?.state !== 'failed') {
      remote.reconnect();
    }
    if (prefetch?.state === 'failed') this.#prefetch(opened);
  }

  async #useSource(opened: Opened, source: Source): Promise<void> {
    await opened.remote.setSource(source);
    this.#prefetch(opened);
  }

  async #writeSource(source: Source): Promise<void> {
    const [, , name] = replicaFiles(source.generation);
    const path = join(this.#directory, name);
    const temporary = `${path}.${randomBytes(4).toString('hex')}.new`;
    try {
      const file = await open(temporary, 'wx', 0o600);
      try {
        await file.writeFile(`${JSON.stringify(source, null, 2)}\n`);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(temporary, path);
      await syncFolder(this.#directory);
    } catch (cause) {
      await rm(temporary, { force: true });
      throw new SnowflockError('E_IO', `cannot write ${path}: ${String(cause)}`, { cause });
    }
  }

  async #remove(generation: string): Promise<void> {
    this.#named.delete(generation);
    const opening = this.#open.get(generation);
    this.#open.delete(generation);
    this.#opened.delete(generation);
    const work = async () => {
      const opened = await opening?.catch(() => undefined);
      await opened?.remote.close();
      await removeFiles(this.#directory, replicaFiles(generation));
    };
    const done = work().finally(() => this.#removing.delete(generation));
    this.#removing.set(generation, done);
    await done;
  }

  #warn(message: string): void {
    this.#options.warn?.(message);
  }
}

function presentBytes(size_bytes: number, present: number, pages: number): number {
  return Math.floor((size_bytes * Math.min(present, pages)) / pages);
}

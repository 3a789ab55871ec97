import { EventEmitter } from 'node:events';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { McdistClient, type McdistClientStats, type ServerAddress } from '../mcdist/mcdist.js';
import {
  newPrefetcher,
  openReplica,
  type Prefetcher,
  type PrefetchProgress,
  type Replica,
} from './replica.js';

export interface PageSource {
  readonly address: string;
  readonly port: number;
  readonly group: string;
  readonly groupPort: number;
  readonly key: Buffer;
}

export interface RemoteReplicaOptions {
  readonly path: string;
  readonly generation: string;
  readonly pages: number;
  readonly medium: 'memory' | 'disk';
  /** Absent: none is known, and absent pages end with E_SOURCE_LOST. */
  readonly source?: PageSource;
  /** This host's address towards the source: the group is joined there. */
  readonly interfaceAddress: string;
  /** See McdistClientOptions. */
  readonly sourceTimeoutMs?: number;
  readonly mtuBytes?: number;
  /** Have pages sent that others touched first, if nothing is here yet. */
  readonly history?: boolean;
  /** How often what came is made durable; 0, the default: once, when all is here. */
  readonly syncIntervalMs?: number;
}

export interface RemoteReplicaStats {
  pages: number;
  present: number;
  zero: number;
  /** Pages somebody waits for. */
  waiting: number;
  complete: boolean;
  /** `closed`: none is needed any more. `lost`: absent pages end with E_SOURCE_LOST. */
  source: 'open' | 'lost' | 'closed';
  /** Pages asked for from here, repetitions included. */
  requested: number;
  /** As of its end if it is closed; null if none was needed since the replica was opened. */
  client: McdistClientStats | null;
  prefetch: PrefetchProgress | null;
}

/**
 * A replica, the client that fills it on demand, and what fills it in the background.
 *
 * States of the source: open -> closed (complete) | lost; lost -> open by `reconnect()`. Once every
 * page is here the client is closed, so nothing is asked of the source and its end is nobody's
 * concern; a replica that is complete when it is opened gets no client at all.
 *
 * Events: `complete` once (all is here, and durable if on a disk); `prefetch` each time a prefetch
 * has ended; `trouble` for what failed in the background (a prefetch, making pages durable). Nobody
 * has to listen.
 */
export class RemoteReplica extends EventEmitter<{
  complete: [];
  prefetch: [PrefetchProgress];
  trouble: [SnowflockError];
}> {
  readonly replica: Replica;
  readonly #options: RemoteReplicaOptions;
  #source: PageSource | undefined;
  #interfaceAddress: string;
  #client: McdistClient | undefined;
  #lastStats: McdistClientStats | null = null;
  #prefetcher: Prefetcher | undefined;
  #completed: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #syncing: Promise<void> | undefined;
  #closing: Promise<void> | undefined;

  /** @throws E_REPLICA_MISMATCH, E_IN_USE, E_IO, E_CORRUPT, E_ARGUMENT, E_NETWORK */
  constructor(options: RemoteReplicaOptions) {
    super();
    this.#options = options;
    this.#source = options.source;
    this.#interfaceAddress = options.interfaceAddress;
    this.replica = openReplica(options.path, options.generation, options.pages, options.medium);
    try {
      this.#connect();
    } catch (error) {
      this.replica.close();
      throw error;
    }
    this.replica.onComplete(() => {
      this.#completed ??= this.#complete();
    });
    const every = options.syncIntervalMs ?? 0;
    if (every > 0 && !this.replica.stats().complete) {
      this.#timer = setInterval(() => void this.#syncNow(), every);
      this.#timer.unref();
    }
  }

  /**
   * Fetches all that is absent, at most so many bytes a second (0: no limit); one that runs gets
   * the new rate. A lost source is tried again.
   */
  prefetch(options: { rateBytesPerS: number }): void {
    this.#check();
    if (this.#client?.stats().lost === true) this.reconnect();
    this.#prefetcher ??= newPrefetcher(this.replica, () => this.#prefetchEnded());
    this.#prefetcher.start(options.rateBytesPerS);
  }

  pausePrefetch(): void {
    this.#prefetcher?.pause();
  }

  resumePrefetch(): void {
    this.#prefetcher?.resume();
  }

  /**
   * Tries a source that was lost again, at the address given or the same one. `others` hold pages of
   * the same generation.
   */
  reconnect(server?: ServerAddress, others: readonly ServerAddress[] = []): void {
    const to = server ?? this.#source;
    if (to !== undefined) this.#client?.setServer({ address: to.address, port: to.port }, others);
  }

  /** Another source of the same generation from now on. Who waits for pages gets them from it. */
  async setSource(source: PageSource, interfaceAddress: string): Promise<void> {
    this.#check();
    await this.#disconnect();
    this.#check();
    this.#source = source;
    this.#interfaceAddress = interfaceAddress;
    this.#connect();
  }

  stats(): RemoteReplicaStats {
    this.#check();
    const client = this.#client?.stats() ?? this.#lastStats;
    const replica = this.replica.stats();
    const absent = this.#client === undefined && !replica.complete;
    const lost = absent || (this.#client !== undefined && client?.lost === true);
    const source = lost ? 'lost' : this.#client === undefined ? 'closed' : 'open';
    return {
      ...replica,
      source,
      requested: client?.pagesRequested ?? 0,
      client,
      prefetch: this.#prefetcher?.progress() ?? null,
    };
  }

  /** Pages that are here stay. Resolves when the files are no longer used from here. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  #check(): void {
    if (this.#closing !== undefined) {
      throw new SnowflockError('E_CLOSED', `replica ${this.#options.path} is closed`);
    }
  }

  #connect(): void {
    if (this.replica.stats().complete) return;
    const source = this.#source;
    if (source === undefined) {
      this.replica.fail('E_SOURCE_LOST', `nothing is known of the source of ${this.#options.path}`);
      return;
    }
    const { generation, sourceTimeoutMs, mtuBytes } = this.#options;
    this.#client = new McdistClient({
      generation,
      key: source.key,
      replica: this.replica.handle,
      server: { address: source.address, port: source.port },
      group: source.group,
      groupPort: source.groupPort,
      interfaceAddress: this.#interfaceAddress,
      ...(sourceTimeoutMs === undefined ? {} : { sourceTimeoutMs }),
      ...(mtuBytes === undefined ? {} : { mtuBytes }),
      history: this.#options.history === true && this.replica.stats().present === 0,
    });
  }

  #prefetchEnded(): void {
    const progress = this.#prefetcher?.progress();
    if (progress === undefined) return;
    this.emit('prefetch', progress);
    if (progress.error !== null) this.emit('trouble', asSnowflockError(progress.error));
  }

  async #complete(): Promise<void> {
    clearInterval(this.#timer);
    await this.#disconnect();
    if (await this.#syncNow()) this.emit('complete');
  }

  async #disconnect(): Promise<void> {
    const client = this.#client;
    if (client === undefined) return;
    this.#lastStats = client.stats();
    this.#client = undefined;
    await client.close();
  }

  /** False if it failed: told as trouble, and tried again with the next one. */
  async #syncNow(): Promise<boolean> {
    await this.#syncing;
    let ok = true;
    this.#syncing = this.replica.sync().catch((error: unknown) => {
      ok = false;
      this.emit('trouble', asSnowflockError(error));
    });
    await this.#syncing;
    return ok;
  }

  async #close(): Promise<void> {
    clearInterval(this.#timer);
    this.#prefetcher?.close();
    this.#prefetcher = undefined;
    await this.#completed;
    await this.#disconnect();
    if ((this.#options.syncIntervalMs ?? 0) > 0) await this.#syncNow();
    else await this.#syncing;
    this.replica.close();
  }
}

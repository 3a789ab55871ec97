import { asSnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';

/** Opaque: the `handle` property of a `Replica`. */
export type ReplicaHandle = unknown;
/** Opaque: the `provider` property of a `Replica`, a parent's memory or a disk. */
export type ProviderHandle = unknown;

export interface McdistServerOptions {
  /** IPv4 address requests come to. */
  readonly bindAddress: string;
  /** 0, the default: any. */
  readonly port?: number;
  /** The IPv4 address of the interface multicast leaves by. */
  readonly interfaceAddress: string;
  /** Of the whole path, 1280 to 9216; default 1500. No packet is longer, none is fragmented by IP. */
  readonly mtuBytes?: number;
  /** Multicast hops; default 1, the local network. */
  readonly ttl?: number;
}

/** What the server decides by; defaults and their reasons: `native/mcdist/policy_config.h`. */
export interface McdistPolicyOptions {
  /** Doubled each two windows until something is lost. Rates are of bytes on the wire. */
  readonly startRateBytesPerS?: number;
  readonly minRateBytesPerS?: number;
  readonly maxRateBytesPerS?: number;
  /** Linear increase; the paper's 10 KB/s each 10 ms is 1e6. */
  readonly increaseBytesPerSPerS?: number;
  /** Share of the clients' mean receive rate that a loss cuts the rate to; default 0.75. */
  readonly cut?: number;
  /** ... and at which it goes on once the queues are empty; the paper's is `cut`. Default 0.97. */
  readonly recover?: number;
  /** Share lost, above what is lost at any rate, that makes a cut; the paper's is 0. */
  readonly lossTolerance?: number;
  /** A cut that changes nothing is undone and its loss no reason for another one. Default true. */
  readonly learnNoise?: boolean;
  /** How long a rate is watched before it is judged; default 40. */
  readonly windowMs?: number;
  /** Symbols (packets of pages) that a window must have for a verdict. */
  readonly windowSymbols?: number;
  /** Factor of a try to send faster; 1: none, as in the paper. Default 1.15. */
  readonly probe?: number;
  /** Windows between tries, at first and at most. */
  readonly probeWindows?: number;
  readonly probeWindowsMax?: number;
  /** A page asked again within this time, by whomever, is not sent again (unless a retry). */
  readonly lockstepWindowMs?: number;
  /** ... up to so many times, or twice the clients known if that is more. */
  readonly lockstepRequests?: number;
  /** ... but if the client lost part of it, or joined since, only within this time; default 2. */
  readonly flightWindowMs?: number;
  readonly retryWindowMs?: number;
  readonly queuePages?: number;
  /** Pages one client may have queued, urgent and prefetch each. */
  readonly peerPages?: number;
  /**
   * `subscribers`, the default: while clients want all of the generation, all of it in order.
   * `behind`, the paper's: in idle time what follows each requested page.
   */
  readonly push?: 'off' | 'subscribers' | 'behind';
  /**
   * From the first subscription to the first page; default 20. Less if all who are there subscribed
   * and nobody new came for so long; twice that if somebody did not.
   */
  readonly pushDelayMs?: number;
  /** Subscribers not heard of for so long are not pushed to; default 2000. */
  readonly subscriberSilenceMs?: number;
  /** `behind`: how many counters at a time, up to 255. */
  readonly pushCounters?: number;
  /** Loss of pushed pages is repaired by parity where that takes fewer packets. Default true. */
  readonly parity?: boolean;
  /** Pages that LZ4 makes fit one packet are sent so. Default false: pays on slow links only. */
  readonly pack?: boolean;
  /** How long reports of a block are gathered; default 3. */
  readonly repairGatherMs?: number;
  /** Once this share of the pages went to the group, they are sent again by unicast; above 1: never. */
  readonly endgameShare?: number;
  /** ... and so while nobody else was heard for so long; default 30000. */
  readonly endgameSilenceMs?: number;
  /** Regions whose pages each client needs for itself: not pushed, answered by unicast. */
  readonly disjoint?: readonly { readonly first: number; readonly count: number }[];
  /**
   * Announces to the group at this interval though no client was heard, so that clients of another
   * server know whom to turn to when that one dies. For a replica that is served. Default: none.
   */
  readonly announceMs?: number;
  /** First faults whose order is remembered for later clones; 0: none. */
  readonly historyPages?: number;
  /** To begin with: the record of an earlier generation of the same VM or disk, of `history()`. */
  readonly history?: Buffer;
}

export interface McdistServeOptions {
  /** 32 lower-case hex characters. */
  readonly generation: string;
  /** 32 random bytes of this generation alone; travels over the control channel only. */
  readonly key: Buffer;
  readonly provider: ProviderHandle;
  /** Multicast address. */
  readonly group: string;
  readonly groupPort: number;
  readonly policy?: McdistPolicyOptions;
}

/** Counters since `serve()`. Wire bytes include UDP and IP headers. */
export interface McdistServerStats {
  readonly requests: number;
  readonly pagesRequested: number;
  readonly pagesServed: number;
  readonly zeroPagesServed: number;
  readonly negativeAnswers: number;
  readonly payloadBytes: number;
  readonly wireBytes: number;
  readonly packetsSent: number;
  readonly merged: number;
  readonly lockstepIgnored: number;
  readonly retries: number;
  readonly queueDropped: number;
  readonly welcomes: number;
  /** Packets of newcomers while 16384 others were heard within 5 s. */
  readonly peersRefused: number;
  readonly replays: number;
  readonly authFailures: number;
  readonly badPackets: number;
  /** Of those served: asked for by nobody. */
  readonly pagesPushed: number;
  /** Pages answered to one client alone. */
  readonly unicastAnswers: number;
  /** Pages sent to later clones since earlier ones touched them first. */
  readonly pagesReplayed: number;
  /** Blocks that clients said to lack something of; ignored: what repairs them was on its way. */
  readonly reports: number;
  readonly reportsIgnored: number;
  readonly reportsDropped: number;
  /** Packets of pages sent again for reports, and parity packets sent instead. */
  readonly repairSymbols: number;
  /** Pages sent compressed, each in one packet. */
  readonly packedPages: number;
  readonly paritySymbols: number;
  readonly announces: number;
  /** Packets the system did not take, and times it had no room: the local link is the limit. */
  readonly sendErrors: number;
  readonly sendWaits: number;
  readonly queuedPages: number;
  readonly peers: number;
  readonly subscribers: number;
  /** 1 while the push runs; its next page; pages whose first fault is remembered. */
  readonly pushing: number;
  readonly pushPosition: number;
  readonly historyPages: number;
  readonly rateLimitBytesPerS: number;
  readonly meanReceiveRateBytesPerS: number;
  readonly rateCuts: number;
  /** Cuts taken back, since as much was lost at the lower rate: that share, in a million. */
  readonly rateCutsUndone: number;
  readonly noisePpm: number;
  readonly generations: number;
  /** Of the whole server: packets of generations not served here, and noise. */
  readonly wrongGeneration: number;
  readonly strayPackets: number;
}

export interface ServerAddress {
  readonly address: string;
  readonly port: number;
}

export interface McdistClientOptions {
  readonly generation: string;
  readonly key: Buffer;
  readonly replica: ReplicaHandle;
  readonly server: { readonly address: string; readonly port: number };
  readonly group: string;
  readonly groupPort: number;
  /** The IPv4 address of the interface the group is joined on. */
  readonly interfaceAddress: string;
  /** Without any authentic word from the server for so long, waiters end with E_SOURCE_LOST. */
  readonly sourceTimeoutMs?: number;
  readonly mtuBytes?: number;
  /** Shortest time-out before a page is asked for again; default 10. */
  readonly minRetryMs?: number;
  /** How long a subscription waits for a push to begin before it asks for pages; default 60. */
  readonly pushWaitMs?: number;
  /** Let the server send first what other hosts faulted on. */
  readonly history?: boolean;
}

export interface McdistClientStats {
  readonly requests: number;
  readonly pagesRequested: number;
  readonly urgentRequested: number;
  readonly retries: number;
  readonly pagesFilled: number;
  /** Of those filled (zero pages too): not asked for from here. */
  readonly pagesOverheard: number;
  readonly zeroPagesFilled: number;
  readonly payloadBytes: number;
  readonly wireBytesSent: number;
  readonly wireBytesReceived: number;
  readonly duplicates: number;
  readonly negativeAnswers: number;
  readonly pagesFailed: number;
  readonly prefetchDropped: number;
  readonly welcomes: number;
  readonly announces: number;
  /** Packets that nobody asked for: sent by a push. */
  readonly pushedPackets: number;
  /** Blocks of 32 pages told to lack something after a push went by, each time they were told. */
  readonly blocksReported: number;
  readonly paritiesReceived: number;
  /** Pages that came compressed, each in one packet. */
  readonly packedPages: number;
  /** Pages of which a part came out of parities. */
  readonly pagesRepaired: number;
  /** Times another server became the one that is asked. */
  readonly failOvers: number;
  readonly authFailures: number;
  readonly wrongGeneration: number;
  /** Packets of a server that has not made itself known by a welcome or an announce. */
  readonly unknownSender: number;
  readonly badPackets: number;
  readonly fillErrors: number;
  readonly sendErrors: number;
  readonly pagesUnderWay: number;
  readonly prefetchWindow: number;
  readonly receiveRateBytesPerS: number;
  readonly faultRttMs: number;
  readonly prefetchRttMs: number;
  readonly faultTimeoutMs: number;
  /** Servers of this generation heard of, the one that is asked among them. */
  readonly serversKnown: number;
  /** Blocks reported that still lack something. */
  readonly blocksLacking: number;
  /** Of what was sent here lately, lost on the way, in 1/1000. */
  readonly lossPermille: number;
  /** The server that is asked now. */
  readonly serverAddress: string;
  readonly serverPort: number;
  /** All of the generation is wanted, and not all is here. */
  readonly subscribed: boolean;
  /** Multicast does not reach this host: the server answers by unicast. */
  readonly unicastOnly: boolean;
  /** The server answered and knows this client. */
  readonly welcomed: boolean;
  /** The source was given up; `setServer()` revives. */
  readonly lost: boolean;
}

interface NativeServer {
  readonly port: number;
  serve(options: McdistServeOptions): void;
  unserve(generation: string): Promise<void>;
  stats(generation?: string): McdistServerStats;
  history(generation: string): Promise<Buffer>;
  close(): Promise<void>;
}

interface NativeClient {
  fetch(page: number): Promise<void>;
  prefetch(first: number, count: number): void;
  subscribe(on: boolean): void;
  setServer(server: ServerAddress, others?: readonly ServerAddress[]): void;
  stats(): McdistClientStats;
  close(): Promise<void>;
}

interface Addon {
  readonly McdistServer: new (options: McdistServerOptions) => NativeServer;
  readonly McdistClient: new (options: McdistClientOptions) => NativeClient;
}

let addon: Addon | undefined;
function native(): Addon {
  addon ??= loadAddon<Addon>('dataplane');
  return addon;
}

function typed<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw asSnowflockError(error);
  }
}

/** Answers page requests for all generations of this host: one UDP socket, one native thread. */
export class McdistServer {
  readonly #native: NativeServer;

  /** @throws E_ARGUMENT, E_IN_USE (port taken), E_NETWORK (no such address or interface) */
  constructor(options: McdistServerOptions) {
    this.#native = typed(() => new (native().McdistServer)(options));
  }

  get port(): number {
    return this.#native.port;
  }

  /** @throws E_EXISTS if the generation is served already, E_ARGUMENT, E_CLOSED */
  serve(options: McdistServeOptions): void {
    typed(() => this.#native.serve(options));
  }

  /** Once resolved, the generation's provider is not read again. Not served: resolves as well. */
  async unserve(generation: string): Promise<void> {
    await typed(() => this.#native.unserve(generation));
  }

  /** Of one generation (E_NOT_FOUND if not served), or summed over all that are served now. */
  stats(generation?: string): McdistServerStats {
    return typed(() => this.#native.stats(generation));
  }

  /**
   * Which pages of a generation were faulted on, in the order of the first times: an opaque record
   * for `policy.history` of the next generation. Empty if it is not served.
   */
  async history(generation: string): Promise<Buffer> {
    return typed(() => this.#native.history(generation));
  }

  async close(): Promise<void> {
    await typed(() => this.#native.close());
  }
}

/** Fetches a generation's pages into a replica; attached to it until `close()`. */
export class McdistClient {
  readonly #native: NativeClient;

  /** @throws E_ARGUMENT, E_REPLICA_MISMATCH (replica of another generation), E_NETWORK */
  constructor(options: McdistClientOptions) {
    this.#native = typed(() => new (native().McdistClient)(options));
  }

  /**
   * Resolves when the page is in the replica.
   * @throws E_SOURCE_LOST (source gone, or does not hold the page), E_IO (it cannot read it, or the
   * replica cannot store it), E_REPLICA_MISMATCH (another number of pages there), E_ARGUMENT
   */
  async fetch(page: number): Promise<void> {
    try {
      await this.#native.fetch(page);
    } catch (error) {
      throw asSnowflockError(error);
    }
  }

  /** Asks for `count` pages nobody waits for yet, as fast as the network takes them. */
  prefetch(first: number, count = 1): void {
    typed(() => this.#native.prefetch(first, count));
  }

  /**
   * All pages that the replica's users need, as fast as the server sends them to the group, until
   * all are here. `prefetch()` of the whole generation does the same.
   */
  subscribe(on = true): void {
    typed(() => this.#native.subscribe(on));
  }

  /**
   * The source speaks from another address now (or again, after it was given up). `others`: servers
   * of the same generation that are turned to as well as those that announce themselves; 32 at most.
   */
  setServer(server: ServerAddress, others: readonly ServerAddress[] = []): void {
    typed(() => this.#native.setServer(server, others));
  }

  stats(): McdistClientStats {
    return typed(() => this.#native.stats());
  }

  /** Waiters of the replica stay, for its next client. */
  async close(): Promise<void> {
    await typed(() => this.#native.close());
  }
}

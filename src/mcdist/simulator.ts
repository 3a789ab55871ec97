import { SnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';
import type { McdistPolicyOptions } from './mcdist.js';

/** What a client does: touches pages in this order, computing before each. */
export interface SimTrace {
  readonly pages: Uint32Array;
  /** Nanoseconds before each touch; as many as pages. */
  readonly computeNs: Uint32Array;
}

/** Clients behind links alike that multicast reaches at the same moment. */
export interface SimSegment {
  readonly clients: number;
  /** Of each client's link; matters if it is below the server's. 0, the default: no limit. */
  readonly bytesPerS?: number;
  /** One way; default 0.05. */
  readonly delayMs?: number;
  /** What the switch holds for a client; default 512 KiB. What comes beyond is lost. */
  readonly queueBytes?: number;
  /** Share of packets lost, for each client by itself, both ways. */
  readonly loss?: number;
}

export interface SimChange {
  readonly atMs: number;
  /** `die`: clients are gone for good. `part` and `heal`: nothing passes to and from them. */
  readonly kind: 'die' | 'part' | 'heal' | 'server-die' | 'server-restart';
  /** The first client, counted through all segments. */
  readonly first?: number;
  /** How many clients; default 1. */
  readonly count?: number;
}

/** Defaults are in `native/mcdist/sim_config.h`. */
export interface SimOptions {
  readonly seed?: number;
  /** Pages of the generation. */
  readonly pages: number;
  readonly segments: readonly SimSegment[];
  /** Client i has trace i mod length. */
  readonly traces: readonly SimTrace[];
  /** Packets of a page: 3 with an MTU of 1500, 1 with 9000. */
  readonly fragments?: number;
  /** A baseline: each request is answered to the client that sent it, as TCP would. */
  readonly unicast?: boolean;
  /** Share of pages that are all zeros. */
  readonly zeroShare?: number;
  readonly policy?: McdistPolicyOptions;
  /** Clients the server knows at a time. */
  readonly maxPeers?: number;
  /** The server's link, each way; default 1 Gbit/s. */
  readonly serverBytesPerS?: number;
  /** Each client touches the pages of such a window of the trace in an order of its own. */
  readonly jitterPages?: number;
  /** Share of touches that go to a page of the client's own choice. */
  readonly privateShare?: number;
  /** Share of touches a client leaves out. */
  readonly skipShare?: number;
  /** Clients compute faster or slower by up to this share. */
  readonly speedSpread?: number;
  /** Clients start within this time. */
  readonly joinSpreadMs?: number;
  readonly joins?: readonly { readonly client: number; readonly atMs: number }[];
  /** Clients want first what others faulted on. */
  readonly history?: boolean;
  /** Each client subscribes to the whole generation. */
  readonly prefetchAll?: boolean;
  readonly changes?: readonly SimChange[];
  /** What the server's processor spends on a request, on a page. */
  readonly requestCpuMs?: number;
  readonly pageCpuMs?: number;
  readonly sourceTimeoutMs?: number;
  /** A violation if a fault waits longer (unless the source is lost). */
  readonly maxWaitMs?: number;
  /** A violation if the virtual time gets here. */
  readonly maxTimeMs?: number;
  /** A violation if the server sends more than so many times each page asked for. */
  readonly maxBytesRatio?: number;
  readonly checkIntervalMs?: number;
}

export interface SimSample {
  readonly atMs: number;
  readonly sentBytes: number;
  readonly droppedBytes: number;
  readonly rateBytesPerS: number;
  readonly queuedPages: number;
  readonly done: number;
}

/** Bytes include UDP and IP headers; arrays have an element for each client. */
export interface SimResult {
  readonly endMs: number;
  readonly maxWaitMs: number;
  readonly events: number;
  readonly sentBytes: number;
  readonly sentPackets: number;
  /** By all clients, before losses of their own. */
  readonly receivedBytes: number;
  readonly pagesServed: number;
  readonly zeroPagesServed: number;
  readonly distinctPages: number;
  /** Packets sent by clients. */
  readonly requests: number;
  readonly requestBytes: number;
  /** Pages in them. */
  readonly pagesRequested: number;
  readonly retries: number;
  readonly requestsDropped: number;
  /** By the switch's queues towards clients. */
  readonly droppedBytes: number;
  readonly lockstepIgnored: number;
  readonly merged: number;
  readonly queueDropped: number;
  readonly welcomes: number;
  readonly evictedPeers: number;
  /** Packets of newcomers while all places were taken by clients just heard. */
  readonly refusedPeers: number;
  readonly cuts: number;
  readonly cutsUndone: number;
  readonly pagesPushed: number;
  readonly unicastAnswers: number;
  /** Of blocks. */
  readonly reports: number;
  readonly repairSymbols: number;
  readonly paritySymbols: number;
  /** By parity, of all clients. */
  readonly pagesRepaired: number;
  readonly announces: number;
  readonly maxQueued: number;
  readonly startMs: Float64Array;
  /** Infinity if it did not get so far. */
  readonly firstPageMs: Float64Array;
  /** From when on at most a tenth of the time was waiting (in blocks of 128 touches). */
  readonly atSpeedMs: Float64Array;
  readonly finishedMs: Float64Array;
  readonly waitedMs: Float64Array;
  readonly faults: Float64Array;
  /** An index of {@link SIM_OUTCOMES}. */
  readonly outcome: Uint8Array;
  readonly samples: readonly SimSample[];
}

export const SIM_OUTCOMES = ['finished', 'source-lost', 'died', 'page-failed'] as const;

const native = loadAddon<{
  mcdistSimulate: (options: SimOptions) => { result: Promise<SimResult>; stop(): void };
}>('dataplane');

/**
 * mcdist in virtual time, by the classes that run (`native/mcdist/sim.h`). The same options give
 * the same result. E_INTERNAL: an invariant did not hold; the message has seed, time and client.
 */
export async function simulate(options: SimOptions, signal?: AbortSignal): Promise<SimResult> {
  let stop: (() => void) | undefined;
  try {
    const run = native.mcdistSimulate(options);
    stop = run.stop;
    signal?.addEventListener('abort', stop);
    return await run.result;
  } catch (error) {
    const { code, message } = error as { code?: string; message?: string };
    if (code === 'E_ARGUMENT' || code === 'E_INTERNAL' || code === 'E_INTERRUPTED') {
      throw new SnowflockError(code, message ?? '');
    }
    throw error;
  } finally {
    if (stop) signal?.removeEventListener('abort', stop);
  }
}

import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { resolve } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import {
  type PageSource,
  RemoteReplica,
  type RemoteReplicaStats,
} from '../pagestore/remote-replica.js';
import type { ReplicaHandle } from '../pagestore/replica.js';
import type { Source } from './source-file.js';

export interface RemoteOptions {
  /** This host's IPv4 address towards the source; default: what the routing table says. */
  readonly interfaceAddress?: string;
  /**
   * Fetch all of it in the background, in bytes a second; 0: no limit; absent: on demand only. It
   * starts at once. To leave out pages that a disk has overwritten, open that first and then call
   * `prefetch()`.
   */
  readonly prefetch?: number;
  /** Absent pages end with E_SOURCE_LOST (EIO for NBD) so long after the last word; default 30 s. */
  readonly sourceTimeoutMs?: number;
  readonly mtuBytes?: number;
  /** How often fetched pages are made durable; default 30 s. */
  readonly syncIntervalMs?: number;
}

/** A generation of another host, as the base of disks here: `{ kind: 'replica', generation }`. */
export interface RemoteGeneration {
  readonly generation: string;
  readonly sizeBytes: number;
  readonly base: { readonly kind: 'replica'; readonly generation: string };
  /** To be given to `Disk.open`. */
  readonly replica: ReplicaHandle;
  /** Shared by all that have this replica open. */
  readonly events: RemoteReplica;
  /** Bytes a second, 0: no limit. Also starts one that failed again, or changes the rate. */
  prefetch(rateBytesPerS: number): void;
  /** While true a prefetch leaves out no page, whatever the disks over the replica say. */
  needAll(all: boolean): void;
  /** Another source of the same generation. E_REPLICA_MISMATCH, E_NETWORK. */
  setSource(source: Source): Promise<void>;
  /** Tries a source that was lost once more. */
  reconnect(server?: { address: string; port: number }): void;
  stats(): RemoteReplicaStats;
  /** To be called when the disks over it are closed. */
  close(): Promise<void>;
}

interface Shared {
  readonly remote: RemoteReplica;
  readonly source: KnownGeneration;
  readonly options: RemoteOptions;
  users: number;
}

/** What is known of a generation if its source is not. */
export type KnownGeneration = Pick<Source, 'generation' | 'size_bytes'>;

/** Replicas open in this process by path: clones of one generation share one, and one client. */
const open = new Map<string, Shared>();
/** Closes under way: the files are free when they are done. */
const closing = new Map<string, Promise<void>>();

function pageSource(source: Source): PageSource {
  const { address, port, group, group_port, key } = source;
  return { address, port, group, groupPort: group_port, key: Buffer.from(key, 'hex') };
}

/**
 * Opens the replica at `replicaPath` (made if missing) of a published generation. The source is not
 * waited for: it may come up later, or be gone for good if the replica is complete. Without one
 * (only the generation and its size known) absent pages end with E_SOURCE_LOST.
 * @throws E_REPLICA_MISMATCH, E_IN_USE (by another process), E_IO, E_CORRUPT, E_NETWORK
 */
export async function openRemoteGeneration(
  source: Source | KnownGeneration,
  replicaPath: string,
  options: RemoteOptions = {},
): Promise<RemoteGeneration> {
  const path = resolve(replicaPath);
  const interfaceAddress =
    options.interfaceAddress ??
    ('address' in source ? await addressTowards(source.address) : '0.0.0.0');
  await closing.get(path);
  // Nothing is awaited from here on: two that open it at once share it.
  let shared = open.get(path);
  if (shared === undefined) {
    const remote = new RemoteReplica({
      path,
      generation: source.generation,
      pages: Math.ceil(source.size_bytes / 4096),
      medium: 'disk',
      ...('address' in source ? { source: pageSource(source) } : {}),
      interfaceAddress,
      syncIntervalMs: options.syncIntervalMs ?? 30_000,
      ...(options.sourceTimeoutMs === undefined
        ? {}
        : { sourceTimeoutMs: options.sourceTimeoutMs }),
      ...(options.mtuBytes === undefined ? {} : { mtuBytes: options.mtuBytes }),
    });
    shared = { remote, source, options, users: 0 };
    open.set(path, shared);
  } else if (shared.source.generation !== source.generation) {
    throw new SnowflockError(
      'E_REPLICA_MISMATCH',
      `${path} is open here as a replica of generation ${shared.source.generation}`,
    );
  }
  shared.users++;
  if (options.prefetch !== undefined) shared.remote.prefetch({ rateBytesPerS: options.prefetch });
  return handle(path, shared);
}

function handle(path: string, shared: Shared): RemoteGeneration {
  const { remote, source } = shared;
  let closed: Promise<void> | undefined;
  return {
    generation: source.generation,
    sizeBytes: source.size_bytes,
    base: { kind: 'replica', generation: source.generation },
    replica: remote.replica.handle,
    events: remote,
    prefetch: (rateBytesPerS) => remote.prefetch({ rateBytesPerS }),
    needAll: (all) => remote.replica.needAll(all),
    setSource: async (next) => {
      checkSame(next, source);
      const from = shared.options.interfaceAddress ?? (await addressTowards(next.address));
      await remote.setSource(pageSource(next), from);
    },
    reconnect: (server) => remote.reconnect(server),
    stats: () => remote.stats(),
    close: () => {
      closed ??= release(path, shared);
      return closed;
    },
  };
}

async function release(path: string, shared: Shared): Promise<void> {
  if (--shared.users > 0) return;
  open.delete(path);
  const done = shared.remote.close().finally(() => closing.delete(path));
  closing.set(path, done);
  await done;
}

/** E_REPLICA_MISMATCH. */
export function checkSame(source: KnownGeneration, known: KnownGeneration): void {
  if (source.generation === known.generation && source.size_bytes === known.size_bytes) return;
  throw new SnowflockError(
    'E_REPLICA_MISMATCH',
    `the source is of generation ${source.generation} (${source.size_bytes} bytes), not ${known.generation} (${known.size_bytes} bytes)`,
  );
}

/** The address packets to a host leave from. Sends nothing. @throws E_NETWORK */
async function addressTowards(address: string): Promise<string> {
  const socket = createSocket('udp4');
  try {
    socket.connect(9, address); // "discard"; connecting a UDP socket only looks the route up
    await once(socket, 'connect');
    return socket.address().address;
  } catch (error) {
    throw new SnowflockError('E_NETWORK', `no route to the source ${address}: ${String(error)}`, {
      cause: error,
    });
  } finally {
    socket.close();
  }
}

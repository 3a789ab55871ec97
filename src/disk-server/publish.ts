import { SnowflockError } from '../common/errors.js';
import { newGenerationKey } from '../common/ids.js';
import type { Disk } from '../cow-disk/disk.js';
import { type Group, GroupReserve } from '../mcdist/groups.js';
import {
  type McdistPolicyOptions,
  McdistServer,
  type McdistServerStats,
} from '../mcdist/mcdist.js';
import { exportGeneration } from './disk-server.js';
import type { Source } from './source-file.js';

const LISTEN_MS = 50;

/** What is published of: a disk, or whatever else has generations. */
export type GenerationHolder = Pick<Disk, 'provider'> & {
  info(): { readonly sizeBytes: number };
};

export interface PublishOptions {
  /** IPv4 address of this host that the others reach: requests come to it, pages leave by it. */
  readonly address: string;
  /** UDP; default any. */
  readonly port?: number;
  /** Default: that of `previous`, else a random one on which nobody was heard for LISTEN_MS. */
  readonly group?: Group;
  /** Multicast hops; default 1. */
  readonly ttl?: number;
  readonly mtuBytes?: number;
  readonly policy?: McdistPolicyOptions;
  /**
   * What it was published as before: port (if free and none is given), group and key stay, so that
   * the source files given out stay good. Of another generation: E_ARGUMENT.
   */
  readonly previous?: Source;
}

export interface Published {
  readonly source: Source;
  stats(): McdistServerStats;
  /** Once resolved, the generation is not read any more. */
  close(): Promise<void>;
}

/**
 * Offers a generation of a disk to other hosts, by mcdist. The generation may be dropped and the
 * disk closed meanwhile: its pages stay readable until this is closed.
 * @throws E_NOT_FOUND, E_IN_USE (the port), E_NETWORK, E_ARGUMENT
 */
export async function publishGeneration(
  disk: GenerationHolder,
  generation: string,
  options: PublishOptions,
): Promise<Published> {
  const { address, previous } = options;
  if (previous !== undefined && previous.generation !== generation) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `the previous source is of generation ${previous.generation}, not ${generation}`,
    );
  }
  const before = previous && { group: previous.group, port: previous.group_port };
  const { group, port: groupPort } = options.group ?? before ?? (await quietGroup(address));
  const key = previous?.key ?? newGenerationKey();
  const server = new McdistServer({
    bindAddress: address,
    port: options.port ?? previous?.port ?? 0,
    interfaceAddress: address,
    ...(options.mtuBytes === undefined ? {} : { mtuBytes: options.mtuBytes }),
    ...(options.ttl === undefined ? {} : { ttl: options.ttl }),
  });
  try {
    await exportGeneration(server, disk, generation, {
      key: Buffer.from(key, 'hex'),
      group,
      groupPort,
      ...(options.policy === undefined ? {} : { policy: options.policy }),
    });
  } catch (error) {
    await server.close();
    throw error;
  }
  return {
    source: {
      format: 'snowflock-source',
      version: 1,
      generation,
      size_bytes: disk.info().sizeBytes,
      address,
      port: server.port,
      group,
      group_port: groupPort,
      key,
    },
    stats: () => server.stats(generation),
    close: () => server.close(),
  };
}

async function quietGroup(interfaceAddress: string): Promise<Group> {
  const reserve = new GroupReserve({ interfaceAddress, size: 1 });
  try {
    return await reserve.takeQuiet(LISTEN_MS);
  } finally {
    reserve.close();
  }
}

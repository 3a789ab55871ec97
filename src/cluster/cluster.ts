import { SnowflockError } from '../common/errors.js';
import { PeerClient, type PeerClientOptions } from './client.js';
import type { ClusterConfig } from './config.js';
import { loadTlsIdentity } from './tls.js';

/** What `warm` found of one host. */
export interface HostReach {
  readonly host: string;
  /** The reason it cannot be reached; undefined when it can. */
  readonly error: SnowflockError | undefined;
}

/** The registry of hosts and a client for each (this host too: its calls go the same way). */
export class Cluster {
  readonly config: ClusterConfig;
  readonly #peers: ReadonlyMap<string, PeerClient>;

  /** @throws {SnowflockError} `E_CONFIG` when a certificate cannot be read. */
  constructor(config: ClusterConfig, options: PeerClientOptions = {}) {
    this.config = config;
    const identity = loadTlsIdentity(config);
    this.#peers = new Map(
      config.hosts.map((host) => [host.name, new PeerClient(host, identity, options)]),
    );
  }

  /** Names of all hosts, in the configuration's order. */
  get hosts(): readonly string[] {
    return this.config.hosts.map((host) => host.name);
  }

  /** @throws {SnowflockError} `E_NOT_FOUND` when the cluster has no such host. */
  peer(name: string): PeerClient {
    const peer = this.#peers.get(name);
    if (!peer) throw new SnowflockError('E_NOT_FOUND', `the cluster has no host ${name}`);
    return peer;
  }

  /** All hosts but this one. */
  others(): PeerClient[] {
    return [...this.#peers.values()].filter((peer) => peer.host.name !== this.config.name);
  }

  /** Opens connections to all other hosts; a host out of reach is reported, not thrown. */
  async warm(connections?: number): Promise<HostReach[]> {
    return Promise.all(
      this.others().map(async (peer) => {
        try {
          await peer.warm(connections);
          return { host: peer.host.name, error: undefined };
        } catch (error) {
          if (!(error instanceof SnowflockError)) throw error;
          return { host: peer.host.name, error };
        }
      }),
    );
  }

  close(): void {
    for (const peer of this.#peers.values()) peer.close();
  }
}

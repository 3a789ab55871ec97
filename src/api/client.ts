import { type ClientRequest, request as httpRequest } from 'node:http';
import type { Duplex } from 'node:stream';
import { asSnowflockError, isErrorCode, SnowflockError } from '../common/errors.js';
import type { DhcpCounters } from '../dhcp/counters.js';
import type { DisjointRegions, Region } from '../sfld/disjoint.js';
import type { ReplicaSummary, VmCounters, VmSummary } from '../sfld/peers.js';
import type {
  Addressing,
  CloneResult,
  Disjoint,
  ShownFork as ForkRecord,
} from '../sfld/records.js';

export type {
  CloneResult,
  DhcpCounters,
  Disjoint,
  DisjointRegions,
  ForkRecord,
  Region,
  ReplicaSummary,
  VmCounters,
  VmSummary,
};

export interface WireStats {
  ram: Record<string, number>;
  disk: Record<string, number>;
}

/**
 * The sf_* calls from outside a VM, through the daemon of this host (`/run/snowflock/sfld.sock`).
 * All errors are SnowflockErrors with the daemon's code; E_DAEMON if no daemon answers.
 */
export class SnowflockClient {
  readonly #socket: string;

  constructor(socket: string) {
    this.#socket = socket;
  }

  /** `groups`: multicast groups listened to for forks to come, and used by open ones. */
  host(): Promise<{
    name: string;
    hosts: string[];
    driver: string;
    dhcp: DhcpCounters;
    groups: { listening: number; used: number; busy: number; failures: number };
  }> {
    return this.#call('GET', '/v1/host');
  }

  /** All VMs of the cluster, and the hosts that did not answer. */
  list(): Promise<{ vms: VmSummary[]; unreachable: { host: string; message: string }[] }> {
    return this.#call('GET', '/v1/vms');
  }

  /** Replicas of all hosts: what they hold, and whether their source lives. */
  replicas(): Promise<{
    replicas: ReplicaSummary[];
    unreachable: { host: string; message: string }[];
  }> {
    return this.#call('GET', '/v1/replicas');
  }

  /** Boots a VM and waits for its guest. Errors: E_IMAGE_UNKNOWN, E_CAPACITY, E_EXISTS, E_QEMU. */
  run(vm: {
    image: string;
    name: string;
    ram_bytes: number;
    vcpus: number;
    /** Default agent. */
    addressing?: Addressing;
  }): Promise<VmSummary> {
    return this.#call('POST', '/v1/vms', vm);
  }

  /** `sf_request_ticket`: room for up to n clones. Errors: E_CAPACITY. */
  requestTicket(vm: string, clones: number): Promise<{ ticket: string; granted: number }> {
    return this.#call('POST', `${path(vm)}/tickets`, { clones });
  }

  /** `sf_clone` from outside: resolves when each clone runs or has failed. */
  clone(vm: string, ticket: string): Promise<ForkRecord> {
    return this.#call('POST', `${path(vm)}/fork`, { ticket });
  }

  /**
   * `sf_disjoint`: regions of which each clone will need a part of its own, for forks from now on.
   * They are not multicast. Takes the place of what was said before. Resolves to the whole pages
   * within them, as runs [first, count, ...]. Errors: E_ARGUMENT.
   */
  setDisjoint(vm: string, regions: Partial<DisjointRegions>): Promise<Disjoint> {
    return this.#call('PUT', `${path(vm)}/disjoint`, { ram: [], disk: [], ...regions });
  }

  /** `sf_checkpoint_parent`. */
  checkpoint(vm: string): Promise<ForkRecord> {
    return this.#call('POST', `${path(vm)}/checkpoints`, {});
  }

  /** `sf_create_clones`. */
  createClones(vm: string, checkpoint: string, ticket: string): Promise<ForkRecord> {
    return this.#call('POST', `${path(vm)}/checkpoints/${checkpoint}/clones`, { ticket });
  }

  releaseCheckpoint(checkpoint: string): Promise<void> {
    return this.#call('DELETE', `/v1/checkpoints/${checkpoint}`);
  }

  /** A fork and what it put on the wire, null if its counters are gone. */
  fork(id: string): Promise<{ fork: ForkRecord; wire: WireStats | null }> {
    return this.#call('GET', `/v1/forks/${id}`);
  }

  forks(): Promise<{ forks: ForkRecord[] }> {
    return this.#call('GET', '/v1/forks');
  }

  /** `sf_join`: waits until all clones of a ticket or fork have ended. Errors: E_TIMEOUT. */
  async join(vm: string, ref: string, timeoutMs: number): Promise<CloneResult[]> {
    const { clones } = await this.#call<{ clones: CloneResult[] }>('POST', `${path(vm)}/join`, {
      ref,
      timeout_ms: timeoutMs,
    });
    return clones;
  }

  /** `sf_kill`: ends clones of a VM; returns how many ran. */
  async killClones(vm: string, which: { fork: string } | { vmid: number }): Promise<number> {
    const { killed } = await this.#call<{ killed: number }>(
      'POST',
      `${path(vm)}/kill-clones`,
      which,
    );
    return killed;
  }

  /** Ends a VM and its clones. */
  async kill(vm: string): Promise<void> {
    await this.#call('DELETE', path(vm));
  }

  counters(vm: string): Promise<VmCounters> {
    return this.#call('GET', `${path(vm)}/counters`);
  }

  /** Raw stream to a session of a VM (see sfld/sessions.ts for what travels on it). */
  session(vm: string, kind: 'exec' | 'console', query = ''): Promise<Duplex> {
    return new Promise((resolve, reject) => {
      const request = httpRequest({
        socketPath: this.#socket,
        path: `${path(vm)}/${kind}${query}`,
        headers: { connection: 'upgrade', upgrade: 'snowflock' },
      });
      request.on('upgrade', (_response, socket, head) => {
        if (head.length > 0) socket.unshift(head);
        resolve(socket);
      });
      this.#answer(request, undefined, reject);
      request.end();
    });
  }

  #call<T>(method: string, path: string, body?: unknown): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      const text = body === undefined ? undefined : JSON.stringify(body);
      const request = httpRequest({
        socketPath: this.#socket,
        path,
        method,
        headers: text === undefined ? {} : { 'content-type': 'application/json' },
      });
      this.#answer(request, (value) => resolve(value as T), reject);
      request.end(text);
    });
  }

  #answer(
    request: ClientRequest,
    resolve: ((value: unknown) => void) | undefined,
    reject: (error: Error) => void,
  ): void {
    request.on('error', (error) =>
      reject(
        new SnowflockError('E_DAEMON', `no daemon answers at ${this.#socket}: ${error.message}`),
      ),
    );
    request.on('response', (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (chunk: string) => {
        text += chunk;
      });
      response.on('error', (error) => reject(asSnowflockError(error, 'E_DAEMON')));
      response.on('end', () => {
        try {
          const value: unknown = JSON.parse(text);
          if ((response.statusCode ?? 500) < 400 && resolve !== undefined) resolve(value);
          else reject(errorOf(value));
        } catch (error) {
          reject(new SnowflockError('E_DAEMON', 'the daemon gave no JSON', { cause: error }));
        }
      });
    });
  }
}

function path(vm: string): string {
  return `/v1/vms/${encodeURIComponent(vm)}`;
}

function errorOf(value: unknown): SnowflockError {
  const error = (value as { error?: { code?: unknown; message?: unknown } }).error;
  const code = isErrorCode(error?.code) ? error.code : 'E_INTERNAL';
  return new SnowflockError(code, String(error?.message ?? 'the daemon failed'));
}

/**
 * The client end of the control channel: one PeerClient for each other host.
 *
 * Connections are kept and can be opened in advance (`warm`), so that a fork pays no handshake.
 *
 * A peer may vanish without a word (its host loses power, its cable is cut). Each request has its
 * limit (`E_TIMEOUT`); besides, while requests are under way the client pings the peer on a
 * connection of its own, and when the pings stay unanswered every request fails with `E_PEER`: a
 * fork learns of a dead host in seconds, however long its own limit is. A peer that is busy but
 * alive answers pings.
 *
 * A kept connection may have died unnoticed. A request that finds it reset before any byte of an
 * answer is repeated on a new connection only if repeating cannot do it twice (`idempotent`,
 * default for all methods but POST).
 *
 * A peer of another cluster refuses this host's certificate after the TLS 1.3 handshake, which
 * looks like a reset; a ping on a new connection tells the two apart (`E_PEER_AUTH`).
 */

import type { ClientRequest, IncomingMessage } from 'node:http';
import {
  Agent,
  type RequestOptions as HttpsRequestOptions,
  request as httpsRequest,
} from 'node:https';
import type { TSchema } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import type { HostAddress } from './config.js';
import { readEvents } from './events.js';
import type { TlsIdentity } from './tls.js';
import {
  BINARY_TYPE,
  BODY_BYTES_MAX,
  decodeError,
  EVENTS_TYPE,
  JSON_TYPE,
  PING_PATH,
} from './wire.js';

export interface PeerClientOptions {
  /** Connections to one peer at most. Default 16. */
  readonly connectionsMax?: number;
  /** Limit for TCP and TLS set-up. Default 3000. */
  readonly connectTimeoutMs?: number;
  /** A request's limit when it names none. Default 10000. */
  readonly timeoutMs?: number;
  /** Time between pings while requests are under way. Default 1000. */
  readonly pingIntervalMs?: number;
  /** A ping's limit; two in a row unanswered and the peer counts as dead. Default 2000. */
  readonly pingTimeoutMs?: number;
}

export interface RequestOptions {
  /** A JSON body. */
  readonly body?: unknown;
  /** A body of bytes; at most 64 MiB. Not together with `body`. */
  readonly binary?: Uint8Array;
  readonly query?: Readonly<Record<string, string | number | boolean>>;
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
  /** May be repeated on a new connection. Default: true for all methods but POST. */
  readonly idempotent?: boolean;
  /** The answer is checked against this; `E_PEER` when it does not fit. */
  readonly schema?: TSchema;
}

export interface EventOptions {
  readonly query?: NonNullable<RequestOptions['query']>;
  readonly signal?: AbortSignal;
}

type Method = 'GET' | 'POST' | 'PUT' | 'DELETE';

interface Failure {
  readonly error: SnowflockError;
  /** The connection was reset before any byte of an answer. */
  readonly reset: boolean;
  readonly reusedConnection: boolean;
}

const AUTH_CODES = /^(CERT_|DEPTH_|SELF_SIGNED|UNABLE_TO_|ERR_TLS_CERT|ERR_SSL_.*ALERT)/;

export class PeerClient {
  readonly host: HostAddress;
  readonly #agent: Agent;
  /** Pings travel apart: behind a large body they would say nothing. */
  readonly #pingAgent: Agent;
  readonly #options: Required<PeerClientOptions>;
  readonly #underWay = new Set<(error: SnowflockError) => void>();
  #watch: NodeJS.Timeout | undefined;
  #pinging = false;
  #missed = 0;
  #closed = false;

  constructor(host: HostAddress, identity: TlsIdentity, options: PeerClientOptions = {}) {
    this.host = host;
    this.#options = {
      connectionsMax: 16,
      connectTimeoutMs: 3000,
      timeoutMs: 10_000,
      pingIntervalMs: 1000,
      pingTimeoutMs: 2000,
      ...options,
    };
    const tls = {
      ca: [identity.ca],
      cert: identity.cert,
      key: identity.key,
      minVersion: 'TLSv1.3' as const,
      // The certificate must carry the peer's name: another member cannot stand in for it.
      servername: host.name,
      rejectUnauthorized: true,
      keepAlive: true,
      keepAliveMsecs: 5000,
      noDelay: true,
      scheduling: 'lifo' as const,
    };
    this.#agent = new Agent({
      ...tls,
      maxSockets: this.#options.connectionsMax,
      maxFreeSockets: this.#options.connectionsMax,
    });
    this.#pingAgent = new Agent({ ...tls, maxSockets: 1 });
  }

  /**
   * Opens connections (default 4) and leaves them open for requests to come.
   * @throws {SnowflockError} `E_PEER`, `E_PEER_AUTH`.
   */
  async warm(connections = 4): Promise<void> {
    const count = Math.min(connections, this.#options.connectionsMax);
    await Promise.all(Array.from({ length: count }, () => this.ping()));
  }

  /** Asks the peer for its name. @returns the round trip in milliseconds. */
  async ping(): Promise<number> {
    const start = performance.now();
    await this.request('GET', PING_PATH, {
      timeoutMs: this.#options.connectTimeoutMs + this.#options.pingTimeoutMs,
    });
    return performance.now() - start;
  }

  /**
   * One request and its answer: JSON, or a Buffer when the peer answers with bytes. `T` is the
   * caller's word unless a `schema` is given.
   * @throws {SnowflockError} `E_PEER` (unreachable, dead or not making sense), `E_PEER_AUTH`,
   * `E_TIMEOUT`, `E_INTERRUPTED` (by `signal`), `E_CLOSED`, or what the peer answered; messages
   * start with the host's name.
   */
  async request<T = unknown>(
    method: Method,
    path: string,
    options: RequestOptions = {},
  ): Promise<T> {
    const deadline = performance.now() + (options.timeoutMs ?? this.#options.timeoutMs);
    let outcome = await this.#attempt(method, path, options, deadline, this.#agent);
    if ('error' in outcome && outcome.reset) {
      if (outcome.reusedConnection && (options.idempotent ?? method !== 'POST')) {
        this.#dropIdle();
        outcome = await this.#attempt(method, path, options, deadline, this.#agent);
      } else if (!outcome.reusedConnection && path !== PING_PATH) {
        const probe = await this.#probe();
        if (probe) throw probe;
      }
    }
    if ('error' in outcome) {
      if (outcome.reset && path === PING_PATH && !outcome.reusedConnection) {
        throw new SnowflockError(
          'E_PEER_AUTH',
          `${this.#where()} closed the connection after the TLS handshake: it does not accept this host's certificate`,
          { cause: outcome.error },
        );
      }
      throw outcome.error;
    }
    if (options.schema && !Value.Check(options.schema, outcome.value)) {
      const fault = Value.Errors(options.schema, outcome.value)[0];
      const what = `${fault?.instancePath ?? ''} ${fault?.message ?? ''}`;
      throw new SnowflockError('E_PEER', `${this.host.name}: ${method} ${path} answered ${what}`);
    }
    return outcome.value as T;
  }

  /**
   * A stream of events (see `sendEvents`), until the peer ends it or `signal` aborts.
   * @throws {SnowflockError} as `request`; `E_PEER` when the heartbeat stays away.
   */
  async *events<T = unknown>(path: string, options: EventOptions = {}): AsyncGenerator<T, void> {
    const deadline = performance.now() + this.#options.timeoutMs;
    // A stream occupies its connection for good, so it takes none of the pool's.
    const outcome = await this.#attempt('GET', path, options, deadline, undefined, true);
    if ('error' in outcome) throw outcome.error;
    yield* readEvents<T>(outcome.value as IncomingMessage, this.host.name, options.signal);
  }

  /** Ends all connections; requests under way fail with `E_CLOSED`. */
  close(): void {
    this.#closed = true;
    this.#failAll(new SnowflockError('E_CLOSED', `connection to ${this.host.name} was closed`));
    this.#agent.destroy();
    this.#pingAgent.destroy();
  }

  #where(): string {
    return `${this.host.name} (${this.host.address}:${this.host.port})`;
  }

  #attempt(
    method: Method,
    path: string,
    options: RequestOptions,
    deadline: number,
    agent: Agent | undefined,
    streaming = false,
  ): Promise<{ value: unknown } | Failure> {
    const { signal } = options;
    const name = this.host.name;
    if (this.#closed) {
      return Promise.resolve(failure('E_CLOSED', `connection to ${name} was closed`));
    }
    if (signal?.aborted) {
      return Promise.resolve(failure('E_INTERRUPTED', `${method} ${path} to ${name}`));
    }
    const payload = encodeBody(options);
    if (payload && payload.bytes.byteLength > BODY_BYTES_MAX) {
      return Promise.resolve(
        failure('E_ARGUMENT', `body for ${name} is larger than ${BODY_BYTES_MAX} bytes`),
      );
    }
    return new Promise((resolve) => {
      let settled = false;
      let connected = false;
      let request: ClientRequest | undefined;
      const finish = (outcome: { value: unknown } | Failure): void => {
        if (settled) return;
        settled = true;
        clearTimeout(limit);
        clearTimeout(connectLimit);
        this.#underWay.delete(abandon);
        if (this.#underWay.size === 0) this.#stopWatch();
        signal?.removeEventListener('abort', interrupt);
        resolve(outcome);
        if ('error' in outcome) request?.destroy();
      };
      const abandon = (error: SnowflockError): void =>
        finish({ error, reset: false, reusedConnection: false });
      const interrupt = (): void =>
        abandon(new SnowflockError('E_INTERRUPTED', `${method} ${path} to ${name} was aborted`));

      const remaining = Math.max(0, deadline - performance.now());
      const limit = setTimeout(() => {
        if (!connected) return finish(this.#unreachable('no connection in time'));
        // Other kept connections of a silent peer are as dead as this one.
        this.#dropIdle();
        finish(failure('E_TIMEOUT', `${name}: ${method} ${path} took longer than its limit`));
      }, remaining);
      const connectLimit = setTimeout(() => {
        if (!connected) finish(this.#unreachable('no connection in time'));
      }, this.#options.connectTimeoutMs);

      const settings: HttpsRequestOptions = {
        agent: agent ?? new Agent({ ...this.#agent.options, keepAlive: false, maxSockets: 1 }),
        host: this.host.address,
        port: this.host.port,
        method,
        path: withQuery(path, options.query),
        headers: payload
          ? { 'content-type': payload.type, 'content-length': payload.bytes.byteLength }
          : {},
      };
      const sent = httpsRequest(settings);
      request = sent;
      this.#underWay.add(abandon);
      signal?.addEventListener('abort', interrupt, { once: true });
      if (!this.#watch) this.#startWatch();

      sent.on('socket', (socket) => {
        const ready = (): void => {
          connected = true;
        };
        if (sent.reusedSocket || !socket.connecting) ready();
        else socket.once('secureConnect', ready);
      });
      sent.on('error', (error: NodeJS.ErrnoException) =>
        finish(this.#connectionFailure(error, connected, sent.reusedSocket)),
      );
      sent.on('response', (response) => {
        if (streaming && response.statusCode === 200) {
          if (response.headers['content-type'] === EVENTS_TYPE) return finish({ value: response });
          response.destroy();
          return finish(failure('E_PEER', `${name}: ${path} is not a stream of events`));
        }
        collect(response, (body) => {
          if (body instanceof SnowflockError) return finish({ ...failureOf(body) });
          finish(decodeAnswer(name, `${method} ${path}`, response, body));
        });
      });
      sent.end(payload?.bytes);
    });
  }

  #unreachable(why: string): Failure {
    return failure('E_PEER', `${this.#where()} is unreachable: ${why}`);
  }

  #connectionFailure(
    error: NodeJS.ErrnoException,
    connected: boolean,
    reusedConnection: boolean,
  ): Failure {
    const code = error.code ?? '';
    if (AUTH_CODES.test(code)) {
      const message = `${this.#where()}: certificates do not match: ${error.message}`;
      return failureOf(new SnowflockError('E_PEER_AUTH', message, { cause: error }));
    }
    const reset = connected && (code === 'ECONNRESET' || code === 'EPIPE');
    const what = reset ? 'closed the connection' : `is unreachable: ${error.message}`;
    const mapped = new SnowflockError('E_PEER', `${this.#where()} ${what}`, { cause: error });
    return { error: mapped, reset, reusedConnection };
  }

  /** After a reset: the peer's refusal of this host's certificate, if that is what it was. */
  async #probe(): Promise<SnowflockError | undefined> {
    this.#dropIdle();
    try {
      await this.ping();
    } catch (error) {
      if (error instanceof SnowflockError && error.code === 'E_PEER_AUTH') return error;
    }
    return undefined;
  }

  #dropIdle(): void {
    for (const sockets of Object.values(this.#agent.freeSockets)) {
      for (const socket of sockets ?? []) socket.destroy();
    }
  }

  #failAll(error: SnowflockError): void {
    for (const abandon of [...this.#underWay]) abandon(error);
  }

  #startWatch(): void {
    this.#missed = 0;
    this.#watch = setInterval(() => this.#check(), this.#options.pingIntervalMs);
    this.#watch.unref();
  }

  #stopWatch(): void {
    clearInterval(this.#watch);
    this.#watch = undefined;
  }

  #check(): void {
    if (this.#pinging) return;
    this.#pinging = true;
    let done = false;
    const settle = (answered: boolean): void => {
      if (done) return;
      done = true;
      clearTimeout(limit);
      this.#pinging = false;
      this.#missed = answered ? 0 : this.#missed + 1;
      if (this.#missed < 2 || this.#underWay.size === 0) return;
      this.#dropIdle();
      this.#failAll(new SnowflockError('E_PEER', `${this.#where()} does not answer any more`));
    };
    const ping = httpsRequest({
      agent: this.#pingAgent,
      host: this.host.address,
      port: this.host.port,
      path: PING_PATH,
    });
    const limit = setTimeout(() => {
      settle(false);
      ping.destroy();
    }, this.#options.pingTimeoutMs);
    limit.unref();
    ping.on('error', () => settle(false));
    ping.on('response', (response) => {
      response.resume();
      response.on('end', () => settle(true));
      response.on('error', () => settle(false));
    });
    ping.end();
  }
}

function failure(
  code: 'E_CLOSED' | 'E_INTERRUPTED' | 'E_ARGUMENT' | 'E_TIMEOUT' | 'E_PEER',
  message: string,
): Failure {
  return failureOf(new SnowflockError(code, message));
}

function failureOf(error: SnowflockError): Failure {
  return { error, reset: false, reusedConnection: false };
}

function encodeBody(options: RequestOptions): { type: string; bytes: Uint8Array } | undefined {
  if (options.binary) return { type: BINARY_TYPE, bytes: options.binary };
  if (options.body === undefined) return undefined;
  return { type: JSON_TYPE, bytes: Buffer.from(JSON.stringify(options.body)) };
}

function withQuery(path: string, query: RequestOptions['query']): string {
  if (!query) return path;
  const pairs = Object.entries(query).map(([key, value]): [string, string] => [key, `${value}`]);
  return `${path}?${new URLSearchParams(pairs).toString()}`;
}

function collect(response: IncomingMessage, done: (body: Buffer | SnowflockError) => void): void {
  const parts: Buffer[] = [];
  let bytes = 0;
  response.on('data', (part: Buffer) => {
    bytes += part.byteLength;
    if (bytes > BODY_BYTES_MAX) {
      done(new SnowflockError('E_PEER', `answer is larger than ${BODY_BYTES_MAX} bytes`));
      response.destroy();
    } else {
      parts.push(part);
    }
  });
  response.on('end', () => done(Buffer.concat(parts)));
  response.on('error', (error) =>
    done(new SnowflockError('E_PEER', `answer was cut short: ${error.message}`)),
  );
}

function decodeAnswer(
  host: string,
  call: string,
  response: IncomingMessage,
  body: Buffer,
): { value: unknown } | Failure {
  const status = response.statusCode ?? 0;
  if (status < 200 || status >= 300) return failureOf(decodeError(host, status, body));
  const type = response.headers['content-type'] ?? '';
  if (type.startsWith(BINARY_TYPE)) return { value: body };
  if (body.byteLength === 0) return { value: undefined };
  try {
    return { value: JSON.parse(body.toString('utf8')) };
  } catch {
    return failure('E_PEER', `${host}: ${call} answered with something that is not JSON`);
  }
}

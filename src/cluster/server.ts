/**
 * The server end of the control channel: fastify over TLS 1.3 that speaks only to hosts of the
 * cluster.
 *
 * A connection without a certificate of the cluster's authority ends in the TLS layer, before a
 * byte of HTTP is read. A request's peer is its certificate's DNS name, which must be in this
 * host's list (`request.peerHost`); it is checked before the body is read.
 *
 * Whatever a handler throws becomes `{error: {code, message, host}}`. Bodies are bounded; what is
 * not JSON or bytes is refused.
 */
import type { Server } from 'node:https';
import type { TLSSocket } from 'node:tls';
import Fastify, { type FastifyError, type FastifyReply, type FastifyRequest } from 'fastify';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import type { ClusterConfig } from './config.js';
import { loadTlsIdentity, peerHostName } from './tls.js';
import {
  BINARY_TYPE,
  BODY_BYTES_MAX,
  EVENTS_TYPE,
  encodeError,
  HEARTBEAT_MS,
  httpStatus,
  PING_PATH,
} from './wire.js';

declare module 'fastify' {
  interface FastifyRequest {
    /** The name of the host that sent this request, from its certificate. */
    peerHost: string;
  }
}

/** A server to add routes to; `await server.listen({ host, port })`, `await server.close()`. */
export type PeerServer = ReturnType<typeof createPeerServer>;

/** Connections one server holds at most; each peer's client opens a handful. */
const CONNECTIONS_MAX = 4096;

/**
 * Makes the server (not yet listening: {@link listenForPeers} binds it to the host's address).
 * @throws {SnowflockError} `E_CONFIG` when a certificate cannot be read.
 */
export function createPeerServer(config: ClusterConfig, logger?: Logger) {
  const identity = loadTlsIdentity(config);
  const known = new Set(config.hosts.map((host) => host.name));
  const server = Fastify<Server>({
    https: {
      ...identity,
      requestCert: true,
      rejectUnauthorized: true,
      minVersion: 'TLSv1.3',
      handshakeTimeout: 5_000,
    },
    bodyLimit: BODY_BYTES_MAX,
    // Idle connections are kept: opening one costs a handshake in the middle of a fork.
    keepAliveTimeout: 600_000,
    requestTimeout: 60_000,
    forceCloseConnections: true,
    // What is wrong is refused, not bent into shape (0 would become null).
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false } },
    routerOptions: { maxParamLength: 256 },
  });
  server.server.maxConnections = CONNECTIONS_MAX;
  server.server.headersTimeout = 10_000;
  server.server.on('secureConnection', (socket: TLSSocket) => {
    socket.setKeepAlive(true, 5_000);
    socket.setNoDelay(true);
  });
  server.server.on('tlsClientError', (error: Error, socket: TLSSocket) => {
    logger?.warn({ peer: socket.remoteAddress, reason: error.message }, 'TLS connection refused');
  });

  server.decorateRequest('peerHost', '');
  server.addHook('onRequest', async (request) => {
    const name = peerHostName(request.raw.socket as TLSSocket);
    if (name === undefined || !known.has(name)) {
      throw new SnowflockError(
        'E_PEER_AUTH',
        `${name ?? 'a host without a name'} (${request.ip}) is not in this host's list of hosts`,
      );
    }
    request.peerHost = name;
  });

  server.removeContentTypeParser('text/plain');
  server.addContentTypeParser(
    BINARY_TYPE,
    { parseAs: 'buffer', bodyLimit: BODY_BYTES_MAX },
    (_request, body, done) => done(null, body),
  );

  server.setErrorHandler((error, request, reply) => {
    const mapped = toSnowflockError(error);
    if (mapped.code === 'E_INTERNAL') {
      logger?.error({ err: error, peer: request.peerHost, url: request.url }, 'request failed');
    }
    return answerError(reply, mapped, config.name);
  });
  server.setNotFoundHandler((request, reply) =>
    answerError(
      reply,
      new SnowflockError('E_NOT_FOUND', `no such call: ${request.method} ${request.url}`),
      config.name,
    ),
  );

  server.get(PING_PATH, async () => ({ host: config.name }));
  return server;
}

/** Binds to this host's address and control port. @throws {SnowflockError} `E_IN_USE`, `E_IO`. */
export async function listenForPeers(server: PeerServer, config: ClusterConfig): Promise<void> {
  try {
    await server.listen({ host: config.address, port: config.port, backlog: 256 });
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    const where = `${config.address}:${config.port}`;
    if (code === 'EADDRINUSE') {
      throw new SnowflockError('E_IN_USE', `control port ${where} is in use`, { cause: error });
    }
    throw new SnowflockError('E_IO', `cannot listen on ${where}: ${String(error)}`, {
      cause: error,
    });
  }
}

/**
 * Answers with a stream of events, one JSON value a line, until `events` ends or the peer goes
 * away (then `events.return()` is called). A peer that does not read stops the stream's source.
 */
export async function sendEvents(
  request: FastifyRequest,
  reply: FastifyReply,
  events: AsyncIterable<unknown>,
): Promise<void> {
  reply.hijack();
  const out = reply.raw;
  const gone = new AbortController();
  out.on('close', () => gone.abort());
  const aborted = new Promise<undefined>((resolve) => {
    gone.signal.addEventListener('abort', () => resolve(undefined), { once: true });
  });
  out.writeHead(200, { 'content-type': EVENTS_TYPE });
  out.flushHeaders();
  const heartbeat = setInterval(() => {
    // A peer that has stopped reading gets no heartbeats piled up for it.
    if (!out.writableNeedDrain) out.write('\n');
  }, HEARTBEAT_MS);
  const iterator = events[Symbol.asyncIterator]();
  try {
    while (!gone.signal.aborted) {
      const next = await Promise.race([iterator.next(), aborted]);
      if (next === undefined || next.done) break;
      if (!out.write(`${JSON.stringify(next.value)}\n`)) {
        await Promise.race([new Promise((resolve) => out.once('drain', resolve)), aborted]);
      }
    }
    out.end();
  } catch (error) {
    // The status line is gone already: the error travels as the last event.
    out.end(`${JSON.stringify(encodeError(asSnowflockError(error), request.hostname))}\n`);
  } finally {
    clearInterval(heartbeat);
    // Not awaited: a generator stuck in its next() returns only after that.
    Promise.resolve(iterator.return?.()).catch(() => {});
  }
}

function answerError(reply: FastifyReply, error: SnowflockError, host: string): FastifyReply {
  return reply.code(httpStatus(error.code)).type('application/json').send(encodeError(error, host));
}

function toSnowflockError(error: unknown): SnowflockError {
  if (error instanceof SnowflockError) return error;
  const status = (error as Partial<FastifyError> | null)?.statusCode;
  // fastify's own refusals (too large, not JSON, fails the route's schema) are the caller's fault.
  if (status !== undefined && status >= 400 && status < 500) {
    return new SnowflockError('E_ARGUMENT', String((error as Error).message), { cause: error });
  }
  return asSnowflockError(error);
}

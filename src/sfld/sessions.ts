/**
 * `exec` and `console` sessions: an HTTP upgrade turns the connection into a stream. `exec` speaks
 * one JSON object a line ({stdin}, {eof}, {signal} in; {stdout}, {stderr}, {exited} out, bytes as
 * base64); `console` carries raw bytes. A VM of another host is reached through that host's daemon,
 * over mutual TLS; this one only passes bytes on.
 */
import type { IncomingMessage } from 'node:http';
import { request as httpsRequest } from 'node:https';
import { connect } from 'node:net';
import { constants } from 'node:os';
import type { Duplex } from 'node:stream';
import { pipeline } from 'node:stream';
import { loadTlsIdentity } from '../cluster/index.js';
import { asSnowflockError, isErrorCode, SnowflockError } from '../common/errors.js';
import { readLines } from '../common/lines.js';
import { within } from '../common/timeout.js';
import type { Host, LiveVm } from './host.js';
import { liveVm } from './host.js';
import { locate } from './locate.js';

const LINE_LIMIT_BYTES = 256 * 1024;
const CONNECT_LIMIT_MS = 5_000;
const READY_LIMIT_MS = 60_000;
/** Output not yet taken by the caller; beyond it the guest program waits. */
const OUTPUT_LIMIT_BYTES = 1024 * 1024;

export interface ExecRequest {
  argv: string[];
  env?: Record<string, string>;
}

/** Sessions of this daemon. */
const open = new Set<Duplex>();

/** Ends all sessions: a server does not close while one of its connections is open. */
export function closeSessions(): void {
  for (const socket of open) socket.destroy();
}

/** Answers an upgrade request for `/v1/vms/REF/exec` or `/console`. `direct`: only VMs of this host. */
export async function acceptSession(
  host: Host,
  request: IncomingMessage,
  socket: Duplex,
  direct: boolean,
): Promise<void> {
  socket.on('error', () => socket.destroy());
  open.add(socket);
  socket.once('close', () => open.delete(socket));
  try {
    const url = new URL(request.url ?? '/', 'http://host');
    const match = /^\/v1\/vms\/([^/]+)\/(exec|console)$/.exec(url.pathname);
    if (match === null) throw new SnowflockError('E_NOT_FOUND', `no session ${url.pathname}`);
    const ref = decodeURIComponent(match[1] ?? '');
    const where = direct ? { host: host.config.name, vm: ref } : await locate(host, ref);
    if (where.host !== host.config.name) {
      await passOn(host, where, `${match[2]}${url.search}`, socket);
      return;
    }
    const live = liveVm(host, where.vm);
    if (match[2] === 'console') {
      await consoleSession(live, socket);
    } else {
      const wanted = parseExec(url);
      // A clone runs before its guest agent has answered: the caller need not know.
      await within(live.ready, READY_LIMIT_MS, `guest of ${live.record.name}`, 'E_GUEST');
      execSession(live, wanted, socket);
    }
  } catch (error) {
    const mapped = asSnowflockError(error);
    host.log.debug({ code: mapped.code, stack: mapped.stack, url: request.url }, 'session refused');
    const body = JSON.stringify({ error: mapped.toJSON() });
    socket.end(
      `HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
    );
  }
}

function parseExec(url: URL): ExecRequest {
  const value: unknown = JSON.parse(url.searchParams.get('request') ?? 'null');
  const { argv, env } = (value ?? {}) as Partial<ExecRequest>;
  if (!Array.isArray(argv) || argv.length === 0 || argv.some((arg) => typeof arg !== 'string')) {
    throw new SnowflockError('E_ARGUMENT', 'exec needs a command');
  }
  return { argv, ...(env === undefined ? {} : { env }) };
}

function switchProtocols(socket: Duplex): void {
  socket.write(
    'HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: snowflock\r\n\r\n',
  );
}

async function consoleSession(live: LiveVm, socket: Duplex): Promise<void> {
  const console = connect(live.vm.record.console_socket);
  await new Promise<void>((resolve, reject) => {
    console.once('connect', () => resolve());
    console.once('error', (error) =>
      reject(new SnowflockError('E_QEMU', `cannot open the console: ${error.message}`)),
    );
  });
  switchProtocols(socket);
  pipeline(socket, console, () => {});
  pipeline(console, socket, () => {});
}

function execSession(live: LiveVm, request: ExecRequest, socket: Duplex): void {
  const session = live.channel.exec(request);
  const kill = (name: string): void => {
    const number = constants.signals[name as NodeJS.Signals];
    if (number !== undefined) session.signal(number);
  };
  switchProtocols(socket);
  const send = (message: unknown): void => {
    if (!socket.destroyed) socket.write(`${JSON.stringify(message)}\n`);
  };
  const pass = (name: 'stdout' | 'stderr', stream: NodeJS.ReadableStream): void => {
    stream.on('data', (data: Buffer) => {
      send({ [name]: data.toString('base64') });
      if (socket.writableLength > OUTPUT_LIMIT_BYTES) {
        stream.pause();
        socket.once('drain', () => stream.resume());
      }
    });
  };
  pass('stdout', session.stdout);
  pass('stderr', session.stderr);
  session.exited.then(
    ({ status, signal }) => {
      send({ exited: { status: status ?? null, signal: signal ?? null } });
      socket.end();
    },
    (error: unknown) => {
      send({ error: asSnowflockError(error).toJSON() });
      socket.end();
    },
  );
  session.stdin.on('drain', () => socket.resume());
  session.stdin.once('close', () => socket.resume());
  readLines(socket, LINE_LIMIT_BYTES, (line) => {
    try {
      const message = JSON.parse(line) as { stdin?: string; eof?: boolean; signal?: string };
      if (message.stdin !== undefined) {
        // What the program does not read stays with the caller.
        if (!session.stdin.write(Buffer.from(message.stdin, 'base64'))) socket.pause();
      }
      if (message.eof === true) session.stdin.end();
      if (message.signal !== undefined) kill(message.signal);
    } catch (error) {
      socket.destroy(error instanceof Error ? error : new Error(String(error)));
    }
  });
  // The caller went away: so does its program.
  socket.once('close', () => kill('SIGHUP'));
}

/** Why the other daemon refused, in its own words and with its code. */
async function refusal(response: IncomingMessage): Promise<SnowflockError> {
  let text = '';
  for await (const chunk of response) {
    text += String(chunk);
    if (text.length > LINE_LIMIT_BYTES) break;
  }
  try {
    const { code, message } = (JSON.parse(text) as { error: { code: string; message: string } })
      .error;
    return new SnowflockError(isErrorCode(code) ? code : 'E_PEER', message);
  } catch {
    return new SnowflockError('E_PEER', `a session was refused with ${response.statusCode}`);
  }
}

async function passOn(
  host: Host,
  where: { host: string; vm: string },
  tail: string,
  socket: Duplex,
): Promise<void> {
  const address = host.config.hosts.find((one) => one.name === where.host);
  if (address === undefined) throw new SnowflockError('E_PEER', `no host ${where.host}`);
  const outgoing = httpsRequest({
    ...loadTlsIdentity(host.config),
    servername: address.name,
    host: address.address,
    port: address.port,
    agent: false, // a connection of its own
    path: `/v1/vms/${encodeURIComponent(where.vm)}/${tail}`,
    headers: { connection: 'upgrade', upgrade: 'snowflock' },
    // The other daemon waits for the guest before it answers.
    timeout: READY_LIMIT_MS + CONNECT_LIMIT_MS,
  });
  const limit = setTimeout(
    () => outgoing.destroy(new Error('no connection in time')),
    CONNECT_LIMIT_MS,
  );
  outgoing.on('socket', (raw) => raw.once('secureConnect', () => clearTimeout(limit)));
  outgoing.once('close', () => clearTimeout(limit));
  const far = await new Promise<Duplex>((resolve, reject) => {
    outgoing.on('upgrade', (_response, upgraded, head) => {
      upgraded.setTimeout(0);
      // The first output may have come in one piece with the answer.
      if (head.length > 0) upgraded.unshift(head);
      resolve(upgraded);
    });
    outgoing.on('response', (response) => {
      refusal(response).then((error) => reject(error), reject);
    });
    outgoing.on('timeout', () => outgoing.destroy(new Error('no answer')));
    // The caller went away while it waited.
    socket.once('close', () => outgoing.destroy(new Error('the caller is gone')));
    outgoing.on('error', (error) =>
      reject(new SnowflockError('E_PEER', `cannot reach ${where.host}: ${error.message}`)),
    );
    outgoing.end();
  });
  switchProtocols(socket);
  pipeline(socket, far, () => {});
  pipeline(far, socket, () => {});
}

/**
 * Client of the QEMU Machine Protocol (docs/interop/qmp-spec): JSON lines over a Unix socket.
 *
 *   connecting ── greeting, qmp_capabilities ──► open ── end of stream, bad input, close() ──► closed
 *
 * Invariants: a command is answered once: by its reply, its time limit, or the close of the
 * connection. Bytes that wait for their newline are bounded. QEMU serves one client per socket at
 * a time and keeps the others waiting without a greeting, which here is E_TIMEOUT.
 * Left out on purpose: out-of-band commands (only postcopy has use for them).
 */
import { EventEmitter } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { SnowflockError } from '../../common/errors.js';

interface Command<A, R> {
  args: A;
  returns: R;
}
type None = Record<string, never>;

export type MigrationStatus =
  | 'none'
  | 'setup'
  | 'cancelling'
  | 'cancelled'
  | 'active'
  | 'device'
  | 'completed'
  | 'failed'
  | (string & {});

/** The commands in use, with their arguments and results. */
export interface QmpCommands {
  stop: Command<None, None>;
  cont: Command<None, None>;
  quit: Command<None, None>;
  'query-status': Command<None, { running: boolean; status: string }>;
  'query-version': Command<
    None,
    { qemu: { major: number; minor: number; micro: number }; package: string }
  >;
  'query-migrate': Command<None, { status?: MigrationStatus; 'error-desc'?: string }>;
  'query-migrate-capabilities': Command<None, { capability: string; state: boolean }[]>;
  'migrate-set-capabilities': Command<
    { capabilities: { capability: string; state: boolean }[] },
    None
  >;
  'migrate-set-parameters': Command<Record<string, number>, None>;
  migrate: Command<{ uri: string }, None>;
  'migrate-incoming': Command<{ uri: string }, None>;
  migrate_cancel: Command<None, None>;
  set_link: Command<{ name: string; up: boolean }, None>;
  'human-monitor-command': Command<{ 'command-line': string }, string>;
}

export interface QmpEvent {
  event: string;
  data: Record<string, unknown>;
  /** Milliseconds since 1970, with microseconds as the fraction. */
  atMs: number;
}

/** QEMU's refusal of a command; `qmpClass` and `description` as QEMU gave them. */
export class QmpError extends SnowflockError {
  constructor(
    readonly command: string,
    readonly qmpClass: string,
    readonly description: string,
  ) {
    super('E_QEMU', `QEMU refused '${command}': ${description}`);
  }
}

interface Pending {
  command: string;
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
  timer: NodeJS.Timeout;
}

/** A reply of QEMU is a few KB; more than this without a newline is not QMP. */
const MAX_LINE_BYTES = 4 << 20;
const MAX_PENDING = 64;

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

export class QmpClient extends EventEmitter<{ event: [QmpEvent]; close: [Error | undefined] }> {
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  #nextId = 1;
  #chunks: Buffer[] = [];
  #chunkBytes = 0;
  #closed = false;
  #onGreeting: (() => void) | undefined;

  private constructor(socket: Socket) {
    super();
    this.#socket = socket;
    socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    socket.on('error', (error) => this.#end(error));
    socket.on('close', () => this.#end(undefined));
  }

  /**
   * Connects and agrees on capabilities.
   * @throws the connect error itself (ENOENT, ECONNREFUSED: QEMU does not listen yet); E_TIMEOUT.
   */
  static async connect(path: string, timeoutMs = 5000): Promise<QmpClient> {
    const socket = createConnection(path);
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    const client = new QmpClient(socket);
    try {
      await new Promise<void>((resolve, reject) => {
        const timer = setTimeout(() => {
          reject(new SnowflockError('E_TIMEOUT', `no QMP greeting on ${path} in ${timeoutMs} ms`));
        }, timeoutMs);
        client.#onGreeting = () => {
          clearTimeout(timer);
          resolve();
        };
        client.once('close', (error) => {
          clearTimeout(timer);
          reject(new SnowflockError('E_CLOSED', `QMP socket ${path} closed`, { cause: error }));
        });
      });
      client.removeAllListeners('close');
      await client.#send('qmp_capabilities', {}, timeoutMs);
    } catch (error) {
      client.close();
      throw error;
    }
    return client;
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** Runs a command. @throws QmpError (E_QEMU), E_TIMEOUT, E_CLOSED. */
  async execute<C extends keyof QmpCommands>(
    command: C,
    args: QmpCommands[C]['args'],
    timeoutMs = 5000,
  ): Promise<QmpCommands[C]['returns']> {
    return (await this.#send(command, args, timeoutMs)) as QmpCommands[C]['returns'];
  }

  close(): void {
    this.#socket.destroy();
    this.#end(undefined);
  }

  #send(command: string, args: object, timeoutMs: number): Promise<unknown> {
    if (this.#closed) {
      return Promise.reject(
        new SnowflockError('E_CLOSED', `'${command}': the QMP connection is closed`),
      );
    }
    if (this.#pending.size >= MAX_PENDING) {
      return Promise.reject(
        new SnowflockError('E_QEMU', `'${command}': ${MAX_PENDING} commands are waiting already`),
      );
    }
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(
          new SnowflockError('E_TIMEOUT', `QEMU did not answer '${command}' in ${timeoutMs} ms`),
        );
      }, timeoutMs);
      this.#pending.set(id, { command, resolve, reject, timer });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    });
  }

  #receive(chunk: Buffer): void {
    let rest = chunk;
    for (;;) {
      const newline = rest.indexOf(0x0a);
      if (newline < 0) break;
      this.#chunks.push(rest.subarray(0, newline));
      const line = Buffer.concat(this.#chunks).toString('utf8').trim();
      this.#chunks = [];
      this.#chunkBytes = 0;
      rest = rest.subarray(newline + 1);
      if (line !== '' && !this.#line(line)) return;
    }
    if (rest.length === 0) return;
    this.#chunks.push(rest);
    this.#chunkBytes += rest.length;
    if (this.#chunkBytes > MAX_LINE_BYTES) {
      this.#protocolError(`a QMP line is longer than ${MAX_LINE_BYTES} bytes`);
    }
  }

  #line(line: string): boolean {
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch {
      message = undefined;
    }
    if (!isRecord(message)) return this.#protocolError('not a QMP message');
    if ('QMP' in message) {
      this.#onGreeting?.();
      this.#onGreeting = undefined;
    } else if (typeof message.event === 'string') {
      this.#event(message.event, message);
    } else {
      this.#reply(message);
    }
    return true;
  }

  #event(event: string, message: Record<string, unknown>): void {
    const stamp = isRecord(message.timestamp) ? message.timestamp : {};
    const seconds = stamp.seconds;
    const micros = stamp.microseconds;
    const atMs =
      typeof seconds === 'number' && typeof micros === 'number' && seconds >= 0
        ? seconds * 1000 + micros / 1000
        : Date.now();
    this.emit('event', { event, data: isRecord(message.data) ? message.data : {}, atMs });
  }

  #reply(message: Record<string, unknown>): void {
    const id = message.id;
    const pending = typeof id === 'number' ? this.#pending.get(id) : undefined;
    // A reply that comes after its time limit has nobody waiting for it.
    if (typeof id !== 'number' || !pending) return;
    this.#pending.delete(id);
    clearTimeout(pending.timer);
    const error = message.error;
    if (isRecord(error)) {
      const qmpClass = String(error.class ?? 'GenericError');
      pending.reject(new QmpError(pending.command, qmpClass, String(error.desc ?? '')));
    } else {
      pending.resolve(message.return);
    }
  }

  #protocolError(what: string): false {
    this.#socket.destroy();
    this.#end(new SnowflockError('E_QEMU', what));
    return false;
  }

  #end(error: Error | undefined): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const pending of this.#pending.values()) {
      clearTimeout(pending.timer);
      pending.reject(
        new SnowflockError('E_CLOSED', `QMP connection closed during '${pending.command}'`, {
          cause: error,
        }),
      );
    }
    this.#pending.clear();
    this.#chunks = [];
    this.emit('close', error);
  }
}

import { EventEmitter } from 'node:events';
import { chmodSync, unlinkSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { asSnowflockError, type ErrorCode, isErrorCode, SnowflockError } from './errors.js';
import { readLines } from './lines.js';

/**
 * Calls between two processes of one host: one JSON object a line over a Unix socket, `{id, method,
 * params}` answered by `{id, result}` or `{id, error: {code, message}}`, in any order; events are
 * lines with a member `event`. The method table is a type parameter.
 *
 * Bounds: a line, what a caller has not read yet, calls under way on a connection, connections. Who
 * goes beyond the first two loses the connection; the third is answered with E_STATE; a connection
 * too many is closed at once.
 */
export type MethodTable<M> = { [K in keyof M]: { params: unknown; result: unknown } };

/** One connected caller, the same object for all its calls. `closed` fires once, however the connection ended. */
export interface Caller {
  readonly closed: EventEmitter<{ closed: [] }>;
}

export type RpcHandlers<M extends MethodTable<M>> = {
  [K in keyof M]: (
    params: M[K]['params'],
    caller: Caller,
  ) => Promise<M[K]['result']> | M[K]['result'];
};

export interface RpcServerOptions {
  /** Who answers, for messages: `data plane`. */
  name: string;
  lineLimitBytes: number;
  /** What a caller may leave unread (default: twice the longest line). */
  unreadLimitBytes?: number;
  maxConnections?: number;
  maxCalls?: number;
  /** Throws E_ARGUMENT if the parameters do not fit; left out where both ends are trusted. */
  check?: (method: string, params: unknown) => void;
}

interface Reply {
  id: number;
  result?: unknown;
  error?: { code: string; message: string };
}

export class RpcServer<M extends MethodTable<M>, Event extends { event: string } = never> {
  readonly #server: Server;
  readonly #options: Required<RpcServerOptions>;
  readonly #handlers: RpcHandlers<M>;
  readonly #sockets = new Set<Socket>();

  private constructor(handlers: RpcHandlers<M>, options: RpcServerOptions) {
    this.#options = {
      unreadLimitBytes: 2 * options.lineLimitBytes,
      maxConnections: 256,
      maxCalls: 1024,
      check: () => {},
      ...options,
    };
    this.#handlers = handlers;
    this.#server = createServer((socket) => this.#accept(socket));
  }

  /** Listens on a Unix socket (mode 0600); a socket left by a dead process is replaced. */
  static async listen<M extends MethodTable<M>, Event extends { event: string } = never>(
    path: string,
    handlers: RpcHandlers<M>,
    options: RpcServerOptions,
  ): Promise<RpcServer<M, Event>> {
    const server = new RpcServer<M, Event>(handlers, options);
    try {
      unlinkSync(path);
    } catch {
      // There was none, the normal case. A path that cannot be removed fails in listen() below.
    }
    const mask = process.umask(0o077);
    try {
      await new Promise<void>((resolve, reject) => {
        server.#server.once('error', reject);
        server.#server.listen(path, resolve);
      });
    } finally {
      process.umask(mask);
    }
    chmodSync(path, 0o600);
    return server;
  }

  broadcast(event: Event): void {
    for (const socket of this.#sockets) this.#write(socket, event);
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  #accept(socket: Socket): void {
    if (this.#sockets.size >= this.#options.maxConnections) {
      socket.destroy();
      return;
    }
    this.#sockets.add(socket);
    const closed = new EventEmitter<{ closed: [] }>();
    closed.setMaxListeners(0);
    const caller: Caller = { closed };
    let calls = 0;
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      this.#sockets.delete(socket);
      closed.emit('closed');
    });
    readLines(socket, this.#options.lineLimitBytes, (line) => {
      calls++;
      void this.#call(line, caller, calls).then((reply) => {
        calls--;
        this.#write(socket, reply);
      });
    });
  }

  #write(socket: Socket, message: Reply | Event): void {
    if (socket.destroyed) return;
    socket.write(`${JSON.stringify(message)}\n`);
    // A caller that does not read what it asked for.
    if (socket.writableLength > this.#options.unreadLimitBytes) socket.destroy();
  }

  async #call(line: string, caller: Caller, calls: number): Promise<Reply> {
    let id = 0;
    const { name, maxCalls, check } = this.#options;
    try {
      const call = parseCall(line, name);
      id = call.id;
      if (!Object.hasOwn(this.#handlers, call.method)) {
        throw new SnowflockError('E_ARGUMENT', `${name}: no method ${call.method.slice(0, 80)}`);
      }
      if (calls > maxCalls) {
        throw new SnowflockError('E_STATE', `${name}: over ${maxCalls} calls on one connection`);
      }
      check(call.method, call.params);
      const handler = this.#handlers[call.method as keyof M] as (
        params: unknown,
        caller: Caller,
      ) => Promise<unknown> | unknown;
      return { id, result: (await handler(call.params, caller)) ?? {} };
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      return { id, error: { code, message } };
    }
  }
}

function parseCall(line: string, name: string): { id: number; method: string; params: unknown } {
  let call: { id?: unknown; method?: unknown; params?: unknown } | null;
  try {
    call = JSON.parse(line);
  } catch {
    call = null;
  }
  if (typeof call !== 'object' || !Number.isSafeInteger(call?.id)) {
    throw new SnowflockError('E_ARGUMENT', `${name}: a line that is no call`);
  }
  return { id: call?.id as number, method: String(call?.method), params: call?.params };
}

interface Pending {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
  timer: NodeJS.Timeout | undefined;
}

export interface RpcClientOptions {
  /** Who answers, for messages: `the data plane`. */
  name: string;
  lineLimitBytes: number;
  /** Of the errors when there is no connection, or none any more. */
  lost: ErrorCode;
}

/** The caller's end. Emits 'event' for what the other end says unasked and 'closed' once. */
export class RpcClient<
  M extends MethodTable<M>,
  Event extends { event: string } = never,
> extends EventEmitter<{ event: [Event]; closed: [] }> {
  readonly #socket: Socket;
  readonly #options: RpcClientOptions;
  readonly #pending = new Map<number, Pending>();
  #next = 1;

  private constructor(socket: Socket, options: RpcClientOptions) {
    super();
    this.#socket = socket;
    this.#options = options;
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      for (const call of this.#pending.values()) {
        clearTimeout(call.timer);
        call.reject(new SnowflockError(options.lost, `${options.name} ended during the call`));
      }
      this.#pending.clear();
      (this as EventEmitter<{ closed: [] }>).emit('closed');
    });
    readLines(socket, options.lineLimitBytes, (line) => this.#line(line));
  }

  /** Errors: `lost` if nothing listens there. */
  static async connect<M extends MethodTable<M>, Event extends { event: string } = never>(
    path: string,
    options: RpcClientOptions,
  ): Promise<RpcClient<M, Event>> {
    const socket = connect(path);
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', () => resolve());
      socket.once('error', (error) =>
        reject(new SnowflockError(options.lost, `cannot reach ${options.name}: ${error.message}`)),
      );
    });
    return new RpcClient<M, Event>(socket, options);
  }

  get open(): boolean {
    return !this.#socket.destroyed;
  }

  /**
   * `timeoutMs` null: as long as the connection lasts. Errors: `lost`, E_TIMEOUT, what the method
   * answers.
   */
  call<K extends keyof M & string>(
    method: K,
    params: M[K]['params'],
    timeoutMs: number | null = 20_000,
  ): Promise<M[K]['result']> {
    const { name, lost } = this.#options;
    if (this.#socket.destroyed) {
      return Promise.reject(new SnowflockError(lost, `${name} is not connected`));
    }
    const id = this.#next++;
    return new Promise<M[K]['result']>((resolve, reject) => {
      const timer =
        timeoutMs === null
          ? undefined
          : setTimeout(() => {
              this.#pending.delete(id);
              reject(
                new SnowflockError('E_TIMEOUT', `${name}: ${method} took over ${timeoutMs} ms`),
              );
            }, timeoutMs);
      this.#pending.set(id, {
        resolve: (value) => resolve(value as M[K]['result']),
        reject,
        timer,
      });
      this.#socket.write(`${JSON.stringify({ id, method, params })}\n`);
    });
  }

  close(): void {
    this.#socket.destroy();
  }

  #line(line: string): void {
    let message: Partial<Reply> & Partial<Event>;
    try {
      message = JSON.parse(line);
    } catch {
      this.#socket.destroy(); // not our protocol: all calls under way fail as lost
      return;
    }
    if (message.event !== undefined) {
      (this as EventEmitter<{ event: [unknown] }>).emit('event', message);
      return;
    }
    const call = this.#pending.get(message.id ?? -1);
    if (call === undefined) return; // answered after its time-out
    this.#pending.delete(message.id ?? -1);
    clearTimeout(call.timer);
    if (message.error === undefined) {
      call.resolve(message.result);
    } else {
      const { code, message: text } = message.error;
      call.reject(new SnowflockError(isErrorCode(code) ? code : 'E_INTERNAL', text));
    }
  }
}

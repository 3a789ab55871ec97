import { EventEmitter } from 'node:events';
import { unlinkSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { asSnowflockError, isErrorCode, SnowflockError } from '../common/errors.js';
import { readLines } from '../common/lines.js';
import {
  type DataplaneEvent,
  LINE_LIMIT_BYTES,
  type Method,
  type Params,
  type Result,
} from './protocol.js';

/** One connected sfld. `closed` fires once, however the connection ended. */
export interface Caller {
  readonly closed: EventEmitter<{ closed: [] }>;
}

export type Handlers = {
  [M in Method]: (params: Params<M>, caller: Caller) => Promise<Result<M>> | Result<M>;
};

interface Reply {
  id: number;
  result?: unknown;
  error?: { code: string; message: string };
}

export class RpcServer {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();

  private constructor(handlers: Handlers) {
    this.#server = createServer((socket) => this.#accept(socket, handlers));
  }

  /** Listens on a Unix socket (mode 0600); a socket left by a dead process is replaced. */
  static async listen(path: string, handlers: Handlers): Promise<RpcServer> {
    const server = new RpcServer(handlers);
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
    return server;
  }

  broadcast(event: DataplaneEvent): void {
    for (const socket of this.#sockets) socket.write(`${JSON.stringify(event)}\n`);
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  #accept(socket: Socket, handlers: Handlers): void {
    this.#sockets.add(socket);
    const closed = new EventEmitter<{ closed: [] }>();
    closed.setMaxListeners(0);
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      this.#sockets.delete(socket);
      closed.emit('closed');
    });
    readLines(socket, LINE_LIMIT_BYTES, (line) => {
      void this.#call(line, handlers, { closed }).then((reply) => {
        if (reply !== undefined && !socket.destroyed) socket.write(`${JSON.stringify(reply)}\n`);
      });
    });
  }

  async #call(line: string, handlers: Handlers, caller: Caller): Promise<Reply | undefined> {
    let id = 0;
    try {
      const call = JSON.parse(line) as { id: number; method: string; params: unknown };
      id = call.id;
      if (!Object.hasOwn(handlers, call.method)) {
        throw new SnowflockError('E_ARGUMENT', `data plane: no method ${String(call.method)}`);
      }
      // Both ends are this project's own and the socket is private to root: the types of
      // DataplaneMethods hold by construction, native code checks ranges again.
      const handler = handlers[call.method as Method] as (
        params: unknown,
        caller: Caller,
      ) => Promise<unknown> | unknown;
      return { id, result: await handler(call.params, caller) };
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      return { id, error: { code, message } };
    }
  }
}

interface Pending {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
  timer: NodeJS.Timeout;
}

/** sfld's end. Emits 'event' for what the data plane says unasked and 'closed' once. */
export class RpcClient extends EventEmitter<{ event: [DataplaneEvent]; closed: [] }> {
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  #next = 1;

  private constructor(socket: Socket) {
    super();
    this.#socket = socket;
    socket.on('error', () => socket.destroy());
    socket.on('close', () => {
      for (const call of this.#pending.values()) {
        clearTimeout(call.timer);
        call.reject(new SnowflockError('E_DATAPLANE', 'the data plane ended during the call'));
      }
      this.#pending.clear();
      this.emit('closed');
    });
    readLines(socket, LINE_LIMIT_BYTES, (line) => this.#line(line));
  }

  /** Errors: E_DATAPLANE if nothing listens there. */
  static async connect(path: string): Promise<RpcClient> {
    const socket = connect(path);
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', () => resolve());
      socket.once('error', (error) =>
        reject(new SnowflockError('E_DATAPLANE', `cannot reach the data plane: ${error.message}`)),
      );
    });
    return new RpcClient(socket);
  }

  get open(): boolean {
    return !this.#socket.destroyed;
  }

  call<M extends Method>(method: M, params: Params<M>, timeoutMs = 20_000): Promise<Result<M>> {
    if (this.#socket.destroyed) {
      return Promise.reject(new SnowflockError('E_DATAPLANE', 'the data plane is not connected'));
    }
    const id = this.#next++;
    return new Promise<Result<M>>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(new SnowflockError('E_TIMEOUT', `data plane: ${method} took over ${timeoutMs} ms`));
      }, timeoutMs);
      this.#pending.set(id, { resolve: (value) => resolve(value as Result<M>), reject, timer });
      this.#socket.write(`${JSON.stringify({ id, method, params })}\n`);
    });
  }

  close(): void {
    this.#socket.destroy();
  }

  #line(line: string): void {
    const message = JSON.parse(line) as Partial<Reply> & Partial<DataplaneEvent>;
    if (message.event !== undefined) {
      this.emit('event', message as DataplaneEvent);
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

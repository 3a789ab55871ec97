/**
 * The host's end of the guest channel (docs/guest-protocol.md): one connection to the Unix socket
 * on which QEMU serves the guest's virtio-serial port.
 *
 * States: new -> connected -> identified (the guest answered `ready` for the epoch of our hello)
 * -> closed. Everything the guest sends before that `ready` is discarded: in a clone it is the rest
 * of what its parent was saying. One object is one connection; after a restart of the daemon a new
 * object says hello with the same epoch and the guest sends its pending calls again.
 *
 * The guest is hostile: lines, calls, sessions and unsent bytes are bounded; what breaks the
 * protocol is dropped and counted, what exceeds a bound closes the channel.
 */
import { EventEmitter } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import {
  CANCEL,
  decodeLine,
  encodeLine,
  type GuestLine,
  LineDecoder,
} from './guest-channel-codec.js';
import { type ExecRequest, ExecSession, OUTPUT_WINDOW_BYTES } from './guest-channel-exec.js';

export type { ExecExit, ExecRequest, ExecSession } from './guest-channel-exec.js';

/** Who the guest is to be. */
export interface GuestIdentity {
  /** Differs for each VM and each fork; letters, digits, `-._:`, at most 64. */
  epoch: string;
  vmid: number;
  family: number;
  /** Dotted IPv4; without it the guest's network is left alone. */
  ip?: string;
  prefix?: number;
  gateway?: string;
  mtu?: number;
  hostname: string;
  /** 32 fresh random bytes, hex. */
  seed: string;
  /** The RAM generation it continues from, if any. */
  generation?: string;
}

export interface GuestCall {
  /** Unique in the life of the VM: a call seen again has the same id. */
  id: string;
  verb: string;
  args: Record<string, string>;
}

export interface GuestReady {
  /** ok: address set; none: no address was given; absent: the guest has no network interface. */
  net: 'ok' | 'none' | 'absent';
  /** Milliseconds from sending hello to the answer. */
  readyMs: number;
}

/** The answer to the call by which a VM forked, given to a clone together with its identity. */
export interface PendingReply {
  id: string;
  args: Record<string, string>;
}

export type CallHandler = (call: GuestCall) => Promise<Record<string, string>>;

const CALLS_AT_ONCE = 64;
const ANSWERS_KEPT = 64;
const UNSENT_LIMIT_BYTES = 4 << 20;
const CONNECT_RETRY_MS = 5;

interface Hello {
  identity: GuestIdentity;
  pendingReply: PendingReply | undefined;
  sentAtMs: number;
  resolve: (ready: GuestReady) => void;
  reject: (error: SnowflockError) => void;
}

/** Emits `closed` with the SnowflockError that ended the channel, once. */
export class GuestChannel extends EventEmitter<{ closed: [SnowflockError] }> {
  readonly #socketPath: string;
  readonly #log: Logger | undefined;
  readonly #decoder = new LineDecoder();
  readonly #sessions = new Map<string, ExecSession>();
  readonly #calls = new Map<string, GuestCall>();
  readonly #answers = new Map<string, string>();
  readonly #pings = new Map<string, () => void>();
  #socket: Socket | undefined;
  #handler: CallHandler = async () => {
    throw new SnowflockError('E_STATE', 'the host takes no calls now');
  };
  #hello: Hello | undefined;
  #identified = false;
  #closed: SnowflockError | undefined;
  #lastId = 0;
  /** Lines dropped because they made no sense. */
  dropped = 0;

  constructor(options: { socketPath: string; log?: Logger }) {
    super();
    this.#socketPath = options.socketPath;
    this.#log = options.log;
  }

  /** True once the guest has answered hello. */
  get identified(): boolean {
    return this.#identified;
  }

  /** Calls of the guest that wait for their answer, oldest first. */
  get pendingCalls(): GuestCall[] {
    return [...this.#calls.values()];
  }

  /** Connects, trying again while QEMU does not listen yet. E_TIMEOUT, E_STATE, E_CLOSED. */
  async connect(options: { timeoutMs?: number; signal?: AbortSignal } = {}): Promise<void> {
    if (this.#socket) throw new SnowflockError('E_STATE', 'the guest channel is connected already');
    const timeoutMs = options.timeoutMs ?? 10_000;
    const deadline = Date.now() + timeoutMs;
    for (;;) {
      if (this.#closed) throw this.#closed;
      if (options.signal?.aborted) {
        throw new SnowflockError('E_INTERRUPTED', 'connecting to the guest channel was given up');
      }
      try {
        this.#attach(await connectOnce(this.#socketPath));
        return;
      } catch (cause) {
        if (this.#closed) throw this.#closed;
        if (Date.now() >= deadline) {
          const message = `nothing listens on ${this.#socketPath} after ${timeoutMs} ms`;
          throw new SnowflockError('E_TIMEOUT', message, { cause });
        }
      }
      await sleep(CONNECT_RETRY_MS);
    }
  }

  #attach(socket: Socket): void {
    if (this.#closed) {
      socket.destroy();
      throw this.#closed;
    }
    this.#socket = socket;
    socket.on('data', (data: Buffer) => {
      for (const text of this.#decoder.feed(data)) {
        if (this.#closed) return;
        const line = decodeLine(text);
        if (!line || !this.#receive(line)) this.dropped++;
      }
    });
    socket.on('error', (cause) => this.#end(new SnowflockError('E_CLOSED', cause.message)));
    socket.on('close', () =>
      this.#end(new SnowflockError('E_CLOSED', `guest channel ${this.#socketPath} was closed`)),
    );
  }

  /**
   * Tells the guest who it is and resolves when it has taken that on. `pendingReply` goes out with
   * it: the answer to the call by which this VM, as its parent, asked for the fork. E_TIMEOUT if
   * the guest is silent, E_GUEST if it cannot, E_CLOSED.
   */
  async hello(
    identity: GuestIdentity,
    pendingReply?: PendingReply,
    options: { timeoutMs?: number } = {},
  ): Promise<GuestReady> {
    if (this.#closed) throw this.#closed;
    if (!this.#socket) throw new SnowflockError('E_STATE', 'the guest channel is not connected');
    if (this.#hello) throw new SnowflockError('E_STATE', 'hello has been sent on this channel');
    const timeoutMs = options.timeoutMs ?? 60_000;
    return await new Promise<GuestReady>((resolve, reject) => {
      const timer = setTimeout(() => {
        reject(new SnowflockError('E_TIMEOUT', `the guest did not answer in ${timeoutMs} ms`));
      }, timeoutMs);
      const done = () => clearTimeout(timer);
      this.#hello = {
        identity,
        pendingReply,
        sentAtMs: performance.now(),
        resolve: (ready) => {
          done();
          resolve(ready);
        },
        reject: (error) => {
          done();
          reject(error);
        },
      };
      try {
        this.#sendHello(this.#hello);
      } catch (error) {
        this.#hello.reject(asSnowflockError(error));
        this.#hello = undefined;
      }
    });
  }

  #sendHello({ identity, pendingReply }: Hello): void {
    const { epoch, vmid, family, hostname, seed } = identity;
    if (!/^[\w.:-]{1,64}$/.test(epoch) || !/^[0-9a-f]{64}$/.test(seed)) {
      throw new SnowflockError('E_ARGUMENT', 'epoch or seed of a guest identity is malformed');
    }
    const args: Record<string, string> = { epoch, vmid: String(vmid), family: String(family) };
    if (identity.ip !== undefined) {
      args.ip = identity.ip;
      args.prefix = String(identity.prefix ?? 16);
      if (identity.gateway !== undefined) args.gateway = identity.gateway;
      args.mtu = String(identity.mtu ?? 1500);
    }
    args.hostname = hostname;
    args.seed = seed;
    args.time_ns = String(BigInt(Date.now()) * 1_000_000n);
    if (identity.generation !== undefined) args.generation = identity.generation;
    if (pendingReply) args.call = pendingReply.id;
    let text = CANCEL + encodeLine(['hello'], args);
    if (pendingReply) text += encodeLine(['reply', pendingReply.id, 'ok'], pendingReply.args);
    this.#write(text);
  }

  /** Who answers the guest's calls. An error it throws is the answer, with its code. */
  setCallHandler(handler: CallHandler): void {
    this.#handler = handler;
  }

  /** Answers a call; for callers that answer outside the handler. */
  reply(id: string, answer: Record<string, string> | SnowflockError): void {
    const text =
      answer instanceof SnowflockError
        ? encodeLine(['reply', id, 'error'], { code: answer.code, message: answer.message })
        : encodeLine(['reply', id, 'ok'], answer);
    this.#calls.delete(id);
    // Kept for a guest that asks again because it did not get it.
    this.#answers.set(id, text);
    for (const old of this.#answers.keys()) {
      if (this.#answers.size <= ANSWERS_KEPT) break;
      this.#answers.delete(old);
    }
    this.#write(text);
  }

  /** Runs a program in the guest. E_STATE before hello was answered, E_ARGUMENT if it is too long. */
  exec(request: ExecRequest): ExecSession {
    if (this.#closed) throw this.#closed;
    if (!this.#identified) throw new SnowflockError('E_STATE', 'the guest has no identity yet');
    if (request.argv.length === 0) throw new SnowflockError('E_ARGUMENT', 'no program to run');
    const env = Object.entries(request.env ?? {}).map(([key, value]) => `${key}=${value}`);
    const args: Record<string, string> = { argv: packStrings(request.argv) };
    if (request.env) args.env = packStrings(env);
    args.window = String(OUTPUT_WINDOW_BYTES);
    if (request.tty) {
      args.tty = '1';
      args.rows = String(request.tty.rows);
      args.cols = String(request.tty.cols);
    }
    const id = `x${++this.#lastId}`;
    const line = encodeLine(['exec', id], args);
    const session = new ExecSession(id, {
      send: (words, values) => this.#write(encodeLine(words, values)),
    });
    this.#sessions.set(id, session);
    this.#write(line);
    return session;
  }

  /** Resolves with the round trip in milliseconds. E_TIMEOUT, E_CLOSED. */
  async ping(timeoutMs: number): Promise<number> {
    if (this.#closed) throw this.#closed;
    const id = `p${++this.#lastId}`;
    const start = performance.now();
    return await new Promise((resolve, reject) => {
      const settle = (act: () => void) => {
        clearTimeout(timer);
        this.off('closed', onClosed);
        this.#pings.delete(id);
        act();
      };
      const onClosed = (error: SnowflockError) => settle(() => reject(error));
      const timer = setTimeout(() => {
        const error = new SnowflockError('E_TIMEOUT', `no pong from the guest in ${timeoutMs} ms`);
        settle(() => reject(error));
      }, timeoutMs);
      this.on('closed', onClosed);
      this.#pings.set(id, () => settle(() => resolve(performance.now() - start)));
      this.#write(encodeLine(['ping', id]));
    });
  }

  /** Closes the connection; what waits on it rejects with E_CLOSED. The guest keeps its calls. */
  close(): void {
    this.#end(new SnowflockError('E_CLOSED', 'the guest channel was closed'));
  }

  #write(text: string): void {
    const socket = this.#socket;
    if (!socket || this.#closed) return;
    socket.write(text);
    if (socket.writableLength > UNSENT_LIMIT_BYTES) {
      this.#end(new SnowflockError('E_GUEST', 'the guest does not read its channel'));
    }
  }

  #end(error: SnowflockError): void {
    if (this.#closed) return;
    this.#closed = error;
    this.#socket?.destroy();
    this.#hello?.reject(error);
    for (const session of this.#sessions.values()) session.abandon(error);
    this.#sessions.clear();
    this.#calls.clear();
    this.emit('closed', error);
  }

  /** False if the line makes no sense here. */
  #receive(line: GuestLine): boolean {
    switch (line.verb) {
      case 'hi':
        this.#agentStarted();
        return true;
      case 'ready':
      case 'failed':
        return this.#answered(line);
    }
    if (!this.#identified) return true; // of the parent's conversation
    switch (line.verb) {
      case 'call':
        return this.#called(line);
      case 'pong':
        this.#pings.get(line.id)?.();
        return true;
      case 'started':
      case 'stdout':
      case 'stderr':
      case 'credit':
      case 'exited':
        return this.#forSession(line);
      default:
        return false;
    }
  }

  /** The agent (re)started: what it was told before, and the programs it ran for us, are lost. */
  #agentStarted(): void {
    const error = new SnowflockError('E_GUEST', 'the agent in the guest was restarted');
    for (const session of this.#sessions.values()) session.abandon(error);
    this.#sessions.clear();
    this.#identified = false;
    if (this.#hello) this.#sendHello(this.#hello);
  }

  #answered(line: GuestLine): boolean {
    const hello = this.#hello;
    if (!hello || line.args.epoch !== hello.identity.epoch) return false;
    if (line.verb === 'failed') {
      const step = line.args.step ?? 'unknown step';
      hello.reject(new SnowflockError('E_GUEST', `the guest could not take its identity: ${step}`));
      return true;
    }
    const net = line.args.net;
    if (net !== 'ok' && net !== 'none' && net !== 'absent') return false;
    this.#identified = true;
    hello.resolve({ net, readyMs: performance.now() - hello.sentAtMs });
    return true;
  }

  #called(line: GuestLine): boolean {
    const { id, what: verb, args } = line;
    if (!/^\d{1,20}$/.test(id) || verb === '') return false;
    if (this.#calls.has(id)) return true; // sent again; it is being worked on
    const answer = this.#answers.get(id);
    if (answer !== undefined) {
      this.#write(answer);
      return true;
    }
    const call: GuestCall = { id, verb, args };
    if (this.#calls.size >= CALLS_AT_ONCE) {
      this.reply(id, new SnowflockError('E_CAPACITY', 'too many calls at once from this VM'));
      return true;
    }
    this.#calls.set(id, call);
    this.#handler(call)
      .then(
        (result) => result,
        (error: unknown) => asSnowflockError(error),
      )
      .then((result) => {
        if (!this.#calls.has(id)) return; // answered by hand, or the channel has ended
        if (result instanceof SnowflockError) {
          this.#log?.warn({ call: verb, code: result.code }, result.message);
        }
        this.reply(id, result);
      })
      .catch((error: unknown) => {
        // An answer that cannot be encoded (too long): the guest still gets one.
        this.#log?.error({ call: verb, error }, 'cannot answer a call of the guest');
        this.reply(id, new SnowflockError('E_INTERNAL', 'the answer cannot be sent'));
      });
    return true;
  }

  #forSession(line: GuestLine): boolean {
    const session = this.#sessions.get(line.id);
    if (!session) return true; // it has just ended
    if (!session.receive(line)) {
      this.#end(new SnowflockError('E_GUEST', `the guest broke the exec protocol: ${line.verb}`));
      return false;
    }
    if (line.verb === 'exited') this.#sessions.delete(line.id);
    return true;
  }
}

function packStrings(strings: readonly string[]): string {
  if (strings.some((text) => text.includes('\0'))) {
    throw new SnowflockError('E_ARGUMENT', 'an argument or variable holds a NUL');
  }
  return Buffer.from(strings.map((text) => `${text}\0`).join('')).toString('base64');
}

async function connectOnce(path: string): Promise<Socket> {
  return await new Promise((resolve, reject) => {
    const socket = createConnection(path);
    socket.once('error', reject);
    socket.once('connect', () => {
      socket.off('error', reject);
      resolve(socket);
    });
  });
}

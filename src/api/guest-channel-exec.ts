import { Readable, Writable } from 'node:stream';
import { SnowflockError } from '../common/errors.js';
import { DATA_BYTES, type GuestLine } from './guest-channel-codec.js';

export interface ExecRequest {
  argv: readonly string[];
  /** The whole environment; without it the guest's plain one (HOME, PATH, TERM). */
  env?: Record<string, string>;
  /** Runs it on a terminal: stderr goes to stdout. */
  tty?: { rows: number; cols: number };
}

/** How a program in the guest ended: one of the two is set. */
export interface ExecExit {
  status?: number;
  signal?: number;
}

/** What a session needs of its channel. */
export interface ExecTransport {
  send(words: readonly string[], args?: Record<string, string>): void;
}

/** Bytes of each output the guest may have sent that the reader has not taken. */
export const OUTPUT_WINDOW_BYTES = 256 * 1024;

/** One output of the program. What the reader takes is given back to the guest as credit. */
class Output extends Readable {
  #unread = 0;
  #taken = 0;

  constructor(
    readonly name: 'stdout' | 'stderr',
    readonly credit: (bytes: number) => void,
  ) {
    super({ highWaterMark: DATA_BYTES });
  }

  /** False if the guest sent more than it was given. */
  receive(data: Buffer): boolean {
    this.#unread += data.length;
    if (this.#unread > OUTPUT_WINDOW_BYTES) return false;
    this.push(data);
    this.#account();
    return true;
  }

  override _read(): void {
    this.#account();
  }

  override read(size?: number): unknown {
    const data: unknown = super.read(size);
    this.#account();
    return data;
  }

  // What is no longer in the buffer has been taken. Looked at on every occasion: the stream calls
  // _read before it hands data out, and not again until more is pushed, which needs the credit.
  #account(): void {
    const taken = this.#unread - this.readableLength;
    this.#unread -= taken;
    this.#taken += taken;
    if (this.#taken >= OUTPUT_WINDOW_BYTES / 4) {
      const bytes = this.#taken;
      this.#taken = 0;
      this.credit(bytes);
    }
  }
}

/**
 * A program running in the guest. `stdout` and `stderr` must be read (or resumed): what is not read
 * makes the program wait, never memory grow. `exited` rejects with E_GUEST or E_CAPACITY if it
 * could not be started or the guest's agent was restarted, E_CLOSED if the channel ended first.
 */
export class ExecSession {
  readonly stdin: Writable;
  readonly stdout: Readable;
  readonly stderr: Readable;
  readonly exited: Promise<ExecExit>;
  readonly #outputs: { stdout: Output; stderr: Output };
  readonly #transport: ExecTransport;
  #inputWindow = 0;
  #waiting: { data: Buffer; done: (error?: Error | null) => void } | undefined;
  #ended = false;
  #resolve: (exit: ExecExit) => void = () => {};
  #reject: (error: Error) => void = () => {};

  constructor(
    readonly id: string,
    transport: ExecTransport,
  ) {
    this.#transport = transport;
    this.exited = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.exited.catch(() => {}); // whoever waits gets it; nobody has to
    const output = (name: 'stdout' | 'stderr') =>
      new Output(name, (bytes) => {
        if (!this.#ended) transport.send(['credit', id], { stream: name, bytes: String(bytes) });
      });
    this.#outputs = { stdout: output('stdout'), stderr: output('stderr') };
    this.stdout = this.#outputs.stdout;
    this.stderr = this.#outputs.stderr;
    this.stdin = new Writable({
      write: (data: Buffer, _encoding, done) => {
        this.#waiting = { data, done };
        this.#pump();
      },
      final: (done) => {
        if (!this.#ended) transport.send(['eof', id]);
        done();
      },
    });
    this.stdin.on('error', () => {}); // a program that ends early: `exited` tells
  }

  /** Sends a signal to the program and what it started. */
  signal(number: number): void {
    if (!this.#ended) this.#transport.send(['signal', this.id], { sig: String(number) });
  }

  /** The size of its terminal has changed. */
  resize(rows: number, cols: number): void {
    if (this.#ended) return;
    this.#transport.send(['resize', this.id], { rows: String(rows), cols: String(cols) });
  }

  #pump(): void {
    const waiting = this.#waiting;
    if (!waiting) return;
    if (this.#ended) {
      this.#waiting = undefined;
      waiting.done(new SnowflockError('E_CLOSED', 'the program in the guest has ended'));
      return;
    }
    while (waiting.data.length > 0 && this.#inputWindow > 0) {
      const bytes = Math.min(waiting.data.length, this.#inputWindow, DATA_BYTES / 2);
      const data = waiting.data.subarray(0, bytes).toString('base64');
      this.#transport.send(['stdin', this.id], { data });
      this.#inputWindow -= bytes;
      waiting.data = waiting.data.subarray(bytes);
    }
    if (waiting.data.length > 0) return;
    this.#waiting = undefined;
    waiting.done();
  }

  /** A line of the guest for this session; false if it breaks the protocol. */
  receive(line: GuestLine): boolean {
    const bytes = (text: string | undefined) =>
      text !== undefined && /^\d{1,9}$/.test(text) ? Number(text) : undefined;
    switch (line.verb) {
      case 'started':
      case 'credit': {
        const given = bytes(line.verb === 'started' ? line.args.window : line.args.bytes);
        if (given === undefined) return false;
        this.#inputWindow += given;
        this.#pump();
        return true;
      }
      case 'stdout':
      case 'stderr': {
        const data = line.args.data;
        if (data === undefined) return false;
        return this.#outputs[line.verb].receive(Buffer.from(data, 'base64'));
      }
      case 'exited':
        return this.#finish(line.args, bytes);
      default:
        return false;
    }
  }

  #finish(
    args: Record<string, string>,
    bytes: (text: string | undefined) => number | undefined,
  ): boolean {
    const status = bytes(args.status);
    const signal = bytes(args.signal);
    if (status !== undefined) this.#end(() => this.#resolve({ status }));
    else if (signal !== undefined) this.#end(() => this.#resolve({ signal }));
    else if (args.error !== undefined) {
      const code = args.error === 'E_CAPACITY' ? 'E_CAPACITY' : 'E_GUEST';
      const message = `cannot run the program in the guest: ${args.message ?? args.error}`;
      this.#end(() => this.#reject(new SnowflockError(code, message)));
    } else return false;
    return true;
  }

  #end(settle: () => void): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#pump();
    this.#outputs.stdout.push(null);
    this.#outputs.stderr.push(null);
    settle();
  }

  /** The channel has ended. */
  abandon(error: SnowflockError): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#pump();
    this.stdin.destroy();
    // An error on a stream nobody listens to would end the process; `exited` carries it anyway.
    for (const output of [this.stdout, this.stderr]) {
      if (output.listenerCount('error') === 0) output.on('error', () => {});
      output.destroy(error);
    }
    this.#reject(error);
  }
}

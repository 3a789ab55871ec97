/** tcpdump on an interface of a namespace: for frames that must not be there, or that must. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import type { Namespace } from './lab.js';

const FILE_HEADER_BYTES = 24;
const RECORD_HEADER_BYTES = 16;
const LIMIT_MS = 20_000;

export class Capture {
  readonly frames: Buffer[] = [];
  #pending = Buffer.alloc(0);
  #headerSeen = false;
  #said = '';
  #changed: () => void = () => {};

  private constructor(
    readonly name: string,
    readonly process: ChildProcess,
  ) {
    process.stdout?.on('data', (data: Buffer) => this.#take(data));
    process.stderr?.on('data', (data: Buffer) => {
      this.#said += data;
      this.#changed();
    });
    process.on('exit', () => this.#changed());
  }

  /** Resolves when frames are being captured: those that match `expression`. */
  static async start(
    name: string,
    netns: Namespace,
    expression: string,
    direction: 'in' | 'inout' = 'in',
  ): Promise<Capture> {
    const options = `-i eth0 -Q ${direction} -n -U --immediate-mode -B 16384 -w -`.split(' ');
    const capture = new Capture(
      name,
      spawn('ip', ['netns', 'exec', netns.name, 'tcpdump', ...options, expression], {
        stdio: ['ignore', 'pipe', 'pipe'],
      }),
    );
    await capture.#until(() => capture.#said.includes('listening on'), 'it did not start');
    return capture;
  }

  async seen(text: string): Promise<void> {
    await this.#until(() => this.frames.some((it) => it.includes(text)), `no frame with ${text}`);
  }

  /** `holds` is looked at whenever a frame has come. */
  async until(what: string, holds: (frames: readonly Buffer[]) => boolean): Promise<void> {
    await this.#until(() => holds(this.frames), what);
  }

  /** Ends tcpdump; how many frames the kernel had no room for. */
  async stop(): Promise<number> {
    const closed = once(this.process, 'close');
    this.process.kill('SIGINT');
    await closed;
    const dropped = /(\d+) packets? dropped by kernel/.exec(this.#said)?.[1];
    if (dropped === undefined) throw new Error(`tcpdump on ${this.name}: ${this.#said}`);
    return Number(dropped);
  }

  async #until(holds: () => boolean, failure: string): Promise<void> {
    const limit = setTimeout(() => this.process.kill('SIGKILL'), LIMIT_MS);
    try {
      while (!holds()) {
        if (this.process.exitCode !== null || this.process.signalCode !== null) {
          throw new Error(`tcpdump on ${this.name}: ${failure}; ${this.#said}`);
        }
        await new Promise<void>((resolve) => {
          this.#changed = resolve;
        });
      }
    } finally {
      clearTimeout(limit);
    }
  }

  #take(data: Buffer): void {
    this.#pending = Buffer.concat([this.#pending, data]);
    if (!this.#headerSeen && this.#pending.length >= FILE_HEADER_BYTES) {
      this.#pending = this.#pending.subarray(FILE_HEADER_BYTES);
      this.#headerSeen = true;
    }
    while (this.#headerSeen && this.#pending.length >= RECORD_HEADER_BYTES) {
      const end = RECORD_HEADER_BYTES + this.#pending.readUInt32LE(8);
      if (this.#pending.length < end) break;
      this.frames.push(this.#pending.subarray(RECORD_HEADER_BYTES, end));
      this.#pending = this.#pending.subarray(end);
    }
    this.#changed();
  }
}

/**
 * udpcast and uftp in the mcdist bench. Their clock starts at the sender's line that says that it
 * sends now, and stops at each receiver's line that says that the file is complete. Both send in
 * the clear.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { createInterface } from 'node:readline';
import { SnowflockError } from '../../src/common/errors.js';
import type { BenchNet, Place } from './mcdist-net.js';
import { now_ms, type Payload, type System, type Transfer } from './mcdist-systems.js';

const TICKS = 100; // a second; USER_HZ, the same on every Linux Node.js runs on
const END_MS = 2000; // for good-byes, once all receivers are complete
const READY_MS = 10_000;
const LINES = 20; // kept for messages

/** A peer's process. `line()` waits for what it says; fails when it ends before. */
class Peer {
  readonly #child: ChildProcess;
  readonly #said: string[] = [];
  readonly #waits: { line: RegExp; at: (ms: number) => void; fail: (error: Error) => void }[] = [];
  readonly closed: Promise<unknown>;

  constructor(
    readonly name: string,
    argv: readonly string[],
  ) {
    const [command = '', ...rest] = argv;
    const child = spawn(command, rest, { stdio: ['ignore', 'pipe', 'pipe'] });
    this.#child = child;
    for (const stream of [child.stdout, child.stderr]) {
      createInterface({ input: stream }).on('line', (line) => this.#hear(line));
    }
    this.closed = once(child, 'close').catch(() => undefined);
    child.once('error', (error) => this.#fail(String(error)));
    child.once('close', (status) => this.#fail(`ended with ${status}`));
  }

  /** Resolves with the time of the first line from now on that matches; a bounded wait. */
  line(line: RegExp, limit_ms: number): Promise<number> {
    const heard = new Promise<number>((resolve, reject) => {
      const timer = setTimeout(
        () => reject(this.#error(`did not say ${line} within ${limit_ms / 1000} s`)),
        limit_ms,
      );
      this.#waits.push({
        line,
        at: (ms) => {
          clearTimeout(timer);
          resolve(ms);
        },
        fail: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      });
    });
    heard.catch(() => undefined); // whoever waits hears of it
    return heard;
  }

  async end(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.closed;
  }

  #hear(line: string): void {
    const at = now_ms();
    this.#said.push(line);
    if (this.#said.length > LINES) this.#said.shift();
    for (const wait of this.#waits) if (wait.line.test(line)) wait.at(at);
  }

  #fail(what: string): void {
    for (const wait of this.#waits.splice(0)) wait.fail(this.#error(what));
  }

  #error(what: string): SnowflockError {
    return new SnowflockError('E_IO', `${this.name} ${what}: ${this.#said.slice(-3).join(' | ')}`);
  }
}

/** CPU time of all children that have ended, seconds. */
function childrenCpuSeconds(): number {
  const stat = readFileSync('/proc/self/stat', 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[13]) + Number(fields[14])) / TICKS;
}

interface Words {
  readonly listening: RegExp;
  readonly sending: RegExp;
  readonly complete: RegExp;
  /** Its receivers end by themselves, perhaps with the last write after that line. */
  readonly receivers_end: boolean;
}

/** Receivers first, then the sender; ends all of them. */
async function transfer(
  net: BenchNet,
  signal: AbortSignal,
  limit_ms: number,
  words: Words,
  receiver: (place: Place) => { argv: string[]; file: string },
  sender: string[],
): Promise<Transfer> {
  const before = childrenCpuSeconds();
  const peers: Peer[] = [];
  const end = (): void => {
    for (const peer of peers) void peer.end();
  };
  signal.addEventListener('abort', end, { once: true });
  const files: string[] = [];
  let begin_ms: number;
  let end_ms: number;
  try {
    const completes: Promise<number>[] = [];
    for (const place of net.receivers) {
      const { argv, file } = receiver(place);
      const peer = new Peer(basename(argv[0] ?? ''), net.command(place, argv));
      peers.push(peer);
      completes.push(peer.line(words.complete, READY_MS + limit_ms));
      await peer.line(words.listening, READY_MS);
      files.push(file);
    }
    const from = new Peer(basename(sender[0] ?? ''), net.command(net.source, sender));
    peers.push(from);
    begin_ms = await from.line(words.sending, READY_MS);
    const gone = from.closed.then(async () => {
      await new Promise((resolve) => setTimeout(resolve, END_MS).unref());
      throw new SnowflockError('E_IO', `${from.name} ended before all receivers were complete`);
    });
    end_ms = Math.max(...(await Promise.race([Promise.all(completes), gone])));
    gone.catch(() => undefined); // all are complete
    const ending = words.receivers_end ? peers : [from];
    const ended = Promise.all(ending.map((peer) => peer.closed));
    await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, END_MS).unref())]);
  } finally {
    signal.removeEventListener('abort', end);
    for (const peer of peers) await peer.end();
  }
  return { begin_ms, end_ms, cpu_s: childrenCpuSeconds() - before, files };
}

export const udpcast: System = {
  name: 'udpcast',
  settings(net) {
    const { limit_mbit_per_s: limit, loss_percent: loss } = net.plan;
    // Its own limiter's worth: below the link's, so that it and not the link's queue is what is full.
    const rates = limit > 0 ? ['', `--max-bitrate ${Math.round(limit * 0.97)}m`] : [''];
    const plain = ['--full-duplex', '--half-duplex'].flatMap((mode) =>
      rates.map((rate) => `${mode} ${rate}`.trim()),
    );
    return loss > 0 ? [...plain, '--full-duplex --fec 8x8/128'] : plain;
  },
  send(net, payload, setting, signal) {
    const common = ['--nokbd', '--no-progress', '--interface', 'eth0'];
    const count = String(net.receivers.length);
    return transfer(
      net,
      signal,
      payload.limit_ms,
      {
        listening: /UDP receiver for/,
        sending: /Starting transfer/,
        complete: /Transfer complete/,
        receivers_end: true,
      },
      (place) => {
        const file = join(payload.folder, place.namespace);
        return { argv: ['udp-receiver', '--file', file, ...common], file };
      },
      [
        ...['udp-sender', '--file', payload.file, '--min-receivers', count],
        ...['--rexmit-hello-interval', '200', ...setting.split(' '), ...common],
      ],
    );
  },
};

const UFTP_BUFFER_BYTES = 8 << 20;

export const uftp: System = {
  name: 'uftp',
  settings(net) {
    const limit = net.plan.limit_mbit_per_s;
    // It keeps to the rate it is told, or, by -1, to what the interface takes.
    const rates = limit > 0 ? [0.5, 0.85, 0.95].map((part) => limit * part) : [500, 1000, 2000, -1];
    // Its idea of the group's round trip, first, least, most, and how often it repeats a question:
    // with the defaults it takes seconds to find its receivers, with less it gives up under loss.
    const waits =
      net.plan.loss_percent > 0
        ? ['-r 0.1:0.01:0.2 -s 20', '-r 0.5:0.1:15 -s 50']
        : ['-r 0.05 -s 10'];
    return rates.flatMap((rate) =>
      waits.map((wait) => `-R ${rate < 0 ? -1 : Math.round(rate * 1000)} ${wait}`),
    );
  },
  send(net, payload, setting, signal) {
    const buffer = ['-B', String(UFTP_BUFFER_BYTES)];
    const ids = net.receivers.map(({ address }) => uftpId(address)).join(',');
    return transfer(
      net,
      signal,
      payload.limit_ms,
      {
        listening: /Loaded .* key/,
        sending: /Starting pass 1/,
        complete: /File transfer complete/,
        receivers_end: false,
      },
      (place) => {
        const folder = join(payload.folder, `${place.namespace}.d`);
        const argv = ['uftpd', '-d', '-q', '-D', folder, '-I', 'eth0', ...buffer];
        return { argv, file: join(folder, basename(payload.file)) };
      },
      [
        ...['uftp', '-I', 'eth0', '-b', '1450', '-H', ids],
        ...[...buffer, ...setting.split(' '), payload.file],
      ],
    );
  },
};

/** The id a receiver has unless told another: its address. */
const uftpId = (address: string): string =>
  `0x${address
    .split('.')
    .map((part) => Number(part).toString(16).padStart(2, '0'))
    .join('')}`;

/** Folders its receivers need before they start. */
export async function makeFolders(net: BenchNet, payload: Payload): Promise<void> {
  for (const place of net.receivers) {
    await mkdir(join(payload.folder, `${place.namespace}.d`), { recursive: true });
  }
}

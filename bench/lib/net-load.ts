/** What makes traffic in the network bench: tap-pump for guests that are taps, iperf3 for the others. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { SnowflockError } from '../../src/common/errors.js';
import { run } from '../../src/common/run.js';
import { ipv4, udp } from '../../test/netback-filter/frames.js';
import type { GuestName, NetLab, NetSystem, Port } from './net-lab.js';

const PUMP_SOURCE = fileURLToPath(new URL('../../../bench/lib/tap-pump.c', import.meta.url));
const ETHERNET_BYTES = 14;
const MEASURING_CPU = Math.max(cpus().length - 1, 0);
const TICKS_PER_S = 100; // of /proc/PID/stat: USER_HZ

export interface PumpResult {
  readonly packets: number;
  readonly packets_per_s: number;
  /** Of the pump's thread, and of the system's processes, which have ticks of 10 ms. */
  readonly packet_cpu_ns: number;
  readonly lost: number;
}

export async function buildPump(folder: string): Promise<string> {
  const program = join(folder, 'tap-pump');
  await run('gcc', ['-O2', '-o', program, PUMP_SOURCE]);
  return program;
}

/** One running tap-pump, which holds the taps of a lab. */
export class Pump {
  readonly #child: ChildProcess;
  readonly #reader: Interface;
  readonly #lines: AsyncIterator<string>;

  private constructor(
    readonly lab: NetLab,
    readonly system: NetSystem,
    program: string,
  ) {
    const taps = lab.ports.flatMap((port) => [lab.hosts[port.host].path, port.device]);
    const words = ['--cpu-list', String(MEASURING_CPU), program, ...taps];
    this.#child = spawn('taskset', words, { stdio: ['pipe', 'pipe', 'inherit'] });
    if (this.#child.stdout === null) throw new SnowflockError('E_INTERNAL', 'no pipe');
    this.#reader = createInterface({ input: this.#child.stdout });
    this.#lines = this.#reader[Symbol.asyncIterator]();
  }

  static async start(lab: NetLab, system: NetSystem, program: string): Promise<Pump> {
    const pump = new Pump(lab, system, program);
    if ((await pump.#line()) !== 'ready') throw new SnowflockError('E_INTERNAL', 'no tap-pump');
    return pump;
  }

  /** Frames of so many bytes, in turns of `window` under way. They must arrive as the system says. */
  async move(from: GuestName, to: GuestName, bytes: number, window: number, ms: number) {
    const [source, target] = [this.lab.port(from), this.lab.port(to)];
    const frame = frameOf(this.system, source, target, bytes);
    const at = (port: Port) => this.lab.ports.indexOf(port);
    const order = [
      at(source),
      at(target),
      window,
      ms,
      bytes,
      frame.subarray(0, 64).toString('hex'),
    ];
    const before = processes_ns(this.system);
    this.#child.stdin?.write(`${order.join(' ')}\n`);
    const got = JSON.parse(await this.#line()) as Record<string, number> & { first: string };
    const others_ns = processes_ns(this.system) - before;
    const { sent = 0, received = 0, wall_ns = 0, cpu_ns = 0 } = got;
    const seen = got.first.slice(0, 24);
    const wanted = this.system.arrival(source, target).join('').replaceAll(':', '');
    if (received > 0 && seen !== wanted) {
      throw new SnowflockError(
        'E_INTERNAL',
        `${this.system.title}: a frame came as ${seen}, not ${wanted}`,
      );
    }
    return {
      packets: received,
      packets_per_s: (received / wall_ns) * 1e9,
      packet_cpu_ns: (cpu_ns + others_ns) / received,
      lost: sent - received,
    } satisfies PumpResult;
  }

  async close(): Promise<void> {
    this.#child.kill('SIGKILL');
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      await new Promise((resolve) => this.#child.once('exit', resolve));
    }
    this.#reader.close();
  }

  async #line(): Promise<string> {
    const line = await this.#lines.next();
    if (line.done === true) throw new SnowflockError('E_INTERNAL', 'tap-pump ended');
    return line.value;
  }
}

function frameOf(system: NetSystem, from: Port, to: Port, bytes: number): Buffer {
  return ipv4({
    to: system.destination(to),
    from: system.guestMac(from),
    sourceIp: from.ip,
    destinationIp: to.ip,
    protocol: 17,
    payload: udp(5001, 5001, Buffer.alloc(bytes - ETHERNET_BYTES - 28)),
  });
}

function processes_ns(system: NetSystem): number {
  let ticks = 0;
  for (const pid of system.pids ?? []) {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    ticks += Number(fields[11]) + Number(fields[12]);
  }
  return (ticks / TICKS_PER_S) * 1e9;
}

export interface IperfResult {
  /** As received. */
  readonly bits_per_s: number;
  /** UDP only. */
  readonly packets_per_s?: number;
}

const IPERF_LIMIT_MS = 15_000;

/** One transfer by iperf3 between two guests with stacks. */
export async function iperf(
  lab: NetLab,
  from: GuestName,
  to: GuestName,
  kind: 'tcp' | 'udp',
  seconds: number,
  signal: AbortSignal,
): Promise<IperfResult> {
  const [source, target] = [lab.port(from), lab.port(to)];
  if (source.netns === undefined || target.netns === undefined) throw new Error('no stack');
  const limit = AbortSignal.timeout(IPERF_LIMIT_MS);
  const over = new AbortController();
  const within = AbortSignal.any([signal, limit, over.signal]);
  let server: Promise<unknown> | undefined;
  await new Promise<void>((resolve, reject) => {
    server = run(
      'ip',
      [
        ...['netns', 'exec', target.netns?.name ?? '', 'iperf3', '--server', '--one-off'],
        ...['--bind', target.ip, '--forceflush'],
      ],
      {
        signal: within,
        onText: (_from, text) => {
          if (text.includes('listening')) resolve();
        },
      },
    );
    server.catch(reject);
  });
  const udpWords = ['--udp', '--bitrate', '0', '--length', '18', '--pacing-timer', '0'];
  let stdout: string;
  try {
    const client = await run(
      'ip',
      [
        ...['netns', 'exec', source.netns.name, 'iperf3', '--client', target.ip, '--json'],
        ...['--time', String(seconds), ...(kind === 'udp' ? udpWords : [])],
      ],
      { signal: within },
    );
    await server;
    ({ stdout } = client);
  } catch (error) {
    if (!limit.aborted) throw error;
    throw new SnowflockError('E_TIMEOUT', `iperf3 took more than ${IPERF_LIMIT_MS} ms`);
  } finally {
    over.abort();
    await server?.catch(() => {});
  }
  const { end } = JSON.parse(stdout) as {
    end: {
      sum_received: { bits_per_second: number; packets?: number; seconds: number };
      sum: { packets: number; lost_packets: number; seconds: number };
    };
  };
  if (kind === 'tcp') return { bits_per_s: end.sum_received.bits_per_second };
  const received = end.sum.packets - end.sum.lost_packets;
  return {
    bits_per_s: end.sum_received.bits_per_second,
    packets_per_s: received / end.sum.seconds,
  };
}

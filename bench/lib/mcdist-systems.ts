/**
 * The systems that the mcdist bench compares. Each is brought to where its receivers are known to
 * its sender, then sends one file, or generation, to all of them:
 *
 * - *mcdist*: a server with the generation, a replica on each host whose client is asked for all pages;
 * - *prefetcher*: the same, filled by the replica's prefetcher without a limit, as for disks;
 * - *TCP copies*: sendfile() on a connection for each receiver, 256 KiB reads there;
 * - *udpcast*, *uftp*: as Debian has them, see mcdist-peers.ts.
 *
 * Time begins when data may flow and ends when the last receiver has all; what comes before (starting
 * processes, finding each other) is nobody's cost.
 */
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { randomGroup } from '../../src/mcdist/groups.js';
import type { Host } from '../../test/mcdist/net.js';
import type { BenchNet } from './mcdist-net.js';

/** What is sent, and where it goes. */
export interface Payload {
  readonly folder: string;
  /** The bytes, as a plain file. */
  readonly file: string;
  readonly bytes: number;
  readonly generation: string;
  /** The replica that holds the same bytes. */
  readonly replica: string;
  /** A transfer that takes longer has failed. */
  readonly limit_ms: number;
}

export interface Transfer {
  /** Monotonic clock. */
  readonly begin_ms: number;
  readonly end_ms: number;
  /** Of all processes of the system, in user space and in the kernel. */
  readonly cpu_s: number;
  /** The receivers' files. */
  readonly files: readonly string[];
  /** Counters of ours. */
  readonly counters?: unknown;
}

export interface System {
  readonly name: string;
  /** Settings to choose among; the first are the defaults. */
  settings(net: BenchNet): readonly string[];
  send(net: BenchNet, payload: Payload, setting: string, signal: AbortSignal): Promise<Transfer>;
}

export const CHILD = fileURLToPath(new URL('./mcdist-child.js', import.meta.url));

export const now_ms = (): number => Number(process.hrtime.bigint()) / 1e6;

/** Runs `work` with processes of ours on all hosts; they are ended whatever happens. */
async function withHosts(
  net: BenchNet,
  signal: AbortSignal,
  work: (source: Host, receivers: Host[]) => Promise<Omit<Transfer, 'cpu_s'>>,
): Promise<Transfer> {
  const hosts: Host[] = [];
  const end = (): void => void net.end(hosts);
  try {
    for (const place of [net.source, ...net.receivers]) hosts.push(await net.start(place, CHILD));
    signal.addEventListener('abort', end, { once: true });
    const [source, ...receivers] = hosts;
    if (source === undefined) throw new RangeError('no hosts');
    const before = await cpu(hosts);
    const transfer = await work(source, receivers);
    return { ...transfer, cpu_s: (await cpu(hosts)) - before };
  } finally {
    signal.removeEventListener('abort', end);
    await net.end(hosts);
  }
}

async function cpu(hosts: readonly Host[]): Promise<number> {
  const each = await Promise.all(hosts.map((host) => host.call<number>('cpuSeconds')));
  return each.reduce((sum, seconds) => sum + seconds, 0);
}

const fileOf = (payload: Payload, host: Host): string => join(payload.folder, host.namespace);

const own = (name: string, direct: boolean): System => ({
  name,
  settings: () => [''],
  send: (net, payload, _setting, signal) =>
    withHosts(net, signal, async (source, receivers) => {
      const pages = payload.bytes / 4096;
      const { group, port: groupPort } = randomGroup();
      const keyHex = randomBytes(32).toString('hex');
      const of = { generation: payload.generation, keyHex, group, groupPort, pages, direct };
      const address = source.address;
      const port = await source.call<number>('serve', { ...of, path: payload.replica, address });
      const server = [address, port];
      await Promise.all(
        receivers.map((host) =>
          host.call('open', { ...of, path: fileOf(payload, host), address: host.address, server }),
        ),
      );
      const begin_ms = now_ms();
      const ends = receivers.map((host) => host.call<number>('prefetch'));
      const end_ms = Math.max(...(await Promise.all(ends)));
      const counters = await Promise.all([source, ...receivers].map((host) => host.call('stats')));
      return { begin_ms, end_ms, files: receivers.map((host) => fileOf(payload, host)), counters };
    }),
});

export const mcdist = own('mcdist', true);
export const prefetcher = own('prefetcher', false);

export const tcp: System = {
  name: 'TCP copies',
  settings: () => [''],
  send: (net, payload, _setting, signal) =>
    withHosts(net, signal, async (source, receivers) => {
      const { file: path, bytes } = payload;
      const port = await source.call<number>('tcpServe', { address: source.address, path });
      const server = [source.address, port];
      const begin_ms = now_ms();
      const ends = receivers.map((host) =>
        host.call<number>('tcpReceive', { server, path: fileOf(payload, host), bytes }),
      );
      const end_ms = Math.max(...(await Promise.all(ends)));
      return { begin_ms, end_ms, files: receivers.map((host) => fileOf(payload, host)) };
    }),
};

/**
 * The wait for one page: from a thread that wants it until that thread runs again, with the page from
 * another host; as a thread of the data plane (`want()` of a replica) and as a guest's thread that
 * faults (memtap, no VM around it). Beside them a bare UDP ping-pong of a page in three datagrams and
 * a TCP request and response. All take turns in short slices.
 *
 * One client asks as soon as it has its answer. Several ask in lockstep: all for the same page at the
 * same moment, a page each period; UDP and TCP get requests at the same moments.
 *
 * Before each round free memory is touched (lib/memory.ts): ours alone stores what comes.
 */
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { SnowflockError } from '../src/common/errors.js';
import { randomGroup } from '../src/mcdist/groups.js';
import type { Host } from '../test/mcdist/net.js';
import { type Bench, type BenchContext, numbers } from './lib/bench.js';
import { BenchNet } from './lib/mcdist-net.js';
import { now_ms } from './lib/mcdist-systems.js';
import { touchFreeMemory } from './lib/memory.js';
import { quantile } from './lib/stats.js';
import { figure, ratio, type Table } from './lib/table.js';

const CHILD = fileURLToPath(new URL('./lib/mcdist-page-child.js', import.meta.url));
/** What the tests' replicas are of (test/memtap/harness.ts). */
const GENERATION = '0'.repeat(32);
const KINDS = ['udp', 'tcp', 'want', 'fault'] as const;
type Kind = (typeof KINDS)[number];
const NAMES: Readonly<Record<Kind, string>> = {
  udp: 'UDP ping-pong',
  tcp: 'TCP request and response',
  want: 'mcdist, a waiting thread',
  fault: 'mcdist, a faulting thread',
};
const SLICE = 100;
/** Between two pages in lockstep, for each client: so that the slowest system still keeps up. */
const PERIOD_NS = 500_000;
const LEAD_MS = 50; // from the order to the first page
const UDP_GOAL = 1.5;
const TOUCHED_BYTES = 64 << 20; // more than a round stores, for 16 clients

type Waits = Record<Kind, number[]>;

interface Ports {
  readonly port: number;
  readonly udpPort: number;
  readonly tcpPort: number;
}

const bench: Bench = {
  name: 'mcdist-page',
  description: 'wait for one page from another host, beside bare UDP and TCP; 1–16 in lockstep',
  settings: {
    clients: '1,4,16 (quick: 1,4)',
    rounds: 'slices of 100 pages; 20 (quick: 3)',
  },
  async run(context) {
    const { quick, settings, signal } = context;
    const [rounds = 20] = numbers(settings, 'rounds', [quick ? 3 : 20], 1, 1000);
    const clients = numbers(settings, 'clients', quick ? [1, 4] : [1, 4, 16], 1, 64);
    const measured: { clients: number; waits: Waits; retries: number }[] = [];
    try {
      for (const count of clients) {
        measured.push({ clients: count, ...(await measure(context, count, rounds)) });
      }
    } catch (error) {
      if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench mcdist-page');
      throw error;
    }
    const goals = measured.flatMap(({ clients: count, waits }) => [
      goalRow('waiting', count, waits.want, waits),
      goalRow('faulting', count, waits.fault, waits),
    ]);
    return {
      tables: [
        ...measured.map(({ clients: count, waits }) => table(count, waits)),
        {
          title: `Goals: within ${UDP_GOAL} × UDP and below TCP, p50`,
          columns: ['clients', 'thread', 'of UDP', '', 'of TCP', ''],
          rows: goals,
        },
      ],
      figures: {
        waits: measured.map(({ clients: count, waits, retries }) => ({
          clients: count,
          retries,
          ...Object.fromEntries(KINDS.map((kind) => [`${kind}_us`, summary(waits[kind])])),
        })),
      },
      notes: [
        'a client that asks after the page came by for another one waits for nothing, and counts',
        'UDP: a request of 100 bytes, a page in three datagrams; TCP: the same as one stream, no delay',
        'faulting thread: userfaultfd, the agent and memtap as under a VM, in a process that is none',
        'UDP and TCP sleep in each wait; mcdist looks up to 50 us before it does, on both sides, where',
        'that pays: so much CPU time a page at most; SNOWFLOCK_MCDIST_SPIN=0 shows what it brings',
      ],
    };
  },
};
export default bench;

async function measure(
  { signal, log }: BenchContext,
  clients: number,
  rounds: number,
): Promise<{ waits: Waits; retries: number }> {
  const waits: Waits = { udp: [], tcp: [], want: [], fault: [] };
  const net = await BenchNet.make({ receivers: clients, limit_mbit_per_s: 0, loss_percent: 0 });
  const hosts: Host[] = [];
  const interrupt = (): void => void net.end(hosts);
  try {
    const source = await net.start(net.source, CHILD);
    hosts.push(source);
    for (const place of net.receivers) hosts.push(await net.start(place, CHILD));
    signal.addEventListener('abort', interrupt, { once: true });
    const receivers = hosts.slice(1);
    const { group, port: groupPort } = randomGroup();
    const pages = 2 * rounds * SLICE;
    const keyHex = randomBytes(32).toString('hex');
    const of = { generation: GENERATION, keyHex, group, groupPort, pages };
    const ports = await source.call<Ports>('serve', { ...of, address: source.address });
    const server = [source.address, ports.port];
    for (const host of receivers) await host.call('open', { ...of, address: host.address, server });
    for (let round = 0; round < rounds; round++) {
      for (const kind of KINDS) {
        signal.throwIfAborted();
        if (kind === KINDS[0]) await touchFreeMemory(TOUCHED_BYTES, signal);
        const from = (2 * round + (kind === 'fault' ? 1 : 0)) * SLICE;
        const turn = { from, count: SLICE, ...pace(clients) };
        const values = receivers.map((host) => ask(host, kind, turn, source.address, ports));
        for (const each of await Promise.all(values)) waits[kind].push(...each);
      }
      log(`${clients} clients, round ${round + 1} of ${rounds}`);
    }
    const stats = receivers.map((host) => host.call<{ retries: number }>('stats'));
    const retries = (await Promise.all(stats)).reduce((sum, each) => sum + each.retries, 0);
    return { waits, retries };
  } finally {
    signal.removeEventListener('abort', interrupt);
    await Promise.allSettled(hosts.map((host) => host.call('end')));
    await net.close();
  }
}

function pace(clients: number): { start_ns: number; period_ns: number } {
  if (clients === 1) return { start_ns: 0, period_ns: 0 };
  return { start_ns: Math.round((now_ms() + LEAD_MS) * 1e6), period_ns: PERIOD_NS * clients };
}

function ask(
  host: Host,
  kind: Kind,
  turn: object,
  address: string,
  ports: Ports,
): Promise<number[]> {
  if (kind === 'want') return host.call('fetch', turn);
  if (kind === 'fault') return host.call('fault', turn);
  const port = kind === 'udp' ? ports.udpPort : ports.tcpPort;
  return host.call('trips', { ...turn, kind, server: [address, port] });
}

function summary(values: readonly number[]) {
  const sorted = [...values].sort((a, b) => a - b);
  return { count: sorted.length, p50: quantile(sorted, 0.5), p99: quantile(sorted, 0.99) };
}

function table(clients: number, waits: Waits): Table {
  const udp = summary(waits.udp);
  return {
    title: clients === 1 ? 'One client, us' : `${clients} clients in lockstep, us`,
    columns: ['', 'p50', 'p99', 'p50 of UDP', 'n'],
    rows: KINDS.map((kind) => {
      const { p50, p99, count } = summary(waits[kind]);
      return [NAMES[kind], p50, p99, ratio(p50, udp.p50), count.toFixed(0)];
    }),
  };
}

function goalRow(
  thread: string,
  clients: number,
  ours: readonly number[],
  waits: Waits,
): (string | number)[] {
  const { p50 } = summary(ours);
  const of = (kind: Kind): number => p50 / summary(waits[kind]).p50;
  const met = (yes: boolean): string => (yes ? 'met' : 'missed');
  const [udp, tcp] = [of('udp'), of('tcp')];
  return [
    ...[clients.toFixed(0), thread, `${figure(udp)}×`, met(udp <= UDP_GOAL)],
    ...[`${figure(tcp)}×`, met(tcp < 1)],
  ];
}

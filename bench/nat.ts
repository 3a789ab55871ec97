/**
 * Throughput of the NAT gateway beside plain masquerade: iperf3 from guests to a server outside, as
 * streams of TCP and as small datagrams, with few and many guests and rules. The rule that allows
 * comes last. Rounds take turns, so that what the machine does besides hits all alike.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { setMaxListeners } from 'node:events';
import { SnowflockError } from '../src/common/errors.js';
import { run } from '../src/common/run.js';
import { type NatPolicy, parsePolicy } from '../src/nat/policy.js';
import { type Bench, numbers } from './lib/bench.js';
import { NatNet, SERVER } from './lib/nat-net.js';
import { summarize } from './lib/stats.js';
import { ratio, spread } from './lib/table.js';

const FIRST_PORT = 5201;
const SMALL_BYTES = 64;
type Protocol = 'tcp' | 'udp';

interface System {
  name: string;
  net: NatNet;
  rules: number;
  limits?: object;
}

interface Sum {
  bits_per_second: number;
  packets: number;
  lost_packets: number;
  seconds: number;
}

const limit = (name: string, value: number) => ({
  per_clone: { [name]: value },
  per_family: { [name]: value },
});

function policy(rules: number, protocol: Protocol, limits: object): NatPolicy {
  const allow = Array.from({ length: rules }, (_, i) => ({
    name: `r${i}`,
    protocol,
    to: [i === rules - 1 ? SERVER : `198.18.${i >> 8}.${i & 255}`],
    ports: i === rules - 1 ? ['1-65535'] : [80, 443, '8000-8010'],
  }));
  // iperf3 speaks of its datagrams over TCP.
  const control = { name: 'control', protocol: 'tcp', to: [SERVER] };
  const all = protocol === 'udp' ? [...allow, control] : allow;
  return parsePolicy({ version: 1, default: { allow: all, ...limits } }, 'bench');
}

/** Gbit/s of streams; thousands of datagrams a second of small ones, as they arrive. */
async function measure(
  system: System,
  guests: number,
  protocol: Protocol,
  seconds: number,
  signal: AbortSignal,
): Promise<number> {
  const { net } = system;
  const one = async (i: number): Promise<Sum> => {
    const args = ['netns', 'exec', net.client(i), 'iperf3', '-J', '-c', SERVER];
    args.push('-p', String(FIRST_PORT + i), '-t', String(seconds));
    if (protocol === 'udp') args.push('-u', '-b', '0', '-l', String(SMALL_BYTES));
    const { stdout } = await run('ip', args, { signal });
    const { end } = JSON.parse(stdout) as { end: { sum: Sum; sum_received: Sum } };
    return protocol === 'tcp' ? end.sum_received : end.sum;
  };
  const sums = await Promise.all(Array.from({ length: guests }, (_, i) => one(i)));
  return sums.reduce((total, sum) => {
    if (protocol === 'tcp') return total + sum.bits_per_second / 1e9;
    return total + (sum.packets - sum.lost_packets) / sum.seconds / 1e3;
  }, 0);
}

const bench: Bench = {
  name: 'nat',
  description: 'throughput of the NAT gateway beside plain masquerade, by guests and rules',
  settings: {
    guests: '1,16: how many send at once',
    rules: '1,100,1000: of the policy',
    seconds: '2: of each run',
    rounds: '3',
  },
  async run({ quick, settings, signal, log }) {
    const guests = numbers(settings, 'guests', quick ? [1, 4] : [1, 16], 1, 64);
    const rules = numbers(settings, 'rules', [1, 100, 1000], 1, 1000);
    const [seconds = 2] = numbers(settings, 'seconds', [quick ? 1 : 2], 1, 60);
    const [rounds = 3] = numbers(settings, 'rounds', [quick ? 1 : 3], 1, 100);
    const most = Math.max(...guests);
    setMaxListeners(most + 10, signal); // each client listens
    const nets: NatNet[] = [];
    const servers: ChildProcess[] = [];
    try {
      const plain = await NatNet.create('m', most, false);
      nets.push(plain);
      const gateway = await NatNet.create('g', most, true);
      nets.push(gateway);
      for (const net of nets) {
        for (let i = 0; i < most; i++) servers.push(await serve(net.server, FIRST_PORT + i));
      }
      const systems: System[] = [
        { name: 'masquerade', net: plain, rules: 0 },
        ...rules.map((count) => ({ name: 'gateway', net: gateway, rules: count })),
        {
          name: 'with a limit of bytes',
          net: gateway,
          rules: 1,
          limits: limit('bytes_per_s', 1e10),
        },
        { name: 'of packets', net: gateway, rules: 1, limits: limit('packets_per_s', 1e8) },
      ];
      const found = new Map<string, number[]>();
      for (let round = 0; round < rounds; round++) {
        for (const system of systems) {
          for (const protocol of ['tcp', 'udp'] as const) {
            await system.net.nat?.apply(policy(system.rules, protocol, system.limits ?? {}));
            for (const count of guests) {
              const value = await measure(system, count, protocol, seconds, signal);
              const key = `${system.name}/${system.rules}/${protocol}/${count}`;
              found.set(key, [...(found.get(key) ?? []), value]);
              log(`${key}: ${value.toFixed(2)}`);
            }
          }
        }
      }
      const summary = (name: string, count: number, protocol: Protocol, n: number) =>
        summarize(found.get(`${name}/${count}/${protocol}/${n}`) ?? []);
      const table = (protocol: Protocol, title: string) => ({
        title,
        columns: ['system', 'rules', ...guests.flatMap((n) => [`${n} guests`, 'of masquerade'])],
        rows: systems.map(({ name, rules: count }) => [
          name,
          count === 0 ? '–' : String(count),
          ...guests.flatMap((n) => {
            const its = summary(name, count, protocol, n);
            return [spread(its), ratio(its.median, summary('masquerade', 0, protocol, n).median)];
          }),
        ]),
      });
      return {
        tables: [
          table('tcp', 'TCP streams, Gbit/s, all guests together'),
          table('udp', `datagrams of ${SMALL_BYTES} bytes that arrive, thousands a second`),
        ],
        figures: {
          runs: [...found].map(([key, values]) => ({ key, values })),
        },
        notes: [
          'masquerade: one namespace, two veth pairs on the way; the gateway: the filter, four pairs, and two translations',
          'every packet is asked by the policy, the rule that allows is its last',
        ],
      };
    } finally {
      for (const server of servers) server.kill('SIGKILL');
      for (const net of nets) await net.close();
    }
  },
};

export default bench;

/** An iperf3 server, once it listens. */
async function serve(netns: string, port: number): Promise<ChildProcess> {
  const args = [`--net=/run/netns/${netns}`, 'iperf3', '-s', '--forceflush', '-p', String(port)];
  const child = spawn('nsenter', args, { stdio: ['ignore', 'pipe', 'ignore'] });
  await new Promise<void>((resolve, reject) => {
    child.stdout?.on('data', () => resolve());
    child.once('error', (error) => reject(new SnowflockError('E_REQUIREMENT', String(error))));
    child.once('exit', () => reject(new SnowflockError('E_IO', `no iperf3 server on ${port}`)));
  });
  child.stdout?.resume();
  return child;
}

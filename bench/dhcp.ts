/**
 * DHCP servers under load: ours beside dnsmasq and Kea, asked by perfdhcp (of Kea) over a veth pair
 * between two namespaces. All give the same addresses for the same time to the same clients; none
 * writes its leases to a disk, none probes an address before it gives it.
 *
 * perfdhcp speaks as a relay; an exchange is DISCOVER, OFFER, REQUEST, ACK. The most that
 * a server completes is found by steps: each system in turn, several rounds, each from a part of what
 * was reached before.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { SnowflockError } from '../src/common/errors.js';
import { run } from '../src/common/run.js';
import { addressOfVmid, GATEWAY, macText } from '../src/network/addresses.js';
import type { Bench, BenchContext } from './lib/bench.js';
import { numbers } from './lib/bench.js';
import { FIRST_CLIENT_MAC } from './lib/dhcp-server.js';
import { quantile, summarize } from './lib/stats.js';
import { ratio, spread } from './lib/table.js';

const CLIENTS = 1000;
const LEASE_S = 3600;
const RELAY = '10.86.255.250';
const SERVER_MAC = '02:00:00:00:44:01';
const CLIENT_MAC = '02:00:00:00:44:02';
/** Of exchanges: as lost counts what is not answered within a second. */
const LOST_AT_MOST = 0.01;
const CALM_RATE = 500;
const START_LIMIT_MS = 20_000;
const TICKS_PER_S = 100;
/** A step is taken again when other programs had more of the machine; so often. */
const OTHERS_AT_MOST = 0.1;
const TRIES = 4;
/** A server is warm when a run costs it hardly less than the one before. */
const WARM_RUNS = 5;
const WARM_RATIO = 0.8;

interface System {
  id: string;
  title: string;
  /** Runs in the server's namespace, in a folder of its own. */
  command(folder: string): string[];
  /** Said on its output when it serves. */
  ready: RegExp;
  /** It needs the address on the interface; ours answers without. */
  address: boolean;
}

const POOL = { first: addressOfVmid(0), last: addressOfVmid(CLIENTS - 1) };

function kea(threads: boolean): System {
  const config = {
    Dhcp4: {
      'interfaces-config': { interfaces: ['eth0'], 'dhcp-socket-type': 'udp' },
      'lease-database': { type: 'memfile', persist: false },
      'multi-threading': { 'enable-multi-threading': threads },
      'valid-lifetime': LEASE_S,
      'renew-timer': LEASE_S / 2,
      'rebind-timer': (LEASE_S * 7) / 8,
      // Nothing is looked up for a client but its lease.
      'reservations-global': false,
      'reservations-in-subnet': false,
      'expired-leases-processing': {
        'reclaim-timer-wait-time': 0,
        'flush-reclaimed-timer-wait-time': 0,
      },
      loggers: [{ name: 'kea-dhcp4', severity: 'WARN', output_options: [{ output: 'stdout' }] }],
      subnet4: [{ subnet: '10.86.0.0/16', pools: [{ pool: `${POOL.first} - ${POOL.last}` }] }],
    },
  };
  return {
    id: threads ? 'kea_threads' : 'kea',
    title: threads ? 'Kea, multi-threaded' : 'Kea, one thread',
    command: (folder) => {
      const quiet = structuredClone(config);
      quiet.Dhcp4.loggers.push({
        name: 'kea-dhcp4.dhcp4', // says that it has started, and nothing of packets
        severity: 'INFO',
        output_options: [{ output: 'stdout' }],
      });
      writeFileSync(join(folder, 'kea.json'), JSON.stringify(quiet));
      const own = ['KEA_PIDFILE_DIR', 'KEA_LOCKFILE_DIR'].map((name) => `${name}=${folder}`);
      return ['env', ...own, 'kea-dhcp4', '-c', join(folder, 'kea.json')];
    },
    ready: /DHCP4_STARTED/,
    address: true,
  };
}

const SYSTEMS: readonly System[] = [
  {
    id: 'snowflock',
    title: 'ours',
    command: () => [
      process.execPath,
      fileURLToPath(new URL('./lib/dhcp-server.js', import.meta.url)),
      String(CLIENTS),
    ],
    ready: /ready/,
    address: false,
  },
  {
    id: 'dnsmasq',
    title: 'dnsmasq',
    command: () => [
      ...['dnsmasq', '--keep-in-foreground', '--log-facility=-', '--conf-file=/dev/null'],
      ...['--port=0', '--interface=eth0', '--user=root', '--pid-file=', '--leasefile-ro'],
      ...['--no-ping', '--dhcp-authoritative', '--quiet-dhcp', `--dhcp-lease-max=${2 * CLIENTS}`],
      `--dhcp-range=${POOL.first},${POOL.last},255.255.0.0,${LEASE_S}`,
    ],
    ready: /DHCP, IP range/,
    address: true,
  },
  kea(false),
  kea(true),
];

function chosen(names: string | undefined): readonly System[] {
  if (names === undefined) return SYSTEMS;
  return names.split(',').map((name) => {
    const system = SYSTEMS.find(({ id }) => id === name);
    if (system !== undefined) return system;
    const known = SYSTEMS.map(({ id }) => id).join(', ');
    throw new SnowflockError('E_ARGUMENT', `no system ${name}; there are: ${known}`);
  });
}

/** One run of perfdhcp. */
interface Load {
  /** Exchanges a second that were completed. */
  rate: number;
  /** Exchanges a second that were begun: perfdhcp may not manage what it was told. */
  sent: number;
  /** Share of exchanges that were not completed. */
  lost: number;
  /** From DISCOVER to OFFER, from REQUEST to ACK. */
  offer_ms: number;
  ack_ms: number;
  /** The server's processor time for an exchange. */
  cpu_us: number;
  /** Share of the machine's processor time that neither the server nor perfdhcp had. */
  others: number;
}

class Wire {
  readonly #tag = `sfdhcp${process.pid}`;
  readonly server = `${this.#tag}s`;
  readonly client = `${this.#tag}c`;

  async make(): Promise<void> {
    for (const name of [this.server, this.client]) await run('ip', ['netns', 'add', name]);
    const pair = ['link', 'add', 'eth0', 'netns', this.server, 'address', SERVER_MAC, 'type'];
    const peer = ['veth', 'peer', 'name', 'eth0', 'netns', this.client, 'address', CLIENT_MAC];
    await run('ip', [...pair, ...peer]);
    for (const name of [this.server, this.client]) {
      await run('ip', ['-n', name, 'link', 'set', 'lo', 'up']);
      await run('ip', ['-n', name, 'link', 'set', 'eth0', 'up']);
    }
    await run('ip', ['-n', this.client, 'address', 'add', `${RELAY}/16`, 'dev', 'eth0']);
    const known = ['neigh', 'add', GATEWAY, 'lladdr', SERVER_MAC, 'dev', 'eth0'];
    await run('ip', ['-n', this.client, ...known]);
  }

  async setAddress(there: boolean): Promise<void> {
    const words = ['address', there ? 'add' : 'del', `${GATEWAY}/16`, 'dev', 'eth0'];
    await run('ip', ['-n', this.server, ...words]);
  }

  async remove(): Promise<void> {
    for (const name of [this.server, this.client]) {
      await run('ip', ['netns', 'del', name]).catch(() => undefined); // it was not made
    }
  }
}

class Server {
  #said = '';
  readonly #child: ChildProcess;
  readonly #folder = mkdtempSync(join(tmpdir(), 'sf-bench-dhcp-'));

  private constructor(
    readonly system: System,
    wire: Wire,
  ) {
    // exec all the way: the child is the server itself.
    const words = ['netns', 'exec', wire.server, ...system.command(this.#folder)];
    this.#child = spawn('ip', words, { stdio: ['pipe', 'pipe', 'pipe'] });
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream?.on('data', (data: Buffer) => {
        this.#said = (this.#said + data).slice(-4000);
        this.#child.emit('said');
      });
    }
  }

  static async start(system: System, wire: Wire): Promise<Server> {
    const server = new Server(system, wire);
    const limit = AbortSignal.timeout(START_LIMIT_MS);
    try {
      while (!system.ready.test(server.#said)) {
        if (server.#child.exitCode !== null) throw new Error('it ended');
        await Promise.race([
          once(server.#child, 'said', { signal: limit }),
          once(server.#child, 'exit', { signal: limit }),
        ]);
      }
      return server;
    } catch (error) {
      await server.stop();
      const what = `${system.title} did not start (${error}): ${server.#said}`;
      throw new SnowflockError('E_REQUIREMENT', what);
    }
  }

  /** User and system time so far, all threads. */
  cpuMs(): number {
    const stat = readFileSync(`/proc/${this.#child.pid}/stat`, 'latin1');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return ((Number(fields[11]) + Number(fields[12])) * 1000) / TICKS_PER_S;
  }

  async stop(): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      const exited = once(this.#child, 'exit');
      this.#child.kill('SIGKILL');
      await exited;
    }
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

/** What all programs of the machine had so far, and what was taken from it; ms of one processor. */
function machineCpuMs(): number {
  const [, user = 0, nice = 0, system = 0, , , , , steal = 0] = readFileSync('/proc/stat', 'latin1')
    .slice(0, 200)
    .split(/\s+/)
    .map(Number);
  return ((user + nice + system + steal) * 1000) / TICKS_PER_S;
}

/** This process's and that of its children that have ended, perfdhcp among them. */
function ownCpuMs(): number {
  const stat = readFileSync('/proc/self/stat', 'latin1');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  const ticks = fields.slice(11, 15).reduce((sum, field) => sum + Number(field), 0);
  return (ticks * 1000) / TICKS_PER_S;
}

/** A step without much of other programs; of as many as there were, that with the least. */
async function load(wire: Wire, server: Server, rate: number, seconds: number): Promise<Load> {
  let best: Load | undefined;
  for (let i = 0; i < TRIES && (best === undefined || best.others > OTHERS_AT_MOST); i++) {
    const one = await loadOnce(wire, server, rate, seconds);
    if (best === undefined || one.others < best.others) best = one;
  }
  if (best === undefined) throw new SnowflockError('E_INTERNAL', 'no step was taken');
  return best;
}

/** Until its code is compiled and its leases are there. */
async function warm(wire: Wire, server: Server): Promise<void> {
  let before = Number.POSITIVE_INFINITY;
  for (let run = 0; run < WARM_RUNS; run++) {
    const { cpu_us: now } = await loadOnce(wire, server, 2 * CALM_RATE, 1);
    if (now > WARM_RATIO * before) return;
    before = now;
  }
}

async function loadOnce(wire: Wire, server: Server, rate: number, seconds: number): Promise<Load> {
  const began = performance.now();
  const before = server.cpuMs();
  const all0 = machineCpuMs();
  const own0 = ownCpuMs();
  const words = [
    ...['netns', 'exec', wire.client, 'perfdhcp', '-4', '-l', 'eth0', '-g', 'single'],
    ...['-r', String(rate), '-p', String(seconds), '-R', String(CLIENTS), '-W', '300000'],
    ...['-b', `mac=${macText(FIRST_CLIENT_MAC)}`, GATEWAY],
  ];
  // Its status is 3 if anything was lost, which the figures say better.
  const child = spawn('ip', words, { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (data: Buffer) => {
      said += data;
    });
  }
  await once(child, 'close');
  const all = (name: string): number[] =>
    [...said.matchAll(new RegExp(`^${name}: ([0-9.]+)`, 'gm'))].map(([, value]) => Number(value));
  const [discovers = Number.NaN] = all('sent packets');
  const [, acks = Number.NaN] = all('received packets');
  const [offerMs = Number.NaN, ackMs = Number.NaN] = all('avg delay');
  if (![discovers, acks].every(Number.isFinite)) {
    throw new SnowflockError('E_REQUIREMENT', `perfdhcp said nothing of use: ${said.slice(-1000)}`);
  }
  const serverMs = server.cpuMs() - before;
  const othersMs = machineCpuMs() - all0 - (ownCpuMs() - own0) - serverMs;
  return {
    rate: acks / seconds,
    sent: discovers / seconds,
    lost: discovers === 0 ? 1 : 1 - acks / discovers,
    offer_ms: offerMs,
    ack_ms: ackMs,
    cpu_us: (serverMs * 1000) / Math.max(1, acks),
    others: Math.max(0, othersMs / ((performance.now() - began) * cpus().length)),
  };
}

interface Found {
  /** The step at which most exchanges were completed. */
  peak: Load;
  /** The highest at which hardly any was lost; absent if there was none. */
  calm?: Load;
}

/** Steps by `factor` from `from` on, until two in a row bring nothing more. */
async function highest(
  wire: Wire,
  server: Server,
  from: number,
  factor: number,
  seconds: number,
  context: BenchContext,
): Promise<Found> {
  let found: Found | undefined;
  let misses = 0;
  for (let rate = from; rate < 200_000 && misses < 2; rate *= factor) {
    if (context.signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench dhcp');
    const asked = Math.round(rate);
    const done = await load(wire, server, asked, seconds);
    context.log(
      `${server.system.id}: ${asked}/s asked, ${done.sent.toFixed(0)}/s sent, ` +
        `${done.rate.toFixed(0)}/s done, ${(100 * done.lost).toFixed(1)}% lost, ` +
        `${done.cpu_us.toFixed(0)} us of CPU each, others ${(100 * done.others).toFixed(0)}%`,
    );
    misses = found !== undefined && done.rate < 1.05 * found.peak.rate ? misses + 1 : 0;
    const peak = found === undefined || done.rate > found.peak.rate ? done : found.peak;
    const good = done.lost <= LOST_AT_MOST && done.rate > (found?.calm?.rate ?? 0);
    const calm = good ? done : found?.calm;
    found = { peak, ...(calm === undefined ? {} : { calm }) };
  }
  if (found === undefined) throw new SnowflockError('E_INTERNAL', 'no step was taken');
  return found;
}

const bench: Bench = {
  name: 'dhcp',
  description: 'DHCP exchanges a second and their time: ours, dnsmasq, Kea, asked by perfdhcp',
  settings: {
    rounds: 'how often each system has its turn (3)',
    seconds: 'of each step (2)',
    systems: 'which, with commas between (all)',
  },
  async run(context) {
    const { quick, settings, log } = context;
    const [rounds = 3] = numbers(settings, 'rounds', [quick ? 1 : 3], 1, 20);
    const [seconds = 2] = numbers(settings, 'seconds', [quick ? 1 : 2], 1, 30);
    const systems = chosen(settings.get('systems'));
    const wire = new Wire();
    const calm = new Map<string, Load[]>(SYSTEMS.map(({ id }) => [id, []]));
    const best = new Map<string, Load[]>(SYSTEMS.map(({ id }) => [id, []]));
    const lossless = new Map<string, Load[]>(SYSTEMS.map(({ id }) => [id, []]));
    try {
      await wire.make();
      for (let round = 0; round < rounds; round++) {
        for (const system of systems) {
          log(`round ${round + 1} of ${rounds}: ${system.title}`);
          if (system.address) await wire.setAddress(true);
          const server = await Server.start(system, wire);
          try {
            await warm(wire, server);
            calm.get(system.id)?.push(await load(wire, server, CALM_RATE, seconds));
            const reached = best.get(system.id)?.at(-1)?.rate;
            const from = reached === undefined ? 1000 : 0.7 * reached;
            const factor = reached === undefined ? 1.6 : 1.25;
            const found = await highest(wire, server, from, factor, seconds, context);
            best.get(system.id)?.push(found.peak);
            if (found.calm !== undefined) lossless.get(system.id)?.push(found.calm);
          } finally {
            await server.stop();
            if (system.address) await wire.setAddress(false);
          }
        }
      }
    } finally {
      await wire.remove();
    }
    const median = (of: Map<string, Load[]>, id: string, what: keyof Load) => {
      const values = (of.get(id) ?? []).map((one) => one[what]).sort((a, b) => a - b);
      return values.length === 0 ? 0 : quantile(values, 0.5);
    };
    const peer = median(best, 'dnsmasq', 'rate');
    const ours = median(best, 'snowflock', 'rate');
    return {
      tables: [
        {
          title: 'Exchanges a second: median (min–max) of the rounds',
          columns: [
            'server',
            'most completed',
            'to dnsmasq',
            `with ≤ ${100 * LOST_AT_MOST}% lost`,
            'CPU us each',
            `offer ms, ack ms at ${CALM_RATE}/s`,
          ],
          rows: systems.map(({ id, title }) => {
            const rates = (of: Map<string, Load[]>) => (of.get(id) ?? []).map((one) => one.rate);
            const shown = (values: number[]) =>
              values.length === 0 ? '–' : spread(summarize(values));
            return [
              title,
              shown(rates(best)),
              ratio(median(best, id, 'rate'), peer),
              shown(rates(lossless)),
              median(best, id, 'cpu_us'),
              `${median(calm, id, 'offer_ms').toFixed(3)}, ${median(calm, id, 'ack_ms').toFixed(3)}`,
            ];
          }),
        },
      ],
      figures: {
        clients: CLIENTS,
        lease_s: LEASE_S,
        most: Object.fromEntries(best),
        lossless: Object.fromEntries(lossless),
        calm: Object.fromEntries(calm),
      },
      notes: [
        ...(ours > 0 && peer > 0
          ? [
              `at least dnsmasq's rate: ${ours >= peer ? 'met' : 'missed'} (${(ours / peer).toFixed(2)})`,
            ]
          : []),
        'perfdhcp takes a CPU of its own (-g single); what it cannot ask for, no server is shown to do',
        `a step is taken again, ${TRIES} times in all, while other programs had more than ` +
          `${100 * OTHERS_AT_MOST}% of the machine: waiting for a processor is then most of an answer's time`,
        'leases are in memory everywhere: dnsmasq --leasefile-ro, Kea memfile without persistence',
        'ours gives each known client its own address, as in operation; the others choose from a pool',
      ],
    };
  },
};

export default bench;

/**
 * The netback filter beside a plain redirect, and beside other ways to rewrite and check frames: what
 * one CPU moves between taps, what iperf3 moves between guests with stacks, on one host and across
 * two, with few and with many VMs known; and nanoseconds of the programs alone. All systems take
 * turns, in another order each round.
 *
 * Packets per second are of CPU time: what one CPU moves from one guest's write to the other's read
 * when it does nothing else. The kernel delivers within the write, so one thread is all there is.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../src/common/errors.js';
import { type Bench, type BenchContext, numbers } from './lib/bench.js';
import { type GuestName, type Kind, NetLab, type NetSystem } from './lib/net-lab.js';
import { buildPump, type IperfResult, iperf, Pump, type PumpResult } from './lib/net-load.js';
import { openVswitch } from './lib/net-ovs.js';
import {
  ebtables,
  nftables,
  ourFilter,
  plainRedirect,
  type SystemName,
} from './lib/net-systems.js';
import { type PacketTime, packetTimes } from './lib/net-test-run.js';
import { summarize } from './lib/stats.js';
import { figure, ratio, type Table } from './lib/table.js';

const MAKERS: Readonly<Record<SystemName, (lab: NetLab) => Promise<NetSystem>>> = {
  redirect: plainRedirect,
  filter: ourFilter,
  nftables,
  ebtables,
  ovs: openVswitch,
};
const NAMES = Object.keys(MAKERS) as SystemName[];
const WAYS: readonly (readonly [string, GuestName, GuestName])[] = [
  ['same host', 'a', 'b'],
  ['across hosts', 'x', 'y'],
];
const SIZES_BYTES = [60, 1514];
const WINDOW = 64;
const GOAL = 0.95;
const FLAT = 0.95;

interface Row {
  readonly system: SystemName;
  readonly known: number;
  readonly way: string;
  readonly what: string;
  readonly values: number[];
  readonly wall: number[];
}

/** A system on its lab; all of it goes with `close`. */
interface Place {
  readonly name: SystemName;
  readonly lab: NetLab;
  readonly system: NetSystem;
  pump?: Pump;
}

const bench: Bench = {
  name: 'net',
  description:
    'the filter beside plain redirect, nftables, ebtables and Open vSwitch: packets/s, iperf3',
  settings: {
    known: 'VMs known; 1,100,10000 (quick: 1,1000)',
    rounds: 'turns of each system; 7 (quick: 2)',
    ms: 'of one turn; 200 (quick: 100)',
    iperf_s: 'of one transfer by iperf3, 0: none; 1',
    systems: `which; ${NAMES.join(',')}`,
  },
  async run(context) {
    const { quick, settings, signal } = context;
    const known = numbers(settings, 'known', quick ? [1, 1000] : [1, 100, 10_000], 1, 20_000);
    const [rounds = 7] = numbers(settings, 'rounds', [quick ? 2 : 7], 1, 100);
    const [ms = 200] = numbers(settings, 'ms', [quick ? 100 : 200], 10, 10_000);
    const [seconds = 1] = numbers(settings, 'iperf_s', [1], 0, 60);
    const systems = systemsOf(settings.get('systems'));
    const notes = new Set([
      'a CPU-second is of the thread that writes and reads; for Open vSwitch also of its switches, ' +
        'which have a CPU of their own while they move frames',
      'Open vSwitch: its switch in user space gets frames with their checksums made by the guests',
      'ebtables has no rules that rewrite as ours does (see bench/lib/net-systems.ts): it checks only',
    ]);
    const folder = mkdtempSync(join(tmpdir(), 'sf-net-'));
    const rows: Row[] = [];
    try {
      const program = await buildPump(folder);
      for (const count of known) {
        await taps(context, { systems, known: count, rounds, ms, program, rows, notes });
      }
      if (seconds > 0) {
        const count = known.at(-1) ?? 1;
        const plan = { systems, known: count, rounds: quick ? 1 : 3, seconds, rows, notes };
        await stacks(context, plan);
      }
    } catch (error) {
      if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench net');
      throw error;
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
    const times = await packetTimes({ quick, known });
    const goals = goalTable(rows, known);
    return {
      tables: [...tables(rows, systems), timeTable(times, known), ...goals],
      figures: {
        moved: rows.map(({ values, wall, ...row }) => ({
          ...row,
          median: summarize(values).median,
          values,
          wall_median: summarize(wall).median,
        })),
        packet_ns: times,
      },
      notes: [...notes],
    };
  },
};
export default bench;

function systemsOf(text: string | undefined): SystemName[] {
  if (text === undefined) return NAMES;
  const asked = text.split(',');
  const wrong = asked.find((name) => !NAMES.some((it) => it === name));
  if (wrong !== undefined) {
    throw new SnowflockError('E_ARGUMENT', `systems=${text}: there are ${NAMES.join(', ')}`);
  }
  return NAMES.filter((name) => asked.includes(name));
}

/** Those that run here; a note says of the others what went wrong. Ours and the plain one must. */
async function make(
  systems: readonly SystemName[],
  kind: Kind,
  known: number,
  notes: Set<string>,
): Promise<Place[]> {
  const places: Place[] = [];
  try {
    for (const name of systems) {
      const lab = new NetLab(kind, known);
      try {
        places.push({ name, lab, system: await MAKERS[name](lab) });
      } catch (error) {
        lab.close();
        if (name === 'redirect' || name === 'filter') throw error;
        notes.add(`${name} does not run here: ${asSnowflockError(error).message}`);
      }
    }
    return places;
  } catch (error) {
    await closeAll(places);
    throw error;
  }
}

async function closeAll(places: readonly Place[]): Promise<void> {
  for (const { pump, system, lab } of places) {
    await pump?.close();
    await system.close();
    lab.close();
  }
}

/** Everybody is first once. */
function turn<T>(all: readonly T[], round: number): T[] {
  const first = round % Math.max(all.length, 1);
  return [...all.slice(first), ...all.slice(0, first)];
}

function rowOf(rows: Row[], key: Omit<Row, 'values' | 'wall'>): Row {
  const same = (row: Row) =>
    row.system === key.system &&
    row.known === key.known &&
    row.way === key.way &&
    row.what === key.what;
  const found = rows.find(same);
  if (found !== undefined) return found;
  const made = { ...key, values: [], wall: [] };
  rows.push(made);
  return made;
}

interface TapPlan {
  systems: readonly SystemName[];
  known: number;
  rounds: number;
  ms: number;
  program: string;
  rows: Row[];
  notes: Set<string>;
}

async function taps({ signal, log }: BenchContext, plan: TapPlan): Promise<void> {
  const { known, rounds, ms, rows, notes } = plan;
  const places = await make(plan.systems, 'tap', known, notes);
  try {
    for (const place of places) {
      place.pump = await Pump.start(place.lab, place.system, plan.program);
      for (const [, from, to] of WAYS) await arrives(place.pump, from, to, signal);
    }
    for (let round = 0; round < rounds; round++) {
      for (const [way, from, to] of WAYS) {
        for (const bytes of SIZES_BYTES) {
          for (const { name, pump } of turn(places, round)) {
            signal.throwIfAborted();
            if (pump === undefined) continue;
            const moved = await pump.move(from, to, bytes, WINDOW, ms);
            if (moved.packets === 0) {
              throw new SnowflockError('E_INTERNAL', `${name} moved nothing, ${way}`);
            }
            const row = rowOf(rows, { system: name, known, way, what: `${bytes} bytes` });
            row.values.push(1e9 / moved.packet_cpu_ns);
            row.wall.push(moved.packets_per_s);
          }
        }
      }
      log(`${known} known, round ${round + 1} of ${rounds}`);
    }
  } finally {
    await closeAll(places);
  }
}

const ARRIVE_LIMIT_MS = 10_000;

/** A bridge's ports take a while until they forward. */
async function arrives(pump: Pump, from: GuestName, to: GuestName, signal: AbortSignal) {
  const until = performance.now() + ARRIVE_LIMIT_MS;
  for (let got: PumpResult | undefined; (got?.packets ?? 0) === 0; ) {
    signal.throwIfAborted();
    if (performance.now() > until) {
      throw new SnowflockError('E_TIMEOUT', `${pump.system.title}: no frame from ${from} to ${to}`);
    }
    got = await pump.move(from, to, 60, 1, 50);
  }
}

interface StackPlan {
  systems: readonly SystemName[];
  known: number;
  rounds: number;
  seconds: number;
  rows: Row[];
  notes: Set<string>;
}

async function stacks({ signal, log }: BenchContext, plan: StackPlan): Promise<void> {
  const { known, rounds, seconds, rows, notes } = plan;
  const places = await make(plan.systems, 'veth', known, notes);
  try {
    for (const { lab, system } of places) lab.configureGuests(system);
    for (let round = 0; round < rounds; round++) {
      for (const [way, from, to] of WAYS) {
        for (const kind of ['tcp', 'udp'] as const) {
          for (const { name, lab } of turn(places, round)) {
            signal.throwIfAborted();
            let result: IperfResult;
            try {
              result = await iperf(lab, from, to, kind, seconds, signal);
            } catch (error) {
              signal.throwIfAborted();
              if (name === 'redirect' || name === 'filter') throw error;
              notes.add(`${name}, iperf3 ${kind}, ${way}: ${asSnowflockError(error).message}`);
              continue;
            }
            const row = rowOf(rows, { system: name, known, way, what: `iperf3 ${kind}` });
            const value = kind === 'udp' ? (result.packets_per_s ?? 0) : result.bits_per_s / 1e6;
            row.values.push(value);
            row.wall.push(value);
          }
        }
      }
      log(`iperf3, round ${round + 1} of ${rounds}`);
    }
  } finally {
    await closeAll(places);
  }
}

const TITLES: Readonly<Record<SystemName, string>> = {
  redirect: 'plain redirect',
  filter: 'filter',
  nftables: 'nftables, bridge family',
  ebtables: 'ebtables, checks only',
  ovs: 'Open vSwitch, user space',
};

function unit(what: string): string {
  if (what === 'iperf3 tcp') return 'iperf3, one TCP stream, Mbit/s';
  if (what === 'iperf3 udp') return 'iperf3, UDP of 60-byte frames, packets/s';
  return `frames of ${what} between taps, packets/CPU-s`;
}

/** How much of the plain redirect's, in the same round: what the machine did then, it did to both. */
function share(rows: readonly Row[], of: Row): number {
  const base = rows.find(
    (row) =>
      row.system === 'redirect' &&
      row.known === of.known &&
      row.way === of.way &&
      row.what === of.what,
  );
  if (base === undefined) return Number.NaN;
  const shares = of.values.map((value, round) => value / (base.values[round] ?? Number.NaN));
  return shares.every(Number.isFinite) ? summarize(shares).median : Number.NaN;
}

function tables(rows: readonly Row[], systems: readonly SystemName[]): Table[] {
  const kinds = [...new Set(rows.map((row) => `${row.what}|${row.way}`))].sort();
  return kinds.map((kind) => {
    const [what = '', way = ''] = kind.split('|');
    const counts = [...new Set(rows.filter((row) => row.what === what).map((row) => row.known))];
    return {
      title: `${unit(what)}, ${way}`,
      columns: [
        '',
        ...counts.flatMap((count) => [`${figure(count).replace(/\.\d+$/, '')} known`, 'of plain']),
      ],
      rows: systems.map((system) => [
        TITLES[system],
        ...counts.flatMap((count) => {
          const row = rows.find(
            (it) =>
              it.system === system && it.known === count && it.way === way && it.what === what,
          );
          if (row === undefined) return ['–', '–'];
          return [summarize(row.values).median, `${figure(share(rows, row))}×`];
        }),
      ]),
    };
  });
}

function timeTable(times: readonly PacketTime[], known: readonly number[]): Table {
  const [least = 1] = known;
  const paths = [...new Set(times.map((time) => time.path))];
  const of = (path: string, count: number) =>
    times.find((time) => time.path === path && time.known === count)?.packet_ns ?? Number.NaN;
  return {
    title: 'ns a packet in the programs alone (BPF_PROG_TEST_RUN, its loop included)',
    columns: ['path', ...known.map((count) => `${count} known`), 'last of first'],
    rows: paths.map((path) => [
      path,
      ...known.map((count) => of(path, count)),
      ratio(of(path, known.at(-1) ?? least), of(path, least)),
    ]),
  };
}

function goalTable(rows: readonly Row[], known: readonly number[]): Table[] {
  const ours = rows.filter((row) => row.system === 'filter');
  if (!rows.some((row) => row.system === 'redirect') || ours.length === 0) return [];
  const verdict = (value: number, least: number) =>
    Number.isFinite(value) ? (value >= least ? 'met' : 'missed') : '–';
  const [least = 1, most = least] = [known[0], known.at(-1)];
  return [
    {
      title: `Goals: at least ${GOAL} of plain redirect; with ${most} known ${FLAT} of with ${least} or more`,
      columns: ['', 'of plain', '', 'flat', ''],
      rows: ours
        .filter((row) => row.known === most)
        .map((row) => {
          const first = ours.find(
            (it) => it.known === least && it.way === row.way && it.what === row.what,
          );
          const of = share(rows, row);
          const flat = first === undefined || first === row ? Number.NaN : of / share(rows, first);
          return [
            `${row.what}, ${row.way}`,
            `${figure(of)}×`,
            verdict(of, GOAL),
            Number.isFinite(flat) ? `${figure(flat)}×` : '–',
            verdict(flat, FLAT),
          ];
        }),
    },
  ];
}

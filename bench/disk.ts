/**
 * The disk server beside nbdkit and qemu-nbd: requests a second, latency, CPU time of the server,
 * each at chain depths up to 1,000; what a slice costs to make, and what the index takes in memory.
 *
 * All servers are processes of their own, under the same load: fio's NBD client on one connection
 * over a Unix socket. Rounds go over all servers in turn, so that what else the machine does hits
 * all of them; a figure is the median of the rounds, a ratio the median of the rounds' ratios.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { statfs } from 'node:fs/promises';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { SnowflockError } from '../src/common/errors.js';
import { NbdClient } from '../test/blktap/nbd-client.js';
import type { Bench, BenchContext } from './lib/bench.js';
import { makeChain, shuffled, writePages } from './lib/chain.js';
import type { DiskSizes, Forked } from './lib/disk-child.js';
import {
  chainFolder,
  DEPTHS,
  evict,
  makeFiles,
  ours,
  PEERS,
  type Place,
  socketOf,
  startRead,
  startWrite,
} from './lib/disk-peers.js';
import { type Load, type Measured, runFio } from './lib/fio.js';
import { touchFreeMemory } from './lib/memory.js';
import { type NbdProcess, OwnProcess } from './lib/nbd-process.js';
import { quantile, summarize } from './lib/stats.js';
import { figure, type Table } from './lib/table.js';

const TMPFS_MAGIC = 0x01021994;
const PAGE = 4096;
const ONE_CPU = '4 KiB random read, QD 1, one CPU';

interface Workload {
  readonly name: string;
  readonly load: Omit<Load, 'area_bytes' | 'runtime_ms'> & { readonly timed: boolean };
  /** What the goal compares with. */
  readonly peer: string;
  /** Where the server runs; the client is on CPU 0. Absent: on the last CPU. */
  readonly serverCpu?: number;
}

const READS: readonly Workload[] = [
  workload('4 KiB random read, QD 1', 'randread', PAGE, 1),
  // Client and server on one CPU: what a request costs, without the waking of another CPU, which on a
  // virtual machine takes more time than all else, and comes and goes with the scheduler's choices.
  { ...workload(ONE_CPU, 'randread', PAGE, 1), serverCpu: 0 },
  workload('4 KiB random read, QD 16', 'randread', PAGE, 16),
  workload('64 KiB sequential read, QD 4', 'read', 16 * PAGE, 4),
];

/** In this order: the first one writes each page once, the others meet what it wrote. */
const WRITES: readonly Workload[] = [
  { ...workload('4 KiB first writes, QD 16', 'randwrite', PAGE, 16, false), peer: 'nbdkit cow 4k' },
  workload('4 KiB random write, QD 1', 'randwrite', PAGE, 1),
  workload('4 KiB random write, QD 16', 'randwrite', PAGE, 16),
  workload('64 KiB sequential write, QD 4', 'write', 16 * PAGE, 4),
];

interface Sample extends Measured {
  readonly place: string;
  readonly workload: string;
  readonly server: string;
  readonly round: number;
  readonly cpu_s: number;
}

interface Sizes {
  readonly disk_bytes: number;
  readonly written_bytes: number;
  readonly runtime_ms: number;
  readonly rounds: number;
  readonly forks: number;
  readonly index_bytes: number;
  readonly depths: readonly number[];
  readonly peers: readonly string[];
}

const FULL: Sizes = {
  disk_bytes: 256 * 2 ** 20,
  written_bytes: 128 * 2 ** 20,
  runtime_ms: 400,
  rounds: 5,
  forks: 200,
  index_bytes: 2 ** 30,
  depths: DEPTHS,
  peers: PEERS,
};
const QUICK: Sizes = {
  disk_bytes: 64 * 2 ** 20,
  written_bytes: 32 * 2 ** 20,
  runtime_ms: 100,
  rounds: 1,
  forks: 20,
  index_bytes: 64 * 2 ** 20,
  depths: [0, 100],
  peers: PEERS.filter((peer) => peer !== 'qemu-nbd raw'),
};

const bench: Bench = {
  name: 'disk',
  description: 'the disk server beside nbdkit and qemu-nbd, at chain depths up to 1,000',
  async run(context) {
    const sizes = context.quick ? QUICK : FULL;
    const samples: Sample[] = [];
    const forks: Record<string, Forked> = {};
    const memory = { path: '/dev/shm', name: 'tmpfs' };
    const disk = { path: process.env.SNOWFLOCK_BENCH_DIR ?? '/var/tmp', name: 'disk' };
    const folders: string[] = [];
    const places: Place[] = [];
    const index: { layout: string; index_bytes: number }[] = [];
    try {
      for (const { path, name } of [memory, disk]) {
        await checkPlace(path, name === 'tmpfs', sizes);
        const folder = mkdtempSync(join(path, 'sf-bench-'));
        folders.push(folder);
        places.push({ name, folder, size_bytes: sizes.disk_bytes });
      }
      for (const place of places) {
        context.log(`${place.name}: files of ${sizes.disk_bytes / 2 ** 20} MiB`);
        const first = places[0] === place ? undefined : places[0];
        await makeFiles(place, sizes.depths, context.signal, first);
      }
      for (const place of places) {
        await measureReads(place, 'warm', sizes, context, samples);
        if (place.name !== 'tmpfs') await measureReads(place, 'cold', sizes, context, samples);
        await measureWrites(place, sizes, context, samples);
        context.log(`${place.name}: making slices`);
        forks[place.name] = await measureForks(place, sizes, context.signal);
        rmSync(place.folder, { recursive: true, force: true });
      }
      for (const layout of ['dense', 'scattered'] as const) {
        context.log(`index of ${sizes.index_bytes / 2 ** 20} MiB, ${layout}`);
        const folder = mkdtempSync(join(memory.path, 'sf-bench-'));
        folders.push(folder);
        index.push({ layout, index_bytes: await measureIndex(folder, layout, sizes, context) });
        rmSync(folder, { recursive: true, force: true });
      }
    } finally {
      for (const folder of folders) rmSync(folder, { recursive: true, force: true });
    }
    return {
      tables: [loadTable(samples, sizes), goalTable(samples, forks, index, sizes)],
      figures: { sizes, samples, forks, index },
      notes: [
        `disks of ${sizes.disk_bytes / 2 ** 20} MiB, every page written; writes go to their first ${sizes.written_bytes / 2 ** 20} MiB`,
        `the disk is ${disk.path} (SNOWFLOCK_BENCH_DIR); cold: its files were taken out of the page cache before each measurement`,
        'ours at depth N: pages scattered one by one over N slices, so that 64 KiB are 16 pieces',
        'the client has one CPU, the server another; in the rows of one CPU they share it',
        `ratio: to nbdkit file, for first writes to nbdkit cow 4k; ${sizes.rounds} rounds`,
        'before each load of writes as much free memory was written to: else the host may have to find it first (lib/memory.ts)',
        'first writes: ours, cow and qcow2 (64 KiB clusters) over what the disk holds; the raw files are empty',
      ],
    };
  },
};

export default bench;

function workload(
  name: string,
  rw: Load['rw'],
  block_bytes: number,
  queue: number,
  timed = true,
): Workload {
  return { name, load: { rw, block_bytes, queue, timed }, peer: 'nbdkit file' };
}

async function checkPlace(path: string, memory: boolean, sizes: Sizes): Promise<void> {
  const fs = await statfs(path);
  if ((fs.type === TMPFS_MAGIC) !== memory) {
    const what = memory ? 'is no tmpfs' : 'is a tmpfs: name a folder in SNOWFLOCK_BENCH_DIR';
    throw new SnowflockError('E_ARGUMENT', `${path} ${what}`);
  }
  const needed = 20 * sizes.disk_bytes + 2 * sizes.index_bytes;
  if (fs.bavail * fs.bsize < needed) {
    throw new SnowflockError('E_NO_SPACE', `${path} has not ${needed / 2 ** 20} MiB free`);
  }
}

function serversOf(sizes: Sizes): string[] {
  return [...sizes.depths.map(ours), ...sizes.peers];
}

/** Begins with another server each round. */
function rotated<T>(all: readonly T[], round: number): T[] {
  const at = (round * 4) % all.length;
  return [...all.slice(at), ...all.slice(0, at)];
}

async function measureReads(
  place: Place,
  cache: 'warm' | 'cold',
  sizes: Sizes,
  context: BenchContext,
  samples: Sample[],
): Promise<void> {
  const running = new Map<string, NbdProcess>();
  const name = cache === 'cold' ? `${place.name}, cold` : place.name;
  try {
    for (const server of serversOf(sizes)) {
      const process = await startRead(place, server);
      running.set(server, process);
      if (cache === 'warm') await runFio(process.uri, everything(sizes), context.signal);
    }
    for (let round = 0; round < sizes.rounds; round++) {
      context.log(`${name}: reads, round ${round + 1} of ${sizes.rounds}`);
      for (const { name: workload, load, serverCpu } of READS) {
        if (serverCpu !== undefined && cache === 'cold') continue;
        for (const [server, process] of rotated([...running], round)) {
          context.signal.throwIfAborted();
          if (cache === 'cold') await evict(place);
          const once = cache === 'cold';
          const area = { once, area_bytes: sizes.disk_bytes, runtime_ms: sizes.runtime_ms };
          const got = await measure(process, { ...load, ...area }, context.signal, serverCpu);
          samples.push({ place: name, workload, server, round, ...got });
        }
      }
    }
  } finally {
    for (const process of running.values()) await process.stop();
  }
}

async function measureWrites(
  place: Place,
  sizes: Sizes,
  context: BenchContext,
  samples: Sample[],
): Promise<void> {
  for (let round = 0; round < sizes.rounds; round++) {
    context.log(`${place.name}: writes, round ${round + 1} of ${sizes.rounds}`);
    for (const server of rotated(serversOf(sizes), round)) {
      const process = await startWrite(place, server);
      try {
        for (const { name: workload, load } of WRITES) {
          context.signal.throwIfAborted();
          const time = load.timed ? { runtime_ms: sizes.runtime_ms } : {};
          const all = { ...load, area_bytes: sizes.written_bytes, ...time };
          // Twice what is written: file systems and the client take pages, too.
          await touchFreeMemory(2 * sizes.written_bytes, context.signal);
          const got = await measure(process, all, context.signal);
          samples.push({ place: place.name, workload, server, round, ...got });
        }
      } finally {
        await process.stop();
      }
    }
  }
}

/**
 * Client and server each have their CPU. Left to the scheduler, the two sides of one and the same
 * server come to share a CPU in one run and not in the next, and its rate changes by a factor of two.
 */
async function measure(
  server: NbdProcess,
  load: Load,
  signal: AbortSignal,
  serverCpu = cpus().length - 1,
) {
  await server.runOn(String(serverCpu));
  const before = server.cpuSeconds();
  const measured = await runFio(server.uri, { ...load, cpu: 0 }, signal);
  return { ...measured, cpu_s: server.cpuSeconds() - before };
}

/** A pass over the whole disk, which puts it into the page cache. */
function everything(sizes: Sizes): Load {
  return { rw: 'read', block_bytes: 2 ** 20, queue: 4, area_bytes: sizes.disk_bytes };
}

/** Forks of the deepest chain, each after 20 random page writes. */
async function measureForks(place: Place, sizes: Sizes, signal: AbortSignal): Promise<Forked> {
  const directory = chainFolder(place, Math.max(...sizes.depths));
  const socket = socketOf(place, 'f');
  const server = await OwnProcess.serve(directory, socket, sizes.disk_bytes);
  const all: Forked = { gate_us: [], whole_us: [] };
  try {
    const client = await NbdClient.connect(socket);
    const pages = shuffled(sizes.disk_bytes / PAGE);
    for (let at = 0; at < sizes.forks; at++) {
      signal.throwIfAborted();
      await writePages(client, pages.subarray(at * 20, at * 20 + 20));
      const one = await server.ask<Forked>('fork 1');
      all.gate_us.push(...one.gate_us);
      all.whole_us.push(...one.whole_us);
    }
    await client.close();
    return all;
  } finally {
    await server.stop();
  }
}

async function measureIndex(
  folder: string,
  layout: 'dense' | 'scattered',
  sizes: Sizes,
  { signal }: BenchContext,
): Promise<number> {
  const plan = {
    directory: join(folder, 'disk'),
    socketPath: join(folder, 'socket'),
    size_bytes: sizes.index_bytes,
    pages: sizes.index_bytes / PAGE,
    depth: Math.max(...sizes.depths),
    layout,
  };
  const server = await makeChain(plan, signal);
  try {
    return (await server.ask<DiskSizes>('info')).index_bytes;
  } finally {
    await server.stop();
  }
}

/** Medians over the rounds, and the median of the ratios to the peer in the same round. */
function summary(samples: readonly Sample[], place: string, load: Workload, server: string) {
  const mine = samples.filter((s) => s.place === place && s.workload === load.name);
  const rounds = mine.filter((s) => s.server === server);
  if (rounds.length === 0) return undefined;
  const ratios = rounds.map((sample) => {
    const peer = mine.find((s) => s.server === load.peer && s.round === sample.round);
    return sample.request_rate / (peer?.request_rate ?? Number.NaN);
  });
  const median = (of: (sample: Sample) => number) => summarize(rounds.map(of)).median;
  const requests = rounds.reduce((sum, sample) => sum + sample.requests, 0);
  const cpu = rounds.reduce((sum, sample) => sum + sample.cpu_s, 0);
  return {
    request_rate: median((s) => s.request_rate),
    ratio: summarize(ratios).median,
    p50_us: median((s) => s.p50_us),
    p99_us: median((s) => s.p99_us),
    cpu_s_per_million: (cpu / requests) * 1e6,
  };
}

function loadTable(samples: readonly Sample[], sizes: Sizes): Table {
  const places = [...new Set(samples.map((sample) => sample.place))];
  const rows: (string | number)[][] = [];
  for (const load of [...READS, ...WRITES]) {
    for (const place of places) {
      for (const server of serversOf(sizes)) {
        const got = summary(samples, place, load, server);
        if (got === undefined) continue;
        rows.push([
          load.name,
          place,
          server,
          figure(Math.round(got.request_rate)),
          `${figure(got.ratio)}×`,
          got.p50_us,
          got.p99_us,
          got.cpu_s_per_million,
        ]);
      }
    }
  }
  return {
    title: 'Requests: median of the rounds; latency in µs; CPU seconds of the server per million',
    columns: ['load', 'on', 'server', 'per second', 'ratio', 'p50', 'p99', 'CPU'],
    rows,
  };
}

function goalTable(
  samples: readonly Sample[],
  forks: Readonly<Record<string, Forked>>,
  index: readonly { layout: string; index_bytes: number }[],
  sizes: Sizes,
): Table {
  const rows: (string | number)[][] = [];
  const worst = (load: Workload, place: string): void => {
    const all = sizes.depths.map((depth) => ({
      depth,
      ratio: summary(samples, place, load, ours(depth))?.ratio ?? Number.NaN,
    }));
    const least = all.reduce((a, b) => (b.ratio < a.ratio ? b : a));
    const met = least.ratio >= 1 ? 'yes' : 'no';
    const got = `${figure(least.ratio)}× at depth ${least.depth}`;
    rows.push([`${load.name}, ${place}`, `≥ ${load.peer} at every depth`, got, met]);
  };
  for (const place of new Set(samples.map((sample) => sample.place))) {
    const warm = !place.endsWith('cold');
    for (const load of READS) {
      if (load.load.block_bytes === PAGE && (warm || load.name !== ONE_CPU)) worst(load, place);
    }
    if (warm) for (const load of WRITES.slice(0, 1)) worst(load, place);
  }
  const depth = figure(Math.max(...sizes.depths));
  for (const [place, { gate_us, whole_us }] of Object.entries(forks)) {
    for (const [what, values] of [
      ['writes held off', gate_us],
      ['with all in the background', whole_us],
    ] as const) {
      const sorted = [...values].sort((a, b) => a - b);
      const [p50, p99] = [quantile(sorted, 0.5), quantile(sorted, 0.99)];
      const isGate = values === gate_us;
      rows.push([
        `a new slice at depth ${depth}, ${what}, ${place}`,
        isGate ? 'p99 ≤ 1 000 µs' : '',
        `p50 ${figure(p50)} µs, p99 ${figure(p99)} µs`,
        isGate ? (p99 <= 1000 ? 'yes' : 'no') : '',
      ]);
    }
  }
  for (const { layout, index_bytes } of index) {
    const mib = index_bytes / sizes.index_bytes / 2 ** -10;
    rows.push([
      `index at depth ${depth}, ${layout}`,
      '≤ 2 MiB a GiB written',
      `${figure(mib)} MiB a GiB`,
      mib <= 2 ? 'yes' : 'no',
    ]);
  }
  return { title: 'Goals', columns: ['what', 'goal', 'measured', 'met'], rows };
}

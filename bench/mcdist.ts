/**
 * Distribution of one generation to all hosts: mcdist beside udpcast, uftp and a TCP copy to each.
 *
 * A row is a number of receivers, a share of packets lost and a limit of all links. In its first
 * round each peer tries its settings on a small payload (of those that were fastest with fewer
 * receivers, two) and keeps the fastest; then the systems take turns. A round goes through all rows; further ones are begun as long as they end in time. Before
 * each transfer free memory is touched, see touchFreeMemory(); after it every receiver's bytes are
 * compared, outside of the time taken.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../src/common/errors.js';
import { run } from '../src/common/run.js';
import { type Bench, type BenchContext, numbers } from './lib/bench.js';
import { BenchNet, type NetPlan, sent } from './lib/mcdist-net.js';
import { makeFolders, udpcast, uftp } from './lib/mcdist-peers.js';
import { goalLines, type Measured, report } from './lib/mcdist-report.js';
import {
  CHILD,
  mcdist,
  now_ms,
  type Payload,
  prefetcher,
  type System,
  tcp,
} from './lib/mcdist-systems.js';
import { touchFreeMemory } from './lib/memory.js';

const SYSTEMS: Readonly<Record<string, System>> = { mcdist, udpcast, uftp, tcp, prefetcher };
const DEFAULT_SYSTEMS = 'mcdist,udpcast,uftp,tcp';
const MIB = 2 ** 20;
const TRIAL_MIB = 16;
/** With loss udpcast and uftp do not always find all their receivers; that fails soon. */
const TRIES = 3;
const FAILED_SOON_MS = 15_000;
/** Settings tried again in the next row of the same loss and limit. */
const TRIED_AGAIN = 2;
/** A transfer that is slower than this has failed: 100 s for 256 MiB. */
const SLOWEST_BYTES_PER_S = 3e6;
/** Touched beside what the receivers write: packets under way, the processes themselves. */
const OTHER_MEMORY_BYTES = 128 * MIB;

const bench: Bench = {
  name: 'mcdist',
  description: 'a generation to 1–16 hosts, beside udpcast, uftp and TCP copies; loss, limits',
  settings: {
    receivers: '1,2,4,8,16 (quick: 1,4)',
    loss: 'per cent at each receiver; 0,1,5 (quick: 0,5)',
    limit: 'Mbit/s of each link, 0: none; 1000,0',
    mib: 'size; 256 (quick: 64)',
    rounds: 'at most; 3 (quick: 1)',
    minutes: 'no further round is begun that would end later; 25',
    systems: `of mcdist, udpcast, uftp, tcp, prefetcher; ${DEFAULT_SYSTEMS}`,
  },
  async run(context) {
    const { quick, settings } = context;
    const [mib = 256] = numbers(settings, 'mib', [quick ? 64 : 256], 1, 4096);
    const [rounds = 3] = numbers(settings, 'rounds', [quick ? 1 : 3], 1, 99);
    const [minutes = 25] = numbers(settings, 'minutes', [25], 1, 10_000);
    const end_ms = now_ms() + minutes * 60_000;
    const plans: NetPlan[] = [];
    for (const limit_mbit_per_s of numbers(settings, 'limit', [1000, 0], 0, 100_000)) {
      for (const loss_percent of numbers(settings, 'loss', quick ? [0, 5] : [0, 1, 5], 0, 50)) {
        const counts = numbers(settings, 'receivers', quick ? [1, 4] : [1, 2, 4, 8, 16], 1, 64);
        for (const receivers of counts) plans.push({ receivers, limit_mbit_per_s, loss_percent });
      }
    }
    const systems = (settings.get('systems') ?? DEFAULT_SYSTEMS).split(',');
    for (const name of systems) {
      if (SYSTEMS[name] === undefined) throw new SnowflockError('E_ARGUMENT', `systems=${name}`);
    }
    const folder = await mkdtemp('/dev/shm/sf-bench-mcdist-');
    try {
      const small = await payload(folder, 'small', Math.min(TRIAL_MIB, mib) * MIB);
      const whole = await payload(folder, 'whole', mib * MIB);
      const rows = plans.map((plan): Row => {
        const row = systems.map((name) => ({ plan, name, setting: '', runs: [], failures: [] }));
        return { plan, row, took_ms: 0, given_up: new Set() };
      });
      const fastest: Fastest = new Map();
      for (let round = 0; round < rounds; round++) {
        for (const row of rows) {
          const begin_ms = now_ms();
          if (round > 0 && begin_ms + row.took_ms > end_ms) continue;
          await measureRow(context, row, round === 0 ? fastest : undefined, small, whole);
          row.took_ms = now_ms() - begin_ms; // with the trials, in the first round: longer than the next
          for (const line of goalLines(row.row, whole.bytes)) context.log(line);
        }
      }
      const measured = rows.flatMap(({ row }) => row);
      return report(measured, whole.bytes, quick);
    } catch (error) {
      if (context.signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench mcdist');
      throw error;
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  },
};
export default bench;

/** All systems under one plan. */
interface Row {
  readonly plan: NetPlan;
  readonly row: readonly Measured[];
  /** Its last round. */
  took_ms: number;
  /** Systems that failed with all of their settings. */
  readonly given_up: Set<Measured>;
}

/** Settings, the fastest first, by system, loss and limit. */
type Fastest = Map<string, readonly string[]>;

/** Incompressible bytes, as a file and as a replica. */
async function payload(folder: string, name: string, bytes: number): Promise<Payload> {
  const made: Payload = {
    folder: join(folder, `${name}-received`),
    file: join(folder, name),
    bytes,
    generation: randomBytes(16).toString('hex'),
    replica: join(folder, `${name}.replica`),
    limit_ms: 10_000 + (bytes / SLOWEST_BYTES_PER_S) * 1000,
  };
  await mkdir(made.folder);
  const file = await open(made.file, 'w');
  try {
    for (let at = 0; at < bytes; at += MIB) await file.write(randomBytes(MIB));
  } finally {
    await file.close();
  }
  const net = await BenchNet.make({ receivers: 0, limit_mbit_per_s: 0, loss_percent: 0 });
  try {
    const host = await net.start(net.source, CHILD);
    await host.call('fill', { path: made.replica, file: made.file, generation: made.generation });
  } finally {
    await net.close();
  }
  return made;
}

async function measureRow(
  context: BenchContext,
  { plan, row, given_up }: Row,
  fastest: Fastest | undefined,
  small: Payload,
  whole: Payload,
): Promise<void> {
  const title =
    `${plan.receivers} receivers, ${plan.loss_percent}% loss, ` +
    (plan.limit_mbit_per_s > 0 ? `${plan.limit_mbit_per_s} Mbit/s` : 'no limit');
  const net = await BenchNet.make(plan);
  try {
    for (const each of row) {
      if (fastest === undefined) break;
      const setting = await choose(context, net, each.name, fastest, small, title);
      each.setting = setting ?? '';
      if (setting !== undefined) continue;
      given_up.add(each);
      each.failures.push(`no setting brought ${TRIAL_MIB} MiB to all receivers in time`);
    }
    for (const each of row) {
      for (let tries = 0; tries < TRIES && !given_up.has(each); tries++) {
        const begin_ms = now_ms();
        const one = await once(context, net, each.name, whole, each.setting);
        context.log(`${title}: ${each.name} ${each.setting}: ${said(one)}`);
        if (typeof one !== 'string') {
          each.runs.push(one);
          break;
        }
        each.failures.push(one);
        if (now_ms() - begin_ms > FAILED_SOON_MS) break;
      }
    }
  } finally {
    await net.close();
  }
}

const said = (one: string | Measured['runs'][number]): string =>
  typeof one === 'string'
    ? `failed: ${one}`
    : `${(one.time_ms / 1000).toFixed(2)} s, ${one.sent_per_payload.toFixed(3)} sent, ` +
      `${one.cpu_s_per_gb.toFixed(2)} CPU s/GB`;

/** The fastest of a system's settings; one that takes twice as long as another is given up. */
async function choose(
  context: BenchContext,
  net: BenchNet,
  name: string,
  fastest: Fastest,
  small: Payload,
  title: string,
): Promise<string | undefined> {
  const { limit_mbit_per_s, loss_percent } = net.plan;
  const key = `${name} ${limit_mbit_per_s} ${loss_percent}`;
  const all = SYSTEMS[name]?.settings(net) ?? [];
  const settings = fastest.get(key)?.slice(0, TRIED_AGAIN) ?? all;
  if (all.length < 2) return all[0] ?? '';
  const tried: { setting: string; ms: number }[] = [];
  for (const setting of settings) {
    const least_ms = Math.min(5000, ...tried.map(({ ms }) => ms));
    const limit_ms = Math.max(1000, 2 * least_ms);
    const one = await once(context, net, name, { ...small, limit_ms }, setting);
    context.log(`${title}: trial of ${name} ${setting}: ${said(one)}`);
    if (typeof one !== 'string') tried.push({ setting, ms: one.time_ms });
  }
  tried.sort((a, b) => a.ms - b.ms);
  if (tried.length === 0)
    fastest.delete(key); // all are tried again
  else
    fastest.set(
      key,
      tried.map(({ setting }) => setting),
    );
  return tried[0]?.setting;
}

/** One transfer, checked; why it failed otherwise. */
async function once(
  { signal }: BenchContext,
  net: BenchNet,
  name: string,
  payload: Payload,
  setting: string,
): Promise<string | Measured['runs'][number]> {
  signal.throwIfAborted();
  const system = SYSTEMS[name];
  if (system === undefined) throw new RangeError(name);
  const counting = await net.start(net.source, CHILD); // its /proc shows the interface
  const limit = AbortSignal.any([
    signal,
    AbortSignal.timeout(Math.ceil(payload.limit_ms) + 20_000),
  ]);
  try {
    await makeFolders(net, payload);
    await touchFreeMemory(payload.bytes * net.receivers.length + OTHER_MEMORY_BYTES, limit);
    const pid = await counting.call<number>('pid');
    const before = sent(pid);
    const { begin_ms, end_ms, cpu_s, files, counters } = await system.send(
      net,
      payload,
      setting,
      limit,
    );
    const after = sent(pid);
    for (const file of files) {
      await run('cmp', [payload.file, file]).catch((error: unknown) => {
        throw new SnowflockError('E_CORRUPT', `${name}: wrong bytes: ${String(error)}`);
      });
    }
    return {
      time_ms: end_ms - begin_ms,
      sent_per_payload: (after.bytes - before.bytes) / payload.bytes,
      cpu_s_per_gb: cpu_s / ((payload.bytes * net.receivers.length) / 1e9),
      counters,
    };
  } catch (error) {
    signal.throwIfAborted();
    return error instanceof Error ? error.message.slice(0, 300) : String(error);
  } finally {
    await net.end([counting]);
    await rm(payload.folder, { recursive: true, force: true });
    await mkdir(payload.folder);
  }
}

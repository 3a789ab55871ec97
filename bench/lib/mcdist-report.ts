import type { BenchResult } from './bench.js';
import type { NetPlan } from './mcdist-net.js';
import { summarize } from './stats.js';
import { figure, ratio, type Table } from './table.js';

export interface Run {
  /** Until the last receiver has all. */
  readonly time_ms: number;
  /** Bytes of IP packets that left the source's interface, over the payload. */
  readonly sent_per_payload: number;
  /** Of all processes of the system; GB that arrived, at all receivers together. */
  readonly cpu_s_per_gb: number;
  readonly counters?: unknown;
}

/** One system in one row. */
export interface Measured {
  readonly plan: NetPlan;
  readonly name: string;
  setting: string;
  readonly runs: Run[];
  readonly failures: string[];
}

const OWN = 'mcdist';
const OURS: readonly string[] = [OWN, 'prefetcher'];
const LINK_SHARE = 0.9;
/** Bytes sent over payload, by loss in per cent; those with loss are goals for up to 8 receivers. */
const BYTES_GOAL: Readonly<Record<number, number>> = { 0: 1.06, 1: 1.1, 5: 1.25 };
const GOAL_RECEIVERS = 8;

const NOTES = [
  'time: from the moment data may flow until the last receiver has all; finding each other is left out for all systems',
  'sent: bytes of IP packets (no Ethernet headers) that left the source, over the payload',
  'CPU: of all processes of a system, per GB that arrived; the kernel work done in interrupts is nobody’s',
  'before each transfer as much free memory is touched as the receivers write: pages the machine’s host has yet to give cost several times a page',
  'every receiver’s bytes were compared; data on tmpfs; mcdist encrypts and authenticates, the peers send in the clear',
  'with loss or a limit segmentation and receive offload are off, so that loss hits packets of wire size for all; without either they are on, and TCP’s headers are counted once a large packet',
  'TCP copies: sendfile() to each receiver on its own, all at once; kernel defaults',
  'udpcast: fastest of full and half duplex, with and without --max-bitrate of 97% of the limit and FEC of 8 in 128, on a small payload in the same row; uftp: fastest of several -R, buffers of 8 MiB, blocks of 1450 bytes',
];

const median = (runs: readonly Run[], of: (run: Run) => number): number =>
  runs.length === 0 ? Number.NaN : summarize(runs.map(of)).median;

const time = (each: Measured): number => median(each.runs, (run) => run.time_ms);

interface Goal {
  readonly goal: string;
  readonly plan: NetPlan;
  readonly value: number;
  readonly limit: number;
  readonly met: boolean;
}

export function report(measured: readonly Measured[], bytes: number, quick: boolean): BenchResult {
  const tables: Table[] = [];
  const goals: Goal[] = [];
  for (const limit of new Set(measured.map(({ plan }) => plan.limit_mbit_per_s))) {
    const of = measured.filter(({ plan }) => plan.limit_mbit_per_s === limit);
    tables.push(table(of, limit, bytes));
    goals.push(...of.filter(({ name }) => name === OWN).flatMap((own) => goalsOf(own, of, bytes)));
  }
  tables.push({
    title: 'Goals',
    columns: ['goal', 'receivers', 'loss', 'limit', 'value', '', 'met'],
    rows: goals.map(({ goal, plan, value, limit, met }) => [
      ...[goal, plan.receivers.toFixed(0), `${plan.loss_percent}%`, limitText(plan)],
      ...[figure(value), `of ${figure(limit)}`, met ? 'met' : 'missed'],
    ]),
  });
  const failures = measured.flatMap(({ plan, name, failures: texts }) =>
    texts.map((text) => `${name}, ${plan.receivers} receivers, ${plan.loss_percent}%: ${text}`),
  );
  return {
    tables,
    figures: { payload_bytes: bytes, measured, goals },
    notes: [
      ...NOTES,
      ...(quick ? ['one round of a small payload: start-up weighs more than it should'] : []),
      ...failures,
    ],
  };
}

/** A row's goals, for whoever watches. */
export function goalLines(row: readonly Measured[], bytes: number): string[] {
  return row
    .filter(({ name }) => name === OWN)
    .flatMap((own) => goalsOf(own, row, bytes))
    .map(
      ({ goal, value, limit, met }) =>
        `  ${met ? 'met   ' : 'missed'} ${goal}: ${figure(value)} of ${figure(limit)}`,
    );
}

const limitText = (plan: NetPlan): string =>
  plan.limit_mbit_per_s > 0 ? `${plan.limit_mbit_per_s} Mbit/s` : 'none';

function bestPeer(own: Measured, all: readonly Measured[]): Measured | undefined {
  return all
    .filter((each) => each.plan === own.plan && !OURS.includes(each.name) && each.runs.length > 0)
    .sort((a, b) => time(a) - time(b))[0];
}

function table(of: readonly Measured[], limit: number, bytes: number): Table {
  return {
    title: `${(bytes / 2 ** 20).toFixed(0)} MiB, ${limit > 0 ? `links of ${limit} Mbit/s` : 'links without limit'}; medians`,
    columns: [
      'receivers',
      'loss',
      'system',
      's',
      'mcdist/peer',
      'sent',
      'CPU s/GB',
      'Mbit/s',
      'how',
    ],
    rows: of.map((each) => {
      const own = of.find(({ plan, name }) => plan === each.plan && name === OWN);
      const all_ms = time(each);
      return [
        ...[each.plan.receivers.toFixed(0), `${each.plan.loss_percent}%`, each.name],
        each.runs.length === 0 ? 'failed' : figure(all_ms / 1000),
        own === undefined || own === each ? '' : ratio(time(own), all_ms),
        median(each.runs, (run) => run.sent_per_payload).toFixed(3),
        median(each.runs, (run) => run.cpu_s_per_gb),
        (bytes * 8) / (all_ms * 1000),
        each.setting,
      ];
    }),
  };
}

function goalsOf(own: Measured, all: readonly Measured[], bytes: number): Goal[] {
  const { plan } = own;
  const goals: Goal[] = [];
  const add = (goal: string, value: number, limit: number, met: boolean): void => {
    goals.push({ goal, plan, value, limit, met });
  };
  const peer = bestPeer(own, all);
  if (peer !== undefined) {
    const times = time(own) / time(peer);
    add(`time over the best peer's (${peer.name})`, times, 1, times < 1);
  }
  const sent = median(own.runs, (run) => run.sent_per_payload);
  const most = BYTES_GOAL[plan.loss_percent];
  if (most !== undefined && (plan.loss_percent === 0 || plan.receivers <= GOAL_RECEIVERS)) {
    add('bytes sent over payload', sent, most, sent <= most);
  }
  if (plan.limit_mbit_per_s > 0) {
    // What the link carried of this generation's packets: the limit counts headers too.
    const share = (bytes * 8 * sent) / (time(own) * 1000) / plan.limit_mbit_per_s;
    add('share of the link used', share, LINK_SHARE, share >= LINK_SHARE);
  }
  return goals;
}

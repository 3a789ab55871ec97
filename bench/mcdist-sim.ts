/**
 * Simulated: 10,000 hosts clone one 1 GiB generation of which 4% is touched, on 1 and 10 Gbit/s. The
 * classes that decide in mcdist's server and client, in virtual time. Writes docs/figures/mcdist-sim-*.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from '../src/common/native.js';
import { type SimOptions, simulate } from '../src/mcdist/simulator.js';
import type { Bench, BenchContext, BenchResult } from './lib/bench.js';
import { GIB_PAGES, quantile, startTrace } from './lib/page-traces.js';
import { lineSvg } from './lib/svg.js';

interface Row {
  readonly mode: string;
  readonly gbit_per_s: number;
  readonly hosts: number;
  readonly sent_mb: number;
  /** Over the bytes of the pages touched by anybody. */
  readonly sent_ratio: number;
  readonly pages_served: number;
  readonly requests: number;
  readonly requests_dropped: number;
  readonly at_speed_p50_s: number;
  readonly at_speed_p99_s: number;
  readonly waited_p50_s: number;
  readonly waited_p99_s: number;
  readonly max_wait_ms: number;
  readonly curve: readonly (readonly [number, number])[];
}

const TOUCHED = Math.round(GIB_PAGES * 0.04);
const COMPUTE_NS = 100_000;

function base(hosts: number, gbit: number): SimOptions {
  const quarter = Math.ceil(hosts / 4);
  return {
    seed: 1,
    pages: GIB_PAGES,
    // Four racks, further away each.
    segments: [0, 1, 2, 3].map((rack) => ({
      clients: rack < 3 ? quarter : hosts - 3 * quarter,
      delayMs: 0.03 + 0.03 * rack,
    })),
    traces: [startTrace(GIB_PAGES, TOUCHED, COMPUTE_NS, 1)],
    serverBytesPerS: gbit * 125e6,
    jitterPages: 32,
    speedSpread: 0.1,
    skipShare: 0.02,
    privateShare: 0.0005,
    joinSpreadMs: 200,
    maxPeers: 16_384,
    maxWaitMs: 60_000,
    maxTimeMs: 6 * 3600_000,
  };
}

/** All of it grows with the number of hosts; 10,000 take half an hour to simulate. */
const UNICAST_HOSTS = 200;
const FIRST_WAVE = 64;

/** 64 hosts start at once; the others when those are done, within 200 ms. */
function afterFirstWave(hosts: number): { client: number; atMs: number }[] {
  return Array.from({ length: hosts }, (_, client) => ({
    client,
    atMs: client < FIRST_WAVE ? 0 : 10_000 + (200 * (client - FIRST_WAVE)) / hosts,
  }));
}

async function run(
  context: BenchContext,
  mode: string,
  gbit: number,
  hosts: number,
  more: Partial<SimOptions>,
): Promise<Row> {
  const started = performance.now();
  const result = await simulate({ ...base(hosts, gbit), ...more }, context.signal);
  const from = more.history ? FIRST_WAVE : 0;
  const atSpeed = result.atSpeedMs
    .map((at, i) => Math.max(0, at - (result.startMs[i] ?? 0)) / 1000)
    .slice(from);
  const waited = result.waitedMs.map((ms) => ms / 1000).slice(from);
  const took = ((performance.now() - started) / 1000).toFixed(0);
  context.log(`${mode}, ${gbit} Gbit/s, ${hosts} hosts: ${result.events} events in ${took} s`);
  return {
    mode,
    gbit_per_s: gbit,
    hosts,
    sent_mb: result.sentBytes / 1e6,
    sent_ratio: result.sentBytes / (result.distinctPages * 4096),
    pages_served: result.pagesServed,
    requests: result.requests,
    requests_dropped: result.requestsDropped,
    at_speed_p50_s: quantile(atSpeed, 0.5),
    at_speed_p99_s: quantile(atSpeed, 0.99),
    waited_p50_s: quantile(waited, 0.5),
    waited_p99_s: quantile(waited, 0.99),
    max_wait_ms: result.maxWaitMs,
    curve: Array.from({ length: 21 }, (_, i) => [quantile(atSpeed, i / 20), i * 5] as const),
  };
}

function plot(rows: readonly Row[], gbit: number): void {
  const folder = join(projectRoot, 'docs', 'figures');
  mkdirSync(folder, { recursive: true });
  const shown = rows.filter((row) => row.gbit_per_s === gbit && row.mode !== 'unicast');
  const svg = lineSvg({
    title: `Hosts running at speed after their start, ${shown[0]?.hosts} hosts, ${gbit} Gbit/s`,
    x: 'seconds',
    y: '% of the hosts',
    series: shown.map(({ mode, curve }) => ({ name: mode, points: curve })),
  });
  writeFileSync(join(folder, `mcdist-sim-${gbit}g.svg`), svg);
}

const bench: Bench = {
  name: 'mcdist-sim',
  description: 'simulated: 10,000 hosts cloning 1 GiB of which 4% is touched, 1 and 10 Gbit/s',
  async run(context): Promise<BenchResult> {
    const hosts = context.quick ? 500 : 10_000;
    const rows: Row[] = [];
    for (const gbit of [1, 10]) {
      const add = async (mode: string, more: Partial<SimOptions>) => {
        rows.push(await run(context, mode, gbit, more.unicast ? UNICAST_HOSTS : hosts, more));
      };
      await add('unicast', { unicast: true });
      await add('multicast', { policy: { push: 'off' } });
      await add('multicast, push', { policy: { push: 'behind' } });
      await add('multicast, history', {
        policy: { push: 'off' },
        history: true,
        joins: afterFirstWave(hosts),
      });
      if (!context.quick) plot(rows, gbit);
    }
    return {
      tables: [
        {
          title: `${hosts} hosts, ${TOUCHED} pages touched of ${GIB_PAGES}, 0.1 ms of computing for each`,
          columns: [
            'networking',
            'hosts',
            'Gbit/s',
            'sent MB',
            '× touched',
            'requests',
            'dropped',
            'at speed p50 s',
            'p99 s',
            'waited p50 s',
            'p99 s',
            'longest ms',
          ],
          rows: rows.map((row) => [
            row.mode,
            row.hosts,
            row.gbit_per_s,
            row.sent_mb,
            row.sent_ratio,
            row.requests,
            row.requests_dropped,
            row.at_speed_p50_s,
            row.at_speed_p99_s,
            row.waited_p50_s,
            row.waited_p99_s,
            row.max_wait_ms,
          ]),
        },
      ],
      figures: { rows },
      notes: [
        'At speed: from then on at most 10% of the time was waiting for pages (blocks of 128 touches).',
        `unicast: ${UNICAST_HOSTS} hosts; bytes and times are as many times larger as hosts are more.`,
        'Simulated: no loss; four racks 30 to 120 us away; the server spends 2 us on a request, 6 us on a page.',
        'history: 64 hosts made their clones 10 s before (not counted but for what was sent); what they touched is sent first.',
      ],
    };
  },
};

export default bench;

/**
 * Figures 8, 9, 11 and 12 of the SnowFlock paper as simulations of ours: the classes that decide in
 * mcdist's server and client, in virtual time, with synthetic traces. Writes docs/figures/mcdist-*.svg.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from '../src/common/native.js';
import { type SimOptions, type SimResult, simulate } from '../src/mcdist/simulator.js';
import type { Bench, BenchContext, BenchResult } from './lib/bench.js';
import {
  BLAST_DATABASE_AT,
  blastTrace,
  GIB_PAGES,
  SHRIMP_PAGES,
  shrimpTrace,
} from './lib/page-traces.js';
import { barSvg, lineSvg } from './lib/svg.js';
import type { Table } from './lib/table.js';

interface Mode {
  readonly name: string;
  readonly options: Partial<SimOptions>;
}
/** Of the paper. */
const MODES: readonly Mode[] = [
  { name: 'unicast', options: { unicast: true } },
  { name: 'multicast', options: { policy: { push: 'off' } } },
  { name: 'multicast, push', options: { policy: { push: 'behind' } } },
];

interface Figure {
  readonly experiment: string;
  readonly mode: string;
  readonly clones: number;
  readonly requests: number;
  readonly pages_served: number;
  readonly sent_mb: number;
  readonly received_mb: number;
  readonly time_s: number;
  /** Time of one clone that waits for nothing, over this time, times the clones' number. */
  readonly speedup: number;
}

const SEED = 1;
const JITTER = { jitterPages: 16, speedSpread: 0.05, joinSpreadMs: 200 } as const;

/** What the trace computes, in seconds. */
const computeS = (options: Pick<SimOptions, 'traces'>): number =>
  Math.max(
    ...options.traces.map(({ computeNs }) => computeNs.reduce((sum, ns) => sum + ns, 0) / 1e9),
  );

const endS = (result: SimResult): number => Math.max(...result.finishedMs) / 1000;

async function run(
  context: BenchContext,
  experiment: string,
  mode: Mode,
  clones: number,
  options: SimOptions,
  workS: number,
): Promise<Figure> {
  const result = await simulate({ ...options, ...mode.options }, context.signal);
  const time = endS(result);
  context.log(`${experiment}, ${mode.name}, ${clones} clones: ${time.toFixed(1)} s`);
  return {
    experiment,
    mode: mode.name,
    clones,
    requests: result.pagesRequested,
    pages_served: result.pagesServed,
    sent_mb: result.sentBytes / 1e6,
    received_mb: result.receivedBytes / 1e6,
    time_s: time,
    speedup: workS / time,
  };
}

function write(name: string, svg: string): void {
  const folder = join(projectRoot, 'docs', 'figures');
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, `mcdist-${name}.svg`), svg);
}

const of = (figures: readonly Figure[], experiment: string, mode: string): Figure[] =>
  figures.filter((figure) => figure.experiment === experiment && figure.mode === mode);

function table(title: string, figures: readonly Figure[]): Table {
  return {
    title,
    columns: [
      '',
      'networking',
      'clones',
      'pages asked for',
      'pages served',
      'sent MB',
      'received MB',
      'time s',
      'speed-up',
    ],
    rows: figures.map((figure) => [
      figure.experiment,
      figure.mode,
      figure.clones,
      figure.requests,
      figure.pages_served,
      figure.sent_mb,
      figure.received_mb,
      figure.time_s,
      figure.speedup,
    ]),
  };
}

/** Figures 8 and 9: memory that is allocated anew, with and without the heuristics. */
async function shrimp(context: BenchContext, clonesOf: readonly number[]): Promise<Figure[]> {
  const footprintPages = context.quick ? 20_000 : 240_000;
  const figures: Figure[] = [];
  for (const heuristics of [true, false]) {
    const experiment = `heuristics ${heuristics ? 'on' : 'off'}`;
    const traces = [
      shrimpTrace({ footprintPages, heuristics, computeS: context.quick ? 8 : 100, seed: SEED }),
    ];
    const work = computeS({ traces });
    for (const clones of clonesOf) {
      for (const mode of MODES) {
        const options = {
          seed: SEED,
          pages: SHRIMP_PAGES,
          segments: [{ clients: clones }],
          traces,
          ...JITTER,
        };
        figures.push(await run(context, experiment, mode, clones, options, work * clones));
      }
    }
  }
  return figures;
}

/** Figures 11 and 12: a database in memory, scanned. */
async function blast(
  context: BenchContext,
  clonesOf: readonly number[],
  databaseMib: number,
  disjoint: boolean,
): Promise<Figure[]> {
  const experiment = `${databaseMib} MiB${disjoint ? ', disjoint' : ''}`;
  const databasePages = (databaseMib * 256) / (context.quick ? 16 : 1);
  const modes = disjoint
    ? [
        ...MODES,
        {
          name: 'multicast, disjoint said',
          options: {
            policy: { push: 'off', disjoint: [{ first: BLAST_DATABASE_AT, count: databasePages }] },
          },
        } as const,
      ]
    : MODES;
  const task = context.quick ? 40 : 640;
  const figures: Figure[] = [];
  for (const clones of clonesOf) {
    const traces = Array.from({ length: disjoint ? clones : 1 }, (_, clone) =>
      blastTrace({ databasePages, clones, clone, disjoint, computeS: task }),
    );
    for (const mode of modes) {
      const options = {
        seed: SEED,
        pages: GIB_PAGES,
        segments: [{ clients: clones }],
        traces,
        ...JITTER,
      };
      figures.push(await run(context, experiment, mode, clones, options, task));
    }
  }
  return figures;
}

function plots(figures: readonly Figure[], clonesOf: readonly number[]): void {
  const most = Math.max(...clonesOf);
  const groups = ['heuristics on', 'heuristics off'].flatMap((experiment) =>
    MODES.map(({ name }) => ({ experiment, name })),
  );
  const at = (figure: (of: Figure) => number) =>
    groups.map(({ experiment, name }) => {
      const found = of(figures, experiment, name).find(({ clones }) => clones === most);
      return found ? figure(found) : Number.NaN;
    });
  write(
    'fig8',
    barSvg({
      title: `Pages asked for and served, ${most} clones (figure 8)`,
      x: '',
      y: 'pages',
      logY: true,
      groups: groups.map(({ experiment, name }) => `${name}\n${experiment}`),
      series: [
        { name: 'asked for by all clones', values: at((figure) => figure.requests) },
        { name: 'served', values: at((figure) => figure.pages_served) },
      ],
    }),
  );
  const lines = (
    experiments: readonly string[],
    modes: readonly string[],
    value: (of: Figure) => number,
  ) =>
    experiments.flatMap((experiment) =>
      modes.map((mode) => ({
        name: experiments.length > 1 ? `${mode}, ${experiment}` : mode,
        points: of(figures, experiment, mode).map(
          (figure) => [figure.clones, value(figure)] as const,
        ),
      })),
    );
  const ideal = { name: 'ideal', points: clonesOf.map((clones) => [clones, clones] as const) };
  const names = MODES.map(({ name }) => name);
  const speedup = (figure: Figure) => figure.speedup;
  const x = 'clones';
  for (const [name, experiment] of [
    ['fig9-on', 'heuristics on'],
    ['fig9-off', 'heuristics off'],
  ] as const) {
    write(
      name,
      lineSvg({
        title: `Throughput of n clones with n times the work, ${experiment} (figure 9)`,
        x,
        y: 'times that of one clone that never waits',
        log2X: true,
        series: [...lines([experiment], names, speedup), ideal],
      }),
    );
  }
  for (const size of [256, 512]) {
    write(
      `fig11-${size}`,
      lineSvg({
        title: `Speed-up, the queries split among n clones, database of ${size} MiB (figure 11)`,
        x,
        y: 'speed-up',
        log2X: true,
        series: [...lines([`${size} MiB`], names, speedup), ideal],
      }),
    );
  }
  write(
    'fig12',
    lineSvg({
      title: 'Pages served, database of 256 MiB (figure 12)',
      x,
      y: 'pages',
      log2X: true,
      logY: true,
      series: lines(['256 MiB'], names, (figure) => figure.pages_served),
    }),
  );
  write(
    'disjoint',
    lineSvg({
      title: 'Bytes that arrive at all clones, each scanning its own part of 256 MiB',
      x,
      y: 'bytes received',
      log2X: true,
      logY: true,
      series: lines(
        ['256 MiB, disjoint'],
        [...names, 'multicast, disjoint said'],
        (figure) => figure.received_mb * 1e6,
      ),
    }),
  );
}

const bench: Bench = {
  name: 'mcdist-paper',
  description: "the paper's figures 8, 9, 11, 12 simulated: unicast, multicast, push; heuristics",
  async run(context): Promise<BenchResult> {
    const clonesOf = context.quick ? [1, 4, 16] : [1, 2, 4, 8, 16, 32];
    const memory = await shrimp(context, clonesOf);
    const scans: Figure[] = [];
    for (const disjoint of [false, true]) {
      for (const size of disjoint ? [256] : [256, 512]) {
        scans.push(...(await blast(context, clonesOf, size, disjoint)));
      }
    }
    if (!context.quick) plots([...memory, ...scans], clonesOf);
    return {
      tables: [
        table('Memory that is mostly allocated anew (figures 8 and 9)', memory),
        table('A database in memory that is scanned (figures 11 and 12)', scans),
      ],
      figures: { memory, scans },
      notes: [
        'Simulated: 1 Gbit/s, no loss, seed 1; docs/mcdist-experiments.md says what.',
        'unicast: each request is answered to its sender, no page twice in the queue (as TCP would).',
      ],
    };
  },
};

export default bench;

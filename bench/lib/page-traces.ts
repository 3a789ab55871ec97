/**
 * Page traces for the simulator: synthetic, after what the SnowFlock paper says of its workloads.
 * Not recorded from a guest. A trace is the pages a clone reads in order, and what it computes before
 * each; pages that a heuristic keeps from being fetched are left out, their computing is not.
 */
import type { SimTrace } from '../../src/mcdist/simulator.js';

export const GIB_PAGES = 262_144;

class Builder {
  private readonly pages: number[] = [];
  private readonly compute: number[] = [];
  private pending = 0;

  /** Computes, then touches the page. */
  touch(page: number, computeNs: number): void {
    this.pages.push(page);
    this.compute.push(Math.round(this.pending + computeNs));
    this.pending = 0;
  }
  /** Computes, and writes a page whole without reading it: a fetch only without the heuristics. */
  overwrite(page: number, computeNs: number, heuristics: boolean): void {
    if (heuristics) this.pending += computeNs;
    else this.touch(page, computeNs);
  }
  done(): SimTrace {
    // What is computed after the last touch would be lost: touch a page known to be there.
    if (this.pending > 0) this.touch(this.pages[0] ?? 0, 0);
    // 4 s fit into an element; more is spread over touches of the page before.
    const pages: number[] = [];
    const compute: number[] = [];
    for (let i = 0; i < this.pages.length; i++) {
      let left = this.compute[i] ?? 0;
      while (left > 4e9) {
        pages.push(pages.at(-1) ?? this.pages[0] ?? 0);
        compute.push(4e9);
        left -= 4e9;
      }
      pages.push(this.pages[i] ?? 0);
      compute.push(left);
    }
    return { pages: Uint32Array.from(pages), computeNs: Uint32Array.from(compute) };
  }
}

/** The same numbers for the same seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Runs of 1 to 16 neighbouring pages, all of `from..to-1` once, the runs in a random order. */
function scattered(from: number, to: number, next: () => number): number[] {
  const runs: number[][] = [];
  for (let page = from; page < to; ) {
    const length = Math.min(to - page, 1 + Math.floor(next() * 16));
    runs.push(Array.from({ length }, (_, i) => page + i));
    page += length;
  }
  for (let i = runs.length - 1; i > 0; i--) {
    const j = Math.floor(next() * (i + 1));
    const [a, b] = [runs[i], runs[j]];
    if (a && b) [runs[i], runs[j]] = [b, a];
  }
  return runs.flat();
}

export interface ShrimpOptions {
  /** Pages that the application allocates and fills, e.g. 1 GB. */
  readonly footprintPages: number;
  readonly heuristics: boolean;
  /** Computing in all, shared out over the touches. */
  readonly computeS: number;
  readonly seed: number;
}

/**
 * SHRiMP-like, in a guest of 1.125 GiB: right after the start 2,500 pages of kernel code and 2,500
 * of kernel data, runs of neighbours; then the application allocates its footprint from pages that
 * are not in use (each is overwritten whole) while, here and there, other processes wake up and touch
 * 5,000 pages of older user space; then it computes.
 */
export const SHRIMP_PAGES = GIB_PAGES + GIB_PAGES / 8;

export function shrimpTrace(options: ShrimpOptions): SimTrace {
  const next = random(options.seed);
  const trace = new Builder();
  const kernel = scattered(0, 5000, next);
  const user = scattered(5000, 10_000, next);
  const startNs = 50_000;
  for (const page of kernel) trace.touch(page, startNs);
  const loadNs = (options.computeS * 1e9 * 0.3) / options.footprintPages;
  const each = Math.max(1, Math.floor(options.footprintPages / user.length));
  for (let i = 0; i < options.footprintPages; i++) {
    trace.overwrite(20_000 + i, loadNs, options.heuristics);
    const page = i % each === 0 ? user[i / each] : undefined;
    if (page !== undefined) trace.touch(page, 0);
  }
  // Hundred slices: the kernel's threads look at data already here.
  for (let i = 0; i < 100; i++) {
    trace.touch(kernel[i] ?? 0, (options.computeS * 1e9 * 0.7) / 100);
  }
  return trace.done();
}

export interface BlastOptions {
  /** Pages of the database, cached in the parent's memory before the fork. */
  readonly databasePages: number;
  readonly clones: number;
  /** This one's number. */
  readonly clone: number;
  /** The database is split, each clone scans its part; else the queries are, each scans all of it. */
  readonly disjoint: boolean;
  /** Computing of the whole task, shared out over the clones. */
  readonly computeS: number;
}

export const BLAST_DATABASE_AT = 20_000;

/**
 * BLAST-like: 6,000 pages of kernel and program, then one scan of the database in its order. The
 * database is memory that was filled before the fork, so no heuristic applies.
 */
export function blastTrace(options: BlastOptions): SimTrace {
  const trace = new Builder();
  for (const page of scattered(0, 6000, random(7))) trace.touch(page, 50_000);
  const share = Math.ceil(options.databasePages / options.clones);
  const from = options.disjoint ? share * options.clone : 0;
  const to = options.disjoint
    ? Math.min(options.databasePages, from + share)
    : options.databasePages;
  const computeNs = (options.computeS * 1e9) / options.clones / Math.max(1, to - from);
  for (let page = from; page < to; page++) trace.touch(BLAST_DATABASE_AT + page, computeNs);
  return trace.done();
}

/**
 * A clone that starts a service: `touched` pages of a generation, spread over it in runs of
 * neighbours, each computed on for `computeNs`.
 */
export function startTrace(
  pages: number,
  touched: number,
  computeNs: number,
  seed: number,
): SimTrace {
  const next = random(seed);
  const chosen: number[] = [];
  const runs = Math.ceil(touched / 8);
  const stride = pages / runs;
  for (let i = 0; i < runs; i++) {
    const first = Math.floor(i * stride + next() * (stride - 8));
    for (let j = 0; j < 8 && chosen.length < touched; j++) chosen.push(first + j);
  }
  const order = scattered(0, chosen.length, next).map((index) => chosen[index] ?? 0);
  return {
    pages: Uint32Array.from(order),
    computeNs: new Uint32Array(order.length).fill(computeNs),
  };
}

/** Percentile (0 to 1) of the values, those that never came counted as infinite. */
export function quantile(values: Float64Array, share: number): number {
  const sorted = Float64Array.from(values).sort();
  return (
    sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))] ??
    Number.NaN
  );
}

/** What a series of measurements says. Times in the unit they were given in. */
export interface Summary {
  readonly count: number;
  readonly median: number;
  readonly min: number;
  readonly max: number;
  readonly p95: number;
  readonly mean: number;
}

/** @throws {RangeError} for an empty series or one with values that are no numbers. */
export function summarize(values: readonly number[]): Summary {
  if (values.length === 0) throw new RangeError('no measurements');
  if (!values.every(Number.isFinite)) throw new RangeError('a measurement is not a number');
  const sorted = [...values].sort((a, b) => a - b);
  return {
    count: sorted.length,
    median: quantile(sorted, 0.5),
    min: quantile(sorted, 0),
    max: quantile(sorted, 1),
    p95: quantile(sorted, 0.95),
    mean: sorted.reduce((sum, value) => sum + value, 0) / sorted.length,
  };
}

/** Linear between neighbours (type 7 of Hyndman and Fan); `sorted` ascending and not empty. */
export function quantile(sorted: readonly number[], q: number): number {
  const at = (sorted.length - 1) * q;
  const below = sorted[Math.floor(at)] ?? Number.NaN;
  const above = sorted[Math.ceil(at)] ?? Number.NaN;
  return below + (above - below) * (at - Math.floor(at));
}

/** Runs `work` so many times and times each, in milliseconds. */
export async function timeEach(runs: number, work: (run: number) => Promise<void> | void) {
  const values: number[] = [];
  for (let run = 0; run < runs; run++) {
    const start = performance.now();
    await work(run);
    values.push(performance.now() - start);
  }
  return values;
}

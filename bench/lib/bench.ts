import { SnowflockError } from '../../src/common/errors.js';
import type { Table } from './table.js';

/** What a bench is run with. */
export interface BenchContext {
  /** Fewer runs and smaller sizes: to see that it works, not to quote. */
  readonly quick: boolean;
  /** Says what is going on, on stderr: stdout is for the tables. */
  log(line: string): void;
  /** From `--set NAME=VALUE`; only names the bench has {@link Bench.settings} for. */
  readonly settings: ReadonlyMap<string, string>;
  /** Aborted on Ctrl-C: end what was started. */
  readonly signal: AbortSignal;
}

export interface BenchResult {
  readonly tables: readonly Table[];
  /** The figures behind the tables, names with their unit last; anything JSON holds. */
  readonly figures: Readonly<Record<string, unknown>>;
  /** What a reader must know to judge the figures. */
  readonly notes?: readonly string[];
}

/** The default export of `bench/NAME.ts`. */
export interface Bench {
  /** The file's name without its extension. */
  readonly name: string;
  /** One line: what is measured, against what. */
  readonly description: string;
  /** What `--set` may name, each with its default and what it means. */
  readonly settings?: Readonly<Record<string, string>>;
  run(context: BenchContext): Promise<BenchResult>;
}

/** A setting of numbers parted by commas. @throws E_ARGUMENT unless all are in `least` to `most` */
export function numbers(
  settings: ReadonlyMap<string, string>,
  name: string,
  missing: readonly number[],
  least: number,
  most: number,
): number[] {
  const text = settings.get(name);
  if (text === undefined) return [...missing];
  const values = text.split(',').map((part) => (part.trim() === '' ? Number.NaN : Number(part)));
  if (!values.every((value) => Number.isInteger(value) && value >= least && value <= most)) {
    throw new SnowflockError('E_ARGUMENT', `${name}=${text}: whole numbers, ${least} to ${most}`);
  }
  return values;
}

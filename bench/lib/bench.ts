import type { Table } from './table.js';

/** What a bench is run with. */
export interface BenchContext {
  /** Fewer runs and smaller sizes: to see that it works, not to quote. */
  readonly quick: boolean;
  /** Says what is going on, on stderr: stdout is for the tables. */
  log(line: string): void;
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
  run(context: BenchContext): Promise<BenchResult>;
}

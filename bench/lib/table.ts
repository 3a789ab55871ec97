import type { Summary } from './stats.js';

/** A table as printed and as written to JSON. */
export interface Table {
  readonly title: string;
  readonly columns: readonly string[];
  /** Text is left-aligned, numbers right. */
  readonly rows: readonly (readonly (string | number)[])[];
}

/** A number as people read it: three significant digits, thousands parted. */
export function figure(value: number): string {
  if (!Number.isFinite(value)) return '–';
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  const [whole = '', fraction] = value.toFixed(digits).split('.');
  const parted = whole.replace(/\B(?=(\d{3})+$)/g, ' ');
  return fraction === undefined ? parted : `${parted}.${fraction}`;
}

/** `median (min–max)`. */
export function spread(summary: Summary): string {
  return `${figure(summary.median)} (${figure(summary.min)}–${figure(summary.max)})`;
}

/** How many times `of` is what `value` is, e.g. `3.1×`; what is compared to itself is `1×`. */
export function ratio(value: number, of: number): string {
  if (of === 0 || !Number.isFinite(value / of)) return '–';
  return value === of ? '1×' : `${figure(value / of)}×`;
}

export function formatTable(table: Table): string {
  const cells = table.rows.map((row) =>
    row.map((cell) => (typeof cell === 'number' ? figure(cell) : cell)),
  );
  const widths = table.columns.map((column, at) =>
    Math.max(width(column), ...cells.map((row) => width(row[at] ?? ''))),
  );
  // A column is numbers if no cell of it starts with a letter.
  const right = table.columns.map((_, at) => cells.every((row) => !/^\p{L}/u.test(row[at] ?? '')));
  const line = (row: readonly string[]): string =>
    widths
      .map((size, at) => {
        const cell = row[at] ?? '';
        const space = ' '.repeat(size - width(cell));
        return right[at] ? space + cell : cell + space;
      })
      .join('  ')
      .trimEnd();
  return [
    table.title,
    line(table.columns),
    widths.map((size) => '─'.repeat(size)).join('  '),
    ...cells.map(line),
  ].join('\n');
}

const width = (text: string): number => [...text].length;

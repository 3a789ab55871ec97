import { asSnowflockError } from '../common/errors.js';

/** Data goes to stdout, as a table for people or as JSON; all else goes to stderr. */
export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`);
}

/** Left-aligned columns; the header in capitals. Numbers are right-aligned. */
export function table(header: string[], rows: (string | number)[][]): string {
  const cells = [header.map((h) => h.toUpperCase()), ...rows.map((row) => row.map(String))];
  const widths = header.map((_, i) => Math.max(...cells.map((row) => (row[i] ?? '').length)));
  const right = header.map(
    (_, i) => rows.length > 0 && rows.every((r) => typeof r[i] === 'number'),
  );
  return cells
    .map((row) =>
      row
        .map((cell, i) =>
          right[i] === true ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0),
        )
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

export function note(text: string): void {
  process.stderr.write(`${text}\n`);
}

/** Says what went wrong and what to do, and returns the exit status. */
export function reportError(error: unknown, json: boolean): number {
  const mapped = asSnowflockError(error);
  if (json) process.stderr.write(`${JSON.stringify({ error: mapped.toJSON() })}\n`);
  else process.stderr.write(`snowflock: ${mapped.code}: ${mapped.message}\n  ${mapped.help}\n`);
  return mapped.exitStatus;
}

const UNITS: Record<string, number> = {
  '': 2 ** 20,
  k: 2 ** 10,
  m: 2 ** 20,
  g: 2 ** 30,
  t: 2 ** 40,
};

/** `512`, `512M`, `4G`: MiB where no unit is given. Undefined if it is no size. */
export function parseSize(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?$/i.exec(text.trim());
  if (match === null) return undefined;
  return Math.round(Number(match[1]) * (UNITS[(match[2] ?? '').toLowerCase()] ?? 0));
}

export function mib(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MiB`;
}

export function ms(value: number | null): string {
  return value === null ? '-' : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

/**
 * `npm run bench -- NAME [--json FILE] [--quick] [--set SETTING=VALUE]...`: runs one bench, prints its
 * tables, writes its figures. A bench is a file `bench/NAME.ts` with a {@link Bench} as its default export; without a
 * name they are listed.
 */
import { readdirSync, renameSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { asSnowflockError, SnowflockError } from '../src/common/errors.js';
import type { Bench, BenchResult } from './lib/bench.js';
import { type Machine, machine, machineLine } from './lib/machine.js';
import { formatTable } from './lib/table.js';

const folder = dirname(fileURLToPath(import.meta.url));

function names(): string[] {
  return readdirSync(folder)
    .filter((file) => file.endsWith('.js') && file !== 'main.js')
    .map((file) => file.slice(0, -'.js'.length))
    .sort();
}

async function load(name: string): Promise<Bench> {
  if (!names().includes(name)) {
    throw new SnowflockError('E_ARGUMENT', `no bench ${name}; there are: ${names().join(', ')}`);
  }
  const module: unknown = await import(pathToFileURL(join(folder, `${name}.js`)).href);
  const { default: bench } = module as { default?: Bench };
  if (bench?.name !== name) {
    throw new SnowflockError('E_INTERNAL', `bench/${name}.ts does not export a bench ${name}`);
  }
  return bench;
}

function settingsOf(bench: Bench, given: readonly string[]): Map<string, string> {
  const settings = new Map<string, string>();
  for (const each of given) {
    const [, name = '', value = ''] = /^([^=]+)=(.*)$/.exec(each) ?? [];
    if (!Object.hasOwn(bench.settings ?? {}, name)) {
      const known = Object.keys(bench.settings ?? {}).join(', ') || 'none';
      throw new SnowflockError('E_ARGUMENT', `--set ${each}: ${bench.name} has settings: ${known}`);
    }
    settings.set(name, value);
  }
  return settings;
}

function writeJson(file: string, value: object): void {
  try {
    writeFileSync(`${file}.making`, `${JSON.stringify(value, null, 2)}\n`);
    renameSync(`${file}.making`, file);
  } catch (error) {
    throw new SnowflockError('E_IO', `cannot write ${file}: ${String(error)}`, { cause: error });
  }
}

function print(of: Machine, bench: Bench, quick: boolean, result: BenchResult): void {
  const parts = [
    `${bench.name}: ${bench.description}${quick ? ' (quick: not to be quoted)' : ''}`,
    machineLine(of),
    ...result.tables.map((table) => `\n${formatTable(table)}`),
    ...(result.notes?.length ? ['', ...result.notes.map((note) => `- ${note}`)] : []),
  ];
  process.stdout.write(`${parts.join('\n')}\n`);
}

async function main(argv: string[]): Promise<void> {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(argv);
  } catch (error) {
    throw new SnowflockError('E_ARGUMENT', error instanceof Error ? error.message : String(error));
  }
  const { values, positionals } = parsed;
  const [name, ...rest] = positionals;
  if (rest.length > 0) throw new SnowflockError('E_ARGUMENT', `one bench at a time: ${rest[0]}?`);
  if (name === undefined) {
    process.stdout.write('npm run bench -- NAME [--json FILE] [--quick] [--set NAME=VALUE]...\n\n');
    for (const each of names()) {
      const { description, settings } = await load(each);
      process.stdout.write(`  ${each.padEnd(12)} ${description}\n`);
      for (const [setting, what] of Object.entries(settings ?? {})) {
        process.stdout.write(`  ${''.padEnd(14)} ${setting}: ${what}\n`);
      }
    }
    return;
  }
  const bench = await load(name);
  const quick = values.quick ?? false;
  const settings = settingsOf(bench, values.set ?? []);
  const before = machine();
  const abort = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => abort.abort());
  const startedAt = new Date().toISOString();
  const start = performance.now();
  const result = await bench.run({
    quick,
    settings,
    signal: abort.signal,
    log: (line) => process.stderr.write(`${line}\n`),
  });
  if (abort.signal.aborted) throw new SnowflockError('E_INTERRUPTED', `bench ${name}`);
  print(before, bench, quick, result);
  if (values.json !== undefined) {
    writeJson(values.json, {
      bench: bench.name,
      description: bench.description,
      quick,
      settings: Object.fromEntries(settings),
      started_at: startedAt,
      duration_ms: Math.round(performance.now() - start),
      machine: before,
      figures: result.figures,
      tables: result.tables,
      notes: result.notes ?? [],
    });
  }
}

function parse(argv: string[]) {
  return parseArgs({
    args: argv,
    allowPositionals: true,
    options: {
      json: { type: 'string' },
      quick: { type: 'boolean' },
      set: { type: 'string', multiple: true },
    },
  });
}

try {
  await main(process.argv.slice(2));
} catch (error) {
  const known = asSnowflockError(error);
  process.stderr.write(`${known.code}: ${known.message}\n${known.help}\n`);
  if (known.code === 'E_INTERNAL' && error instanceof Error)
    process.stderr.write(`${error.stack}\n`);
  process.exitCode = known.exitStatus;
}

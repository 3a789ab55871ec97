/**
 * A testbed's record: what it made, so that another process can remove it if the maker was
 * killed. It is written before anything is made and removed last, so at every instant it names all
 * there is (and perhaps things not made yet or removed already).
 */
import {
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import Type, { type Static } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';

/** Where the records of this machine's testbeds are. */
export const RECORDS_DIR = '/run/snowflock-testbeds';

const Process = Type.Object({
  pid: Type.Integer({ minimum: 2 }),
  startTicks: Type.Integer({ minimum: 0 }),
});

// Removal follows this file as root: names and folders must be of the shapes create() makes.
const Record = Type.Object({
  version: Type.Literal(1),
  name: Type.String({ pattern: '^[a-z0-9]{1,12}$' }),
  owner: Process,
  netns: Type.Array(Type.String({ pattern: '^sf-[a-z0-9]{1,12}-(br|h[0-9]{1,3})$' })),
  dirs: Type.Array(Type.String({ pattern: '^/[^\\0]*/sf-[a-z0-9]{1,12}$' })),
  processes: Type.Array(Process),
  /** It outlives its maker on purpose: reap() leaves it alone. */
  kept: Type.Optional(Type.Boolean()),
});
export type TestbedRecord = Static<typeof Record>;

const fileOf = (name: string): string => join(RECORDS_DIR, `${name}.json`);

/** @throws {SnowflockError} `E_EXISTS` if it must be new and is not, `E_IO`. */
export function writeRecord(record: TestbedRecord, mustBeNew = false): void {
  const file = fileOf(record.name);
  const making = `${file}.${process.pid}.making`;
  try {
    mkdirSync(RECORDS_DIR, { recursive: true, mode: 0o700 });
    writeFileSync(making, `${JSON.stringify(record, null, 2)}\n`, { mode: 0o600 });
    if (mustBeNew) {
      linkSync(making, file);
      rmSync(making);
    } else {
      renameSync(making, file);
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') {
      rmSync(making, { force: true });
      throw new SnowflockError('E_EXISTS', `there is a testbed ${record.name} already`);
    }
    throw new SnowflockError('E_IO', `cannot write ${file}: ${String(error)}`, { cause: error });
  }
}

export function removeRecord(name: string): void {
  rmSync(fileOf(name), { force: true });
}

/** Names of all records on this machine. */
export function recordNames(): string[] {
  try {
    return readdirSync(RECORDS_DIR)
      .filter((file) => file.endsWith('.json'))
      .map((file) => file.slice(0, -'.json'.length));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

/** @throws {SnowflockError} `E_CORRUPT` when the file is not a record; undefined: it is gone. */
export function readRecord(name: string): TestbedRecord | undefined {
  const file = fileOf(name);
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new SnowflockError('E_CORRUPT', `${file} is not JSON`);
  }
  if (!Value.Check(Record, value) || value.name !== name) {
    throw new SnowflockError('E_CORRUPT', `${file} is not the record of a testbed`);
  }
  const { prefix } = namesOf(name);
  const own =
    value.netns.every((netns) => netns.startsWith(`${prefix}-`)) &&
    value.dirs.every((dir) => dir.endsWith(`/${prefix}`));
  if (!own) throw new SnowflockError('E_CORRUPT', `${file} names what is not its own`);
  return value;
}

/** What a testbed of this name calls its namespaces (prefix of) and folders. */
export function namesOf(name: string): { prefix: string } {
  return { prefix: `sf-${name}` };
}

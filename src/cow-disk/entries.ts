import { type Static, type TSchema, Type } from 'typebox';
import { Compile } from 'typebox/compile';
import { SnowflockError } from '../common/errors.js';

/** What store.journal holds: docs/disk-format.md, "store.journal". */
export const ID = /^[0-9a-f]{32}$/;
/** Of a disk or a generation. A generation's name must not look like an id besides. */
export const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$/;

/** Of the journal; maps have their own. */
export const VERSION = 3;
export const MAX_DISKS = 4096;
/** Of one store; about 1 KiB of memory each. */
export const MAX_GENERATIONS = 262_144;
export const MAX_SLICES = MAX_DISKS + 2 * MAX_GENERATIONS;
export const MAX_SIZE_BYTES = 2 ** 46;

const strict = { additionalProperties: false };
const Id = Type.String({ pattern: ID.source });
const Name = Type.String({ pattern: NAME.source });
const Milliseconds = Type.Integer({ minimum: 0 });

const Base = Type.Union([
  Type.Object({ kind: Type.Literal('none') }, strict),
  Type.Object(
    {
      kind: Type.Literal('image'),
      path: Type.String({ minLength: 1, maxLength: 4096 }),
      image_bytes: Type.Integer({ minimum: 0, maximum: MAX_SIZE_BYTES }),
    },
    strict,
  ),
  Type.Object({ kind: Type.Literal('replica'), generation: Id }, strict),
]);

const SliceEntry = Type.Object(
  {
    parent: Type.Union([Id, Type.Null()]),
    /** If and only if `parent` is null. */
    base: Type.Optional(Base),
    size_bytes: Type.Integer({ minimum: 1, maximum: MAX_SIZE_BYTES }),
    map: Type.Integer({ minimum: 0, maximum: 0xffff_ffff }),
  },
  strict,
);

const GenerationEntry = Type.Object(
  {
    slice: Id,
    disk: Name,
    name: Type.Union([Name, Type.Null()]),
    created_ms: Milliseconds,
  },
  strict,
);

const DiskEntry = Type.Object(
  { top: Id, spare: Type.Union([Id, Type.Null()]), created_ms: Milliseconds },
  strict,
);

const members = <Entry extends TSchema>(pattern: RegExp, entry: Entry) =>
  Type.Optional(
    Type.Record(Type.String({ pattern: pattern.source }), Type.Union([entry, Type.Null()]), strict),
  );

const Transaction = Type.Object(
  {
    slices: members(ID, SliceEntry),
    generations: members(ID, GenerationEntry),
    disks: members(NAME, DiskEntry),
    removed: members(ID, Type.Literal(true)),
  },
  strict,
);

const Header = Type.Object(
  {
    format: Type.Literal('snowflock-store'),
    version: Type.Literal(VERSION),
    page_bytes: Type.Literal(4096),
    id: Id,
  },
  strict,
);

export type BaseEntry = Static<typeof Base>;
export type SliceEntry = Static<typeof SliceEntry>;
export type GenerationRecord = Static<typeof GenerationEntry>;
export type DiskRecord = Static<typeof DiskEntry>;
/** Members set an entry, null removes it. Applied whole or not at all. */
export interface Transaction {
  slices?: Record<string, SliceEntry | null>;
  generations?: Record<string, GenerationRecord | null>;
  disks?: Record<string, DiskRecord | null>;
  /** Slices not named any more whose files are being removed; null: they are gone. */
  removed?: Record<string, true | null>;
}
export type Header = Static<typeof Header>;

const transactions = Compile(Transaction);
const headers = Compile(Header);

/** Undefined if it fits, else where and why not. */
function misfit(schema: typeof transactions | typeof headers, value: unknown): string | undefined {
  if (schema.Check(value)) return undefined;
  const first = [...schema.Errors(value)][0];
  return `${first?.instancePath ?? ''} ${first?.message ?? 'is not known'}`.trim();
}
export const transactionMisfit = (value: unknown) => misfit(transactions, value);
export function headerMisfit(value: unknown): string | undefined {
  const { version } = (value ?? {}) as { version?: unknown };
  if (typeof version === 'number' && version !== VERSION) {
    return `the store is of version ${version}, and this program reads version ${VERSION}`;
  }
  return misfit(headers, value);
}

/** E_ARGUMENT unless `name` can be the name of a disk. */
export function checkDiskName(name: string): void {
  if (NAME.test(name)) return;
  throw new SnowflockError(
    'E_ARGUMENT',
    `disk name ${JSON.stringify(name.slice(0, 80))} is not 1 to 64 letters, digits, '.', '_', '-' that begin with none of '.', '-'`,
  );
}

/** E_ARGUMENT unless `name` can be the name of a generation. */
export function checkGenerationName(name: string): void {
  if (NAME.test(name) && !ID.test(name)) return;
  throw new SnowflockError(
    'E_ARGUMENT',
    `generation name ${JSON.stringify(name.slice(0, 80))} is not 1 to 64 letters, digits, '.', '_', '-' that begin with none of '.', '-', or looks like an id`,
  );
}

/** E_ARGUMENT unless `id` is 32 lower-case hex digits. */
export function checkGenerationId(id: string): void {
  if (ID.test(id)) return;
  throw new SnowflockError('E_ARGUMENT', `generation ${id.slice(0, 80)} is not 32 hex digits`);
}

/**
 * What can be asked of the process that serves a store, over `STORE/store.sock`: the calls of
 * StoreApi, and two that last as long as the connection (imports and views), so that a caller that
 * dies leaves nothing half made.
 */
import { type Static, type TSchema, Type } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import { Source } from '../disk-server/source-file.js';
import type {
  DiskEntry,
  GenerationEntry,
  StoreApi,
  StoreListing,
  StoreTask,
  StoreUsage,
} from './store-api.js';

/** Longest call: names and a path. */
export const CONTROL_CALL_BYTES = 64 * 1024;
/** Longest answer: a listing of as many generations as a store can have. */
export const CONTROL_ANSWER_BYTES = 128 * 1024 * 1024;
export const CONTROL_CONNECTIONS = 64;
export const CONTROL_CALLS = 32;

/** Where the pages of a disk or generation can be read or written by NBD. */
export interface NbdPlace {
  socket: string;
  export_name: string;
  size_bytes: number;
}

/** A disk that nobody sees before it is whole. */
export interface ImportTarget extends NbdPlace {
  /** Makes everything durable and gives the disk its name. E_EXISTS. */
  finish(): Promise<DiskEntry>;
  /** Removes it; does nothing after `finish`. */
  abandon(): Promise<void>;
}

/** A generation that can be read until `close`. */
export interface OpenView extends NbdPlace {
  close(): Promise<void>;
}

/** A store, whoever has it open. */
export interface StoreService extends StoreApi {
  readonly directory: string;
  /**
   * A new disk over a generation that another host publishes; nothing is fetched. The source stays in
   * the store. E_EXISTS, E_REPLICA_MISMATCH.
   */
  cloneFromSource(p: { name: string; source: Source }): Promise<DiskEntry>;
  /** E_EXISTS if there is a disk `name`, E_ARGUMENT. */
  beginImport(p: { name: string; size_bytes: number }): Promise<ImportTarget>;
  /** `generation` null: what the disk holds now, sealed for as long as the view is open. */
  openView(p: { disk: string; generation: string | null }): Promise<OpenView>;
  close(): Promise<void>;
}

const strict = { additionalProperties: false };
const Name = Type.String({ pattern: '^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$' });
const Bytes = Type.Integer({ minimum: 1, maximum: 2 ** 46 });
const Base = Type.Union([
  Type.Object({ kind: Type.Literal('none') }, strict),
  Type.Object(
    { kind: Type.Literal('image'), path: Type.String({ minLength: 1, maxLength: 4096 }) },
    strict,
  ),
  Type.Object(
    { kind: Type.Literal('replica'), generation: Type.String({ pattern: '^[0-9a-f]{32}$' }) },
    strict,
  ),
]);

const params = {
  hello: Type.Object({}, strict),
  createDisk: Type.Object({ name: Name, size_bytes: Bytes, base: Type.Optional(Base) }, strict),
  cloneFromSource: Type.Object({ name: Name, source: Source }, strict),
  clone: Type.Object({ disk: Name, generation: Name, name: Name }, strict),
  snapshot: Type.Object({ disk: Name, name: Type.Optional(Name) }, strict),
  removeGeneration: Type.Object({ disk: Name, generation: Name }, strict),
  removeDisk: Type.Object({ disk: Name }, strict),
  rollback: Type.Object({ disk: Name, generation: Name }, strict),
  flatten: Type.Object({ disk: Name, rate_bytes_per_s: Type.Optional(Bytes) }, strict),
  commit: Type.Object({ disk: Name, discard: Type.Optional(Type.Boolean()) }, strict),
  list: Type.Object({}, strict),
  usage: Type.Object({}, strict),
  tasks: Type.Object({}, strict),
  settled: Type.Object({}, strict),
  beginImport: Type.Object({ name: Name, size_bytes: Bytes }, strict),
  finishImport: Type.Object({ handle: Type.Integer() }, strict),
  abandonImport: Type.Object({ handle: Type.Integer() }, strict),
  openView: Type.Object({ disk: Name, generation: Type.Union([Name, Type.Null()]) }, strict),
  closeView: Type.Object({ handle: Type.Integer() }, strict),
} satisfies Record<string, TSchema>;

interface Results {
  hello: { pid: number; directory: string };
  createDisk: DiskEntry;
  cloneFromSource: DiskEntry;
  clone: DiskEntry;
  snapshot: GenerationEntry;
  removeGeneration: Record<string, never>;
  removeDisk: Record<string, never>;
  rollback: Record<string, never>;
  flatten: Record<string, never>;
  commit: { origin: string };
  list: StoreListing;
  usage: StoreUsage;
  tasks: StoreTask[];
  settled: Record<string, never>;
  beginImport: NbdPlace & { handle: number };
  finishImport: DiskEntry;
  abandonImport: Record<string, never>;
  openView: NbdPlace & { handle: number };
  closeView: Record<string, never>;
}

export type ControlMethods = {
  [K in keyof Results]: { params: Static<(typeof params)[K]>; result: Results[K] };
};

/** E_ARGUMENT, naming the member, unless the parameters of a call are what they must be. */
export function checkControlCall(method: string, value: unknown): void {
  const schema = (params as Record<string, TSchema>)[method];
  if (schema === undefined || Value.Check(schema, value)) return;
  const [first] = Value.Errors(schema, value);
  throw new SnowflockError(
    'E_ARGUMENT',
    `${method}: ${first?.instancePath || 'its parameters'} ${first?.message ?? 'do not fit'}`,
  );
}

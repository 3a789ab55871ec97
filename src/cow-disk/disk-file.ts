import { createHash } from 'node:crypto';
import { open, readFile, rename } from 'node:fs/promises';
import { join } from 'node:path';
import { type Static, Type } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';

/** disk.json: the order of a disk's slices, their generations and what lies below them. */
const Id = Type.String({ pattern: '^[0-9a-f]{32}$' });

const Base = Type.Union([
  Type.Object({ kind: Type.Literal('none') }, { additionalProperties: false }),
  Type.Object(
    {
      kind: Type.Literal('image'),
      path: Type.String({ minLength: 1 }),
      image_bytes: Type.Integer({ minimum: 0 }),
    },
    { additionalProperties: false },
  ),
  Type.Object({ kind: Type.Literal('replica'), generation: Id }, { additionalProperties: false }),
]);

const SliceEntry = Type.Object(
  {
    id: Id,
    /** The generation this slice was sealed as; the last slice, the top, has none. */
    generation: Type.Optional(Id),
    /** Nobody wants the generation any more; the slice stays, others may need its pages. */
    dropped: Type.Optional(Type.Literal(true)),
  },
  { additionalProperties: false },
);

const DiskFile = Type.Object(
  {
    format: Type.Literal('snowflock-disk'),
    version: Type.Literal(1),
    page_bytes: Type.Literal(4096),
    size_bytes: Type.Integer({ minimum: 4096, maximum: 2 ** 46, multipleOf: 4096 }),
    base: Base,
    slices: Type.Array(SliceEntry, { minItems: 1, maxItems: 65534 }),
    spare: Type.Union([Id, Type.Null()]),
  },
  { additionalProperties: false },
);

export type DiskFile = Static<typeof DiskFile>;
export type SliceEntry = Static<typeof SliceEntry>;

const NAME = 'disk.json';

function checksum(body: DiskFile): string {
  return createHash('sha256').update(JSON.stringify(body)).digest('hex');
}

/** E_NOT_FOUND if there is no disk, E_CORRUPT if the file is not what a disk wrote. */
export async function readDiskFile(directory: string): Promise<DiskFile> {
  const path = join(directory, NAME);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ENOTDIR') {
      throw new SnowflockError('E_NOT_FOUND', `no disk in ${directory}`, { cause: error });
    }
    throw new SnowflockError('E_IO', `cannot read ${path}: ${code}`, { cause: error });
  }
  const corrupt = (what: string, cause?: unknown) =>
    new SnowflockError('E_CORRUPT', `${path} ${what}`, { cause });
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    throw corrupt('is not JSON', error);
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed)) {
    throw corrupt('is not an object');
  }
  const { checksum: stored, ...body } = parsed as Record<string, unknown>;
  if (!Value.Check(DiskFile, body)) {
    const first = [...Value.Errors(DiskFile, body)][0];
    throw corrupt(`does not fit its schema: ${first?.instancePath} ${first?.message}`);
  }
  if (stored !== checksum(body)) throw corrupt('fails its checksum');
  const ids = body.slices.map((slice) => slice.id);
  if (body.spare !== null) ids.push(body.spare);
  const generations = body.slices.slice(0, -1).map((slice) => slice.generation);
  if (
    new Set(ids).size !== ids.length ||
    generations.includes(undefined) ||
    new Set(generations).size !== generations.length ||
    body.slices.at(-1)?.generation !== undefined
  ) {
    throw corrupt('names a slice or generation twice, or none where one belongs');
  }
  return body;
}

/** Replaces disk.json: after a power cut it is the old one or the new one, whole. */
export async function writeDiskFile(directory: string, body: DiskFile): Promise<void> {
  const path = join(directory, NAME);
  const fresh = `${path}.new`;
  try {
    const file = await open(fresh, 'w', 0o600);
    try {
      await file.writeFile(`${JSON.stringify({ ...body, checksum: checksum(body) }, null, 1)}\n`);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(fresh, path);
    await syncFolder(directory);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    const full = code === 'ENOSPC' || code === 'EDQUOT';
    throw new SnowflockError(full ? 'E_NO_SPACE' : 'E_IO', `cannot write ${path}: ${code}`, {
      cause: error,
    });
  }
}

/** Makes the names in a folder durable. */
export async function syncFolder(directory: string): Promise<void> {
  const folder = await open(directory, 'r');
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

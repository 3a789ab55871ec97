import { stat } from 'node:fs/promises';
import { isIPv4 } from 'node:net';
import { type Static, Type } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import { readJson, writeJson } from '../common/files.js';

/**
 * A source: all that another host needs to read a generation that is published. The key is a secret:
 * whoever has it reads the generation, and can forge its pages for the others that have it.
 */
export const Source = Type.Object(
  {
    format: Type.Literal('snowflock-source'),
    version: Type.Literal(1),
    generation: Type.String({ pattern: '^[0-9a-f]{32}$' }),
    size_bytes: Type.Integer({ minimum: 1, maximum: 2 ** 46 }),
    /** Where requests go to: IPv4 and UDP port. */
    address: Type.String(),
    port: Type.Integer({ minimum: 1, maximum: 65535 }),
    /** Where pages come by: IPv4 multicast and UDP port. */
    group: Type.String(),
    group_port: Type.Integer({ minimum: 1, maximum: 65535 }),
    /** 32 bytes, hexadecimal. */
    key: Type.String({ pattern: '^[0-9a-f]{64}$' }),
  },
  { additionalProperties: false },
);
export type Source = Static<typeof Source>;

/** Checks what was parsed; `name` is named in errors. @throws E_CONFIG */
export function checkSource(value: unknown, name: string): Source {
  if (!Value.Check(Source, value)) {
    const fault = [...Value.Errors(Source, value)][0];
    const where = fault?.instancePath === '' ? '' : ` ${fault?.instancePath}:`;
    throw new SnowflockError('E_CONFIG', `${name} is no source:${where} ${fault?.message}`);
  }
  if (!isIPv4(value.address)) {
    throw new SnowflockError('E_CONFIG', `${name}: /address: ${value.address} is no IPv4 address`);
  }
  const first = Number(value.group.split('.')[0]);
  if (!isIPv4(value.group) || first < 224 || first > 239) {
    throw new SnowflockError('E_CONFIG', `${name}: /group: ${value.group} is no multicast address`);
  }
  return value;
}

/**
 * @throws E_NOT_FOUND, E_IO, E_CONFIG (not a source, another version, or readable by others than its
 * owner: it holds a key)
 */
export async function readSourceFile(path: string): Promise<Source> {
  let value: unknown;
  try {
    value = await readJson(path);
  } catch (error) {
    if (!(error instanceof SnowflockError) || error.code !== 'E_CORRUPT') throw error;
    throw new SnowflockError('E_CONFIG', error.message, { cause: error });
  }
  if (value === undefined) throw new SnowflockError('E_NOT_FOUND', `there is no file ${path}`);
  const { mode } = await stat(path);
  if ((mode & 0o077) !== 0) {
    throw new SnowflockError(
      'E_CONFIG',
      `${path} holds a key and others than its owner may use it; chmod 600 it`,
    );
  }
  return checkSource(value, path);
}

/** Writes it in one step, mode 0600. @throws E_IO */
export async function writeSourceFile(path: string, source: Source): Promise<void> {
  await writeJson(path, source);
}

import { randomBytes } from 'node:crypto';
import { mkdir, open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { SnowflockError } from './errors.js';

/**
 * Replaces a JSON file in one step: a reader, or a process that starts after a crash, sees the old
 * or the new contents. Not synced to the medium, for state that a power cut makes void anyway, unless
 * `durable` is set.
 */
export async function writeJson(
  path: string,
  value: unknown,
  { durable = false } = {},
): Promise<void> {
  const temporary = `${path}.${randomBytes(4).toString('hex')}.tmp`;
  try {
    await mkdir(dirname(path), { recursive: true });
    const text = `${JSON.stringify(value, null, 2)}\n`;
    await writeFile(temporary, text, { mode: 0o600, flush: durable });
    await rename(temporary, path);
    if (durable) await syncFolder(dirname(path));
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => {}); // what went wrong first is said
    throw new SnowflockError('E_IO', `cannot write ${path}: ${String(error)}`, { cause: error });
  }
}

async function syncFolder(path: string): Promise<void> {
  const folder = await open(path);
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

/** The parsed file, or undefined if there is none. Errors: E_IO, E_CORRUPT. */
export async function readJson(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined;
    throw new SnowflockError('E_IO', `cannot read ${path}: ${String(error)}`, { cause: error });
  }
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SnowflockError('E_CORRUPT', `${path} is not JSON`, { cause: error });
  }
}

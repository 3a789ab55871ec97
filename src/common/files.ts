import { randomBytes } from 'node:crypto';
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { SnowflockError } from './errors.js';

/**
 * Replaces a JSON file in one step: a reader, or a process that starts after a crash, sees the old
 * or the new contents. Not synced to the medium: for state that a power cut makes void anyway.
 */
export async function writeJson(path: string, value: unknown): Promise<void> {
  const temporary = `${path}.${randomBytes(4).toString('hex')}.tmp`;
  try {
    await mkdir(dirname(path), { recursive: true });
    await writeFile(temporary, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600 });
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw new SnowflockError('E_IO', `cannot write ${path}: ${String(error)}`, { cause: error });
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

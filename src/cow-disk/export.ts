import { link, mkdtemp, open, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import type { StoreService } from './control-protocol.js';
import { convertOut, copyRaw, type ImageFormat, nbdUri, type TransferOptions } from './transfer.js';

export interface ExportRequest extends TransferOptions {
  disk: string;
  /** Null: what the disk holds now; its snapshot lasts as long as the export. */
  generation: string | null;
  /** `-`: raw to standard output. */
  file: string;
  format: ImageFormat;
  /** Replace an existing file. */
  force?: boolean;
}

/**
 * Writes a generation into a file, holes as holes. The file is made in a folder beside it
 * (`FILE.XXXXXX.part`) and appears under its name only when it is whole and durable.
 * Errors: E_EXISTS, E_NOT_FOUND, E_NO_SPACE, E_INTERRUPTED.
 */
export async function exportDisk(
  store: StoreService,
  request: ExportRequest,
): Promise<{ size_bytes: number }> {
  const { disk, generation, format, file } = request;
  if (file === '-') {
    if (format !== 'raw') {
      throw new SnowflockError('E_ARGUMENT', `${format} cannot be written to standard output`);
    }
    if (process.stdout.isTTY) {
      throw new SnowflockError('E_ARGUMENT', 'a disk is not written to a terminal');
    }
  } else {
    await checkTarget(file, request.force === true);
  }
  const view = await store.openView({ disk, generation });
  try {
    if (file === '-') await copyRaw(nbdUri(view), '-', request);
    else {
      await writeWhole(file, request.force === true, async (part) => {
        if (format === 'raw') await copyRaw(nbdUri(view), part, request);
        else await convertOut(view, { path: part, format }, request);
        if (request.signal?.aborted) throw interrupted();
      });
    }
    return { size_bytes: view.size_bytes };
  } finally {
    await view.close();
  }
}

function interrupted(): SnowflockError {
  return new SnowflockError('E_INTERRUPTED', 'export interrupted');
}

/** Learned before a long copy, not after it. */
async function checkTarget(file: string, force: boolean): Promise<void> {
  let found: Awaited<ReturnType<typeof stat>>;
  try {
    found = await stat(file);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return;
    throw new SnowflockError('E_IO', `cannot look at ${file}: ${String(error)}`, { cause: error });
  }
  if (!found.isFile()) {
    throw new SnowflockError('E_ARGUMENT', `${file} is not a regular file; \`-\` is for pipes`);
  }
  if (!force) throw exists(file);
}

function exists(file: string): SnowflockError {
  return new SnowflockError('E_EXISTS', `${file} exists; --force replaces it`);
}

async function writeWhole(
  file: string,
  force: boolean,
  write: (part: string) => Promise<void>,
): Promise<void> {
  const path = resolve(file);
  let folder: string;
  try {
    folder = await mkdtemp(`${path}.`);
  } catch (cause) {
    throw new SnowflockError('E_IO', `cannot write beside ${file}: ${String(cause)}`, { cause });
  }
  // Under its own name: some formats write it into the file.
  const whole = `${folder}.part`;
  await rename(folder, whole);
  const part = join(whole, basename(path));
  try {
    await write(part);
    if (force) await rename(part, path);
    else await linkNew(part, path, file);
    const parent = await open(dirname(path), 'r');
    try {
      await parent.sync();
    } finally {
      await parent.close();
    }
  } finally {
    await rm(whole, { recursive: true, force: true });
  }
}

/** As rename(2), but never over a file that came meanwhile. */
async function linkNew(part: string, path: string, file: string): Promise<void> {
  try {
    await link(part, path);
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'EEXIST') throw exists(file);
    if (code !== 'EPERM' && code !== 'EOPNOTSUPP' && code !== 'ENOSYS') {
      throw new SnowflockError('E_IO', `cannot make ${file}: ${String(error)}`, { cause: error });
    }
    await rename(part, path); // a file system without hard links
  }
}

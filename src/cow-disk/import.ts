/**
 * Import: a new disk from a disk image, a folder, an archive or standard input. States: looked at ->
 * made under a name of its own -> filled through its NBD export -> named. Until the last step
 * nobody sees it; whatever ends the import before removes it.
 */
import { fstatSync, type Stats } from 'node:fs';
import { mkdtemp, realpath, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';
import type { NbdPlace, StoreService } from './control-protocol.js';
import { inspectImage } from './image-info.js';
import { makeRootFs, unpackTar } from './root-fs.js';
import type { DiskEntry } from './store-api.js';
import { convertIn, copyRaw, type ImageFormat, nbdUri, type TransferOptions } from './transfer.js';

export interface ImportRequest extends TransferOptions {
  /** A file, a folder, a block device, or `-`: raw from standard input. */
  source: string;
  name: string;
  /** Default: by what the source is. `tar`: an archive of a root file system. */
  format?: ImageFormat | 'tar';
  /** At least the source's; needed for a pipe. */
  sizeBytes?: number;
  /** The image may name files outside of its folder: backing files, extents. */
  allowBacking?: boolean;
}

/** What is to be copied, and how. */
interface Source {
  sizeBytes: number;
  copy: (to: NbdPlace) => Promise<void>;
}

/** E_EXISTS, E_ARGUMENT, E_NO_SPACE, E_INTERRUPTED. */
export async function importDisk(store: StoreService, request: ImportRequest): Promise<DiskEntry> {
  if ((await store.list()).disks.some((disk) => disk.name === request.name)) {
    throw new SnowflockError('E_EXISTS', `${store.directory} has a disk ${request.name} already`);
  }
  const scratch: string[] = [];
  try {
    const source = await look(request, async () => {
      const folder = await mkdtemp(join(tmpdir(), 'snowflock-import-'));
      scratch.push(folder);
      return folder;
    });
    const sizeBytes = request.sizeBytes ?? source.sizeBytes;
    if (sizeBytes < source.sizeBytes) {
      throw new SnowflockError(
        'E_ARGUMENT',
        `${request.source} has ${source.sizeBytes} bytes, more than the --size of ${sizeBytes}`,
      );
    }
    const target = await store.beginImport({ name: request.name, size_bytes: sizeBytes });
    try {
      await source.copy(target);
      if (request.signal?.aborted) throw new SnowflockError('E_INTERRUPTED', 'import interrupted');
      return await target.finish();
    } catch (error) {
      await target.abandon().catch(() => undefined); // the first error tells; the rest is swept
      if (asSnowflockError(error).code !== 'E_NO_SPACE') throw error;
      throw new SnowflockError(
        'E_NO_SPACE',
        `no room in ${store.directory} for what ${request.source} holds; nothing was kept of it`,
        { cause: error },
      );
    }
  } finally {
    for (const folder of scratch) await rm(folder, { recursive: true, force: true });
  }
}

async function look(request: ImportRequest, scratch: () => Promise<string>): Promise<Source> {
  if (request.source === '-') return standardInput(request);
  let path: string;
  let found: Stats;
  try {
    path = await realpath(request.source);
    found = await stat(path);
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    throw new SnowflockError(
      code === 'ENOENT' || code === 'ENOTDIR' ? 'E_NOT_FOUND' : 'E_IO',
      `${request.source} cannot be read: ${code}`,
      { cause },
    );
  }
  if (found.isDirectory()) return rootFs(request, path, await scratch());
  const archive = /\.(tar|tgz|tzst|tar\.(gz|zst|xz|bz2))$/i.test(request.source);
  if (request.format === 'tar' || (request.format === undefined && archive)) {
    const folder = await scratch();
    await unpackTar(path, join(folder, 'tree'), request.signal);
    return rootFs(request, join(folder, 'tree'), folder);
  }
  if (!found.isFile() && !found.isBlockDevice()) {
    throw new SnowflockError('E_ARGUMENT', `${request.source} is no file, folder or block device`);
  }
  return image(request, path, found);
}

async function image(request: ImportRequest, path: string, found: Stats): Promise<Source> {
  if (found.isFile() && found.size === 0) {
    throw new SnowflockError('E_ARGUMENT', `${request.source} is empty`);
  }
  const info =
    request.format === 'raw'
      ? { format: 'raw', size_bytes: await rawSize(path, found), elsewhere: [] }
      : await inspectImage(path, request.format);
  if (info.elsewhere.length > 0 && request.allowBacking !== true) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${request.source} reads other files of this host too (${info.elsewhere.join(', ')}); if you trust it, say --allow-backing`,
    );
  }
  if (info.format === 'raw') {
    return {
      sizeBytes: await rawSize(path, found),
      copy: (to) => copyRaw(path, nbdUri(to), { ...request, zeroed: true }),
    };
  }
  return {
    sizeBytes: info.size_bytes,
    copy: (to) => convertIn({ path, format: info.format }, to, request),
  };
}

async function rawSize(path: string, found: Stats): Promise<number> {
  if (found.isFile()) return found.size; // exactly: QEMU counts in sectors of 512 bytes
  const { stdout } = await run('blockdev', ['--getsize64', path]);
  return Number.parseInt(stdout, 10);
}

function standardInput(request: ImportRequest): Source {
  if (request.format !== undefined && request.format !== 'raw') {
    throw new SnowflockError('E_ARGUMENT', 'only raw can be imported from standard input');
  }
  const found = fstatSync(0);
  const sizeBytes = request.sizeBytes ?? (found.isFile() ? found.size : undefined);
  if (sizeBytes === undefined || sizeBytes === 0) {
    throw new SnowflockError('E_ARGUMENT', 'a disk from a pipe needs its --size');
  }
  return { sizeBytes, copy: (to) => copyRaw('-', nbdUri(to), { ...request, zeroed: true }) };
}

async function rootFs(request: ImportRequest, tree: string, scratch: string): Promise<Source> {
  const file = join(scratch, 'root.ext4');
  const sizeBytes = await makeRootFs({
    tree,
    file,
    ...(request.sizeBytes === undefined ? {} : { sizeBytes: request.sizeBytes }),
    ...(request.signal === undefined ? {} : { signal: request.signal }),
  });
  return { sizeBytes, copy: (to) => copyRaw(file, nbdUri(to), { ...request, zeroed: true }) };
}

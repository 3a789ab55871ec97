import { mkdir, open, stat } from 'node:fs/promises';
import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';
import { EXT4_FEATURES } from '../image/ext4.js';

const MIB = 2 ** 20;

export interface RootFs {
  /** The tree whose contents become the root of the file system. */
  tree: string;
  /** Sparse file to make. */
  file: string;
  /** Default: twice what the tree takes, and room for the journal and inodes. */
  sizeBytes?: number;
  signal?: AbortSignal;
}

/**
 * Makes an ext4 file system of a tree, as it is: owners, modes, times, links, devices, extended
 * attributes. (The images of this project are made by src/image/ext4.ts, which makes them
 * reproducible instead.) Returns its size. Errors: E_NO_SPACE if it does not fit.
 */
export async function makeRootFs(fs: RootFs): Promise<number> {
  const { tree, file, signal } = fs;
  const count = async (...options: string[]): Promise<number> => {
    const { stdout } = await run('du', ['-s', ...options, '--', tree], { signal });
    return Number.parseInt(stdout, 10);
  };
  const content = Math.max(await count('-B1'), await count('-B1', '--apparent-size'));
  const inodes = Math.ceil((await count('--inodes')) * 1.25) + 4096;
  const sizeBytes = fs.sizeBytes ?? Math.ceil((2 * content + inodes * 512) / MIB) * MIB + 128 * MIB;
  // One for each 16 KiB is what file systems usually have, and what the guest may want to add.
  const wanted = Math.max(inodes, Math.floor(sizeBytes / 16_384));
  const handle = await open(file, 'wx', 0o600);
  try {
    await handle.truncate(sizeBytes);
  } finally {
    await handle.close();
  }
  try {
    await run(
      'mke2fs',
      [
        ...['-q', '-F', '-t', 'ext4', '-b', '4096', '-I', '256', '-m', '1', '-N', `${wanted}`],
        ...['-O', EXT4_FEATURES, '-E', 'lazy_itable_init=1,lazy_journal_init=1'],
        ...['-d', tree, file],
      ],
      { env: { MKE2FS_CONFIG: '/dev/null' }, signal },
    );
  } catch (error) {
    if (
      error instanceof SnowflockError &&
      /no free|allocate|too small|too big for a/i.test(error.message)
    ) {
      throw new SnowflockError(
        'E_NO_SPACE',
        `${tree} does not fit into ${sizeBytes} bytes; say a larger --size (${error.message})`,
      );
    }
    throw error;
  }
  // mke2fs copies all but the root folder's own owner and mode.
  const { uid, gid, mode } = await stat(tree);
  const fields = [`mode 0${mode.toString(8)}`, `uid ${uid}`, `gid ${gid}`];
  const { stderr } = await run('debugfs', ['-w', '-f', '-', file], {
    input: fields.map((field) => `sif / ${field}\n`).join(''),
    signal,
  });
  const complaint = stderr.split('\n').find((text) => text !== '' && !/^debugfs \d/.test(text));
  if (complaint !== undefined) throw new SnowflockError('E_IO', `debugfs on ${file}: ${complaint}`);
  await run('e2fsck', ['-f', '-n', file], { signal });
  return sizeBytes;
}

/** Unpacks a tar archive (its compression is found by `tar`), as root: owners and devices are kept. */
export async function unpackTar(
  archive: string,
  tree: string,
  signal?: AbortSignal,
): Promise<void> {
  if (process.geteuid?.() !== 0) {
    throw new SnowflockError(
      'E_REQUIREMENT',
      `only root can keep the owners of ${archive}: use sudo or fakeroot`,
    );
  }
  await mkdir(tree, { mode: 0o755 });
  const keep = ['--numeric-owner', '--same-permissions', '--xattrs', '--xattrs-include=*'];
  await run(
    'tar',
    ['--extract', ...keep, '--file', archive, '--directory', tree, '--force-local'],
    {
      signal,
    },
  );
}

import { lstat, open, readdir, readlink, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';

export interface Ext4Options {
  /** File to make. */
  disk: string;
  /** Nominal size; the file is sparse. */
  diskBytes: number;
  /** Tree to copy in: files, folders, symbolic links. Owner root, unless `owner` says otherwise. */
  tree: string;
  /** Owner and mode of a path (absolute, in the image), where they differ from root and the tree. */
  owner?: (path: string) => { uid: number; gid: number; mode?: number } | undefined;
  /** Seconds since the epoch: the time of everything in the image. */
  timeS: number;
  /** Label, and through it the file system's uuid and hash seed. */
  label: string;
  uuid: string;
  signal?: AbortSignal | undefined;
}

/** Those that kernels of the last ten years mount. */
export const EXT4_FEATURES =
  'none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,' +
  'huge_file,dir_nlink,extra_isize,metadata_csum';

interface TreeEntry {
  path: string;
  kind: 'file' | 'folder' | 'link';
  target: string;
  mode: number;
}

async function walk(tree: string, at = ''): Promise<TreeEntry[]> {
  const entries: TreeEntry[] = [];
  for (const name of (await readdir(join(tree, at))).sort()) {
    const path = `${at}/${name}`;
    const source = join(tree, path);
    if (/["\n]/.test(path)) {
      throw new SnowflockError('E_ARGUMENT', `file name not supported in an image: ${path}`);
    }
    const stat = await lstat(source);
    const mode = stat.mode & 0o7777;
    if (stat.isDirectory()) {
      entries.push({ path, kind: 'folder', target: source, mode }, ...(await walk(tree, path)));
    } else if (stat.isSymbolicLink()) {
      entries.push({ path, kind: 'link', target: await readlink(source), mode });
    } else if (stat.isFile()) {
      entries.push({ path, kind: 'file', target: source, mode });
    } // devices and sockets are made by the guest's devtmpfs and programs
  }
  return entries;
}

/**
 * Makes an ext4 file system holding a tree, without mounting anything. Reproducible: files are
 * written in sorted order by debugfs (mke2fs -d takes readdir's order and the tree's own change
 * times), with fixed times, uuid and hash seed. Inode tables are left as holes of the new file,
 * known to be zero, so no guest spends its first minutes writing them.
 */
export async function makeExt4(options: Ext4Options): Promise<void> {
  const { disk, diskBytes, tree, timeS, uuid, signal } = options;
  const entries = await walk(tree);
  await rm(disk, { force: true });
  const file = await open(disk, 'wx');
  await file.truncate(diskBytes);
  await file.close();
  const env = {
    E2FSPROGS_FAKE_TIME: String(timeS),
    SOURCE_DATE_EPOCH: String(timeS),
    MKE2FS_CONFIG: '/dev/null',
  };
  await run(
    'mke2fs',
    [
      ...['-q', '-F', '-t', 'ext4', '-b', '4096', '-I', '256', '-m', '0', '-N', '131072'],
      ...['-J', 'size=16', '-O', EXT4_FEATURES, '-L', options.label, '-U', uuid],
      ...['-E', `hash_seed=${uuid},root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1`],
      ...['-M', '/', disk],
    ],
    { env, signal },
  );

  const commands: string[] = [];
  const time = `@${timeS.toString()}`;
  const stamp = (path: string, mode: number, type: number) => {
    const special = options.owner?.(path);
    const full = type | (special?.mode ?? mode);
    commands.push(`sif "${path}" mode 0${full.toString(8)}`);
    commands.push(
      `sif "${path}" uid ${special?.uid ?? 0}`,
      `sif "${path}" gid ${special?.gid ?? 0}`,
    );
    for (const which of ['atime', 'ctime', 'mtime', 'crtime'])
      commands.push(`sif "${path}" ${which} ${time}`);
  };
  commands.push('rmdir /lost+found');
  for (const entry of entries) {
    if (entry.kind === 'folder') commands.push(`mkdir "${entry.path}"`);
    if (entry.kind === 'link') commands.push(`symlink "${entry.path}" "${entry.target}"`);
    if (entry.kind === 'file') commands.push(`write "${entry.target}" "${entry.path}"`);
    const type = entry.kind === 'folder' ? 0o040000 : entry.kind === 'link' ? 0o120000 : 0o100000;
    stamp(entry.path, entry.kind === 'link' ? 0o777 : entry.mode, type);
  }
  stamp('/', 0o755, 0o040000);
  const { stderr } = await run('debugfs', ['-w', '-f', '-', disk], {
    env,
    signal,
    input: `${commands.join('\n')}\n`,
  });
  // debugfs exits with 0 whatever its commands do: anything beyond its banner is a failure.
  const complaints = stderr.split('\n').filter((line) => line !== '' && !/^debugfs \d/.test(line));
  if (complaints.length > 0) {
    throw new SnowflockError('E_IO', `debugfs could not fill ${disk}: ${complaints[0]}`);
  }
  await run('e2fsck', ['-f', '-n', disk], { env, signal });
}

import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';

/** A Debian package as the local apt lists know it: what `apt-get download` would fetch. */
export interface DebianPackage {
  name: string;
  file: string;
  sha256: string;
}

/** Looks packages up in apt's lists. E_REQUIREMENT with the command to run if they are not there. */
export async function findPackages(
  names: readonly string[],
  signal?: AbortSignal,
): Promise<DebianPackage[]> {
  const found: DebianPackage[] = [];
  for (const name of names) {
    const { stdout } = await run('apt-get', ['download', '--print-uris', name], { signal }).catch(
      (cause: unknown) => {
        throw new SnowflockError(
          'E_REQUIREMENT',
          `apt knows no package ${name}; run: apt-get update`,
          { cause },
        );
      },
    );
    const match = /^'[^']+' (\S+) \d+ SHA256:([0-9a-f]{64})$/m.exec(stdout);
    if (!match?.[1] || !match[2]) {
      throw new SnowflockError('E_REQUIREMENT', `apt has no hash for ${name}; run: apt-get update`);
    }
    found.push({ name, file: match[1], sha256: match[2] });
  }
  return found;
}

/** The kernel image package that Debian's `linux-image-cloud-amd64` stands for today. */
export async function cloudKernelPackage(signal?: AbortSignal): Promise<string> {
  const { stdout } = await run('apt-cache', ['depends', 'linux-image-cloud-amd64'], { signal });
  const name = /Depends: (linux-image-\S+-cloud-amd64)$/m.exec(stdout)?.[1];
  if (!name) {
    throw new SnowflockError(
      'E_REQUIREMENT',
      'apt knows no cloud kernel (linux-image-cloud-amd64); run: apt-get update',
    );
  }
  return name;
}

async function hasHash(file: string, sha256: string): Promise<boolean> {
  try {
    return (
      createHash('sha256')
        .update(await readFile(file))
        .digest('hex') === sha256
    );
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

/** Downloads a package unless `folder` has it; checked against apt's hash. Returns its path. */
export async function downloadPackage(
  wanted: DebianPackage,
  folder: string,
  log: (line: string) => void,
  signal?: AbortSignal,
): Promise<string> {
  const path = join(folder, wanted.file);
  if (await hasHash(path, wanted.sha256)) return path;
  log(`downloading ${wanted.file}`);
  await mkdir(folder, { recursive: true });
  const temp = await mkdtemp(join(folder, '.download-'));
  try {
    await run('apt-get', ['download', '-q', wanted.name], { cwd: temp, signal });
    const got = join(temp, wanted.file);
    if (!(await hasHash(got, wanted.sha256))) {
      throw new SnowflockError(
        'E_CORRUPT',
        `${wanted.file} does not have the hash apt gave for it`,
      );
    }
    await rename(got, path);
  } finally {
    await rm(temp, { recursive: true, force: true });
  }
  return path;
}

import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';
import { placeDebianTree } from './debian.js';
import { makeExt4 } from './ext4.js';
import { withLock } from './lock.js';
import {
  type BuiltImage,
  type ImageManifest,
  type ImageName,
  isImageName,
  KERNEL_CMDLINE,
  readImage,
} from './manifest.js';
import { placeInitrd, placeKernel, placeMinimalTree } from './minimal.js';
import {
  cloudKernelPackage,
  type DebianPackage,
  downloadPackage,
  findPackages,
} from './packages.js';
import { compilePrograms, compilerVersions, guestSources } from './programs.js';

/** Raised whenever the builder itself makes another image from the same inputs. */
const BUILDER_VERSION = 1;
const DISK_BYTES = 8 * 1024 ** 3;
const TIME_S = 1_700_000_000;
const LOCK_WAIT_MS = 30 * 60_000;

export interface BuildOptions {
  /** Folder for images (`NAME-VERSION/`), downloaded packages and locks. */
  cacheDir: string;
  /** Told each step, one line. */
  log?: (line: string) => void;
  /** Ends the build; nothing half made is left. Rejects with E_INTERRUPTED. */
  signal?: AbortSignal;
}

/** Builds guest images from Debian packages and this project's guest programs. */
export class ImageBuilder {
  readonly #cacheDir: string;
  readonly #log: (line: string) => void;
  readonly #signal: AbortSignal | undefined;

  constructor(options: BuildOptions) {
    this.#cacheDir = options.cacheDir;
    this.#log = options.log ?? (() => {});
    this.#signal = options.signal;
  }

  /**
   * The image, from the cache if nothing it is made from has changed. Errors: E_IMAGE_UNKNOWN (no
   * such name), E_REQUIREMENT (a tool or package list is missing; names the command), E_IN_USE,
   * E_IO, E_NO_SPACE, E_INTERRUPTED.
   */
  async build(name: string): Promise<BuiltImage> {
    if (!isImageName(name)) {
      throw new SnowflockError('E_IMAGE_UNKNOWN', `no image ${name}: minimal and debian exist`);
    }
    const kernel = await cloudKernelPackage(this.#signal);
    const packages = await findPackages([kernel, 'busybox-static'], this.#signal);
    const version = await this.#version(name, packages);
    const folder = join(this.#cacheDir, `${name}-${version}`);
    const cached = await readImage(folder).catch(() => undefined);
    if (cached) {
      this.#log(`image ${name} ${version} is up to date`);
      return cached;
    }
    return await withLock(
      join(this.#cacheDir, `.${name}.lock`),
      LOCK_WAIT_MS,
      () => this.#log(`waiting for another build of image ${name}`),
      async () =>
        (await readImage(folder).catch(() => undefined)) ??
        (await this.#make(name, version, packages, folder)),
      this.#signal,
    );
  }

  async #version(name: ImageName, packages: readonly DebianPackage[]): Promise<string> {
    const hash = createHash('sha256');
    const inputs = { BUILDER_VERSION, DISK_BYTES, TIME_S, KERNEL_CMDLINE, name, packages };
    hash.update(JSON.stringify(inputs));
    hash.update(await compilerVersions(this.#signal));
    for (const [path, content] of await guestSources()) {
      hash.update(`${path}\0${content.length}\0`).update(content);
    }
    return hash.digest('hex').slice(0, 16);
  }

  async #make(
    name: ImageName,
    version: string,
    packages: readonly DebianPackage[],
    folder: string,
  ): Promise<BuiltImage> {
    await this.#removeAbandoned(name);
    const temp = await mkdtemp(join(this.#cacheDir, `.build-${name}-`));
    const signal = this.#signal;
    try {
      const [kernelDeb, busyboxDeb] = await this.#unpack(packages, temp);
      const out = join(temp, 'out');
      const programs = join(temp, 'programs');
      const tree = join(temp, 'tree');
      for (const path of [out, programs, tree]) await mkdir(path);
      this.#log('unpacking the kernel');
      const kernelVersion = await placeKernel(kernelDeb, join(out, 'vmlinux'));
      this.#log('compiling the guest programs');
      await compilePrograms(programs, signal);
      await placeInitrd(
        kernelDeb,
        kernelVersion,
        join(programs, 'initrd'),
        join(out, 'initrd.cpio'),
      );
      if (name === 'minimal') await placeMinimalTree(busyboxDeb, programs, tree, signal);
      else await placeDebianTree(programs, tree, this.#log, TIME_S, signal);
      this.#log('writing the root disk');
      await makeExt4({
        disk: join(out, 'disk.raw'),
        diskBytes: DISK_BYTES,
        tree,
        owner: (path) => (path === '/etc/shadow' ? { uid: 0, gid: 0, mode: 0o600 } : undefined),
        timeS: TIME_S,
        label: 'snowflock',
        uuid: imageUuid(name, version),
        signal,
      });
      const manifest: ImageManifest = {
        format: 1,
        name,
        version,
        kernel: 'vmlinux',
        initrd: 'initrd.cpio',
        disk: 'disk.raw',
        disk_bytes: DISK_BYTES,
        kernel_version: kernelVersion,
        cmdline: KERNEL_CMDLINE,
        packages: packages.map((entry) => entry.file),
      };
      await writeFile(join(out, 'image.json'), `${JSON.stringify(manifest, null, 2)}\n`);
      if (signal?.aborted) throw new SnowflockError('E_INTERRUPTED', 'image build interrupted');
      await rename(out, folder);
      this.#log(`image ${name} ${version} is ready in ${folder}`);
      return await readImage(folder);
    } finally {
      await rm(temp, { recursive: true, force: true });
    }
  }

  async #unpack(packages: readonly DebianPackage[], temp: string): Promise<[string, string]> {
    const folders: string[] = [];
    for (const entry of packages) {
      const store = join(this.#cacheDir, 'packages');
      const deb = await downloadPackage(entry, store, this.#log, this.#signal);
      const to = join(temp, entry.name);
      await run('dpkg-deb', ['-x', deb, to], { signal: this.#signal });
      folders.push(to);
    }
    const [kernel, busybox] = folders;
    if (!kernel || !busybox) throw new SnowflockError('E_INTERNAL', 'packages went missing');
    return [kernel, busybox];
  }

  /** Removes what a killed build of this image left; called with the lock held. */
  async #removeAbandoned(name: ImageName): Promise<void> {
    for (const entry of await readdir(this.#cacheDir)) {
      if (!entry.startsWith(`.build-${name}-`)) continue;
      await rm(join(this.#cacheDir, entry), { recursive: true, force: true });
    }
  }
}

function imageUuid(name: string, version: string): string {
  const hex = createHash('sha256').update(`${name} ${version}`).digest('hex');
  const part = (from: number, to: number) => hex.slice(from, to);
  return `${part(0, 8)}-${part(8, 12)}-4${part(13, 16)}-8${part(17, 20)}-${part(20, 32)}`;
}

/** Builds an image, or finds it in the cache; see `ImageBuilder.build`. */
export async function buildImage(name: string, options: BuildOptions): Promise<BuiltImage> {
  return await new ImageBuilder(options).build(name);
}

/** Copies an image to another folder (holes stay holes), e.g. to hand it to another host. */
export async function copyImage(image: BuiltImage, folder: string): Promise<BuiltImage> {
  await mkdir(dirname(folder), { recursive: true });
  await run('cp', ['-a', '--sparse=always', image.folder, folder]);
  return await readImage(folder);
}

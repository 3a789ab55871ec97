import {
  chmod,
  copyFile,
  cp,
  mkdir,
  readdir,
  readFile,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { projectRoot } from '../common/native.js';
import { run } from '../common/run.js';
import { cpioArchive } from './cpio.js';
import { extractVmlinux } from './kernel.js';
import { resolveModules } from './modules.js';

/**
 * Modules the initramfs loads: what QEMU's machines with virtio-mmio and with PCI need, and the
 * socket diagnosis by which the agent ends connections of an address that is gone.
 */
const MODULES = [
  ...['virtio_mmio', 'virtio_pci', 'virtio_blk', 'virtio_net', 'virtio_console', 'virtio_rng'],
  'tcp_diag',
];

/** The kernel out of its unpacked package: version, and `vmlinux` written to `file`. */
export async function placeKernel(unpacked: string, file: string): Promise<string> {
  const name = (await readdir(join(unpacked, 'boot'))).find((entry) =>
    entry.startsWith('vmlinuz-'),
  );
  if (!name) throw new SnowflockError('E_CORRUPT', 'the kernel package holds no kernel');
  await writeFile(file, extractVmlinux(await readFile(join(unpacked, 'boot', name))));
  return name.slice('vmlinuz-'.length);
}

/** The initramfs: our init and the modules, in the order in which they load. */
export async function placeInitrd(
  unpacked: string,
  kernelVersion: string,
  init: string,
  file: string,
): Promise<void> {
  const modules = await resolveModules(join(unpacked, 'lib/modules', kernelVersion), MODULES);
  const folder = (path: string) => ({ path, mode: 0o040755 });
  const archive = cpioArchive([
    ...['dev', 'proc', 'root', 'modules'].map(folder),
    { path: 'dev/console', mode: 0o020600, device: { major: 5, minor: 1 } },
    { path: 'init', mode: 0o100755, data: await readFile(init) },
    {
      path: 'modules.list',
      mode: 0o100644,
      data: Buffer.from(modules.map((module) => `/modules/${basename(module)}\n`).join('')),
    },
    ...(await Promise.all(
      modules.map(async (module) => ({
        path: `modules/${basename(module)}`,
        mode: 0o100644,
        data: await readFile(module),
      })),
    )),
  ]);
  await writeFile(file, archive);
}

/** Our own programs and library, where both images have them. */
export async function placePrograms(programs: string, tree: string): Promise<void> {
  const put = async (name: string, to: string, mode: number) => {
    await mkdir(dirname(join(tree, to)), { recursive: true });
    await copyFile(join(programs, name), join(tree, to));
    await chmod(join(tree, to), mode);
  };
  await put('sf-agent', 'usr/sbin/sf-agent', 0o755);
  await put('sf', 'usr/bin/sf', 0o755);
  await put('libsnowflock.a', 'usr/lib/libsnowflock.a', 0o644);
  await put('libsnowflock.so.0', 'usr/lib/libsnowflock.so.0', 0o644);
  await symlink('libsnowflock.so.0', join(tree, 'usr/lib/libsnowflock.so'));
  await mkdir(join(tree, 'usr/include'), { recursive: true });
  await copyFile(
    join(projectRoot, 'bindings/c/snowflock.h'),
    join(tree, 'usr/include/snowflock.h'),
  );
  for (const example of await readdir(join(projectRoot, 'examples'))) {
    if (!example.endsWith('.c')) continue;
    const name = basename(example, '.c');
    await put(name, `usr/bin/${name}`, 0o755);
  }
}

/** Fills `tree` with the minimal root file system: busybox, our init scripts, our programs. */
export async function placeMinimalTree(
  busyboxUnpacked: string,
  programs: string,
  tree: string,
  signal?: AbortSignal,
): Promise<void> {
  for (const folder of ['bin', 'sbin', 'usr/bin', 'usr/sbin', 'etc', 'root', 'var/log', 'mnt']) {
    await mkdir(join(tree, folder), { recursive: true });
  }
  for (const folder of ['dev', 'proc', 'sys', 'run', 'tmp']) await mkdir(join(tree, folder));
  const busybox = join(busyboxUnpacked, 'bin/busybox');
  await copyFile(busybox, join(tree, 'bin/busybox'));
  await chmod(join(tree, 'bin/busybox'), 0o755);
  const { stdout } = await run(busybox, ['--list-full'], { signal });
  for (const applet of stdout.split('\n')) {
    if (!/^(usr\/)?s?bin\/[\w[.+-]+$/.test(applet) || applet === 'bin/busybox') continue;
    await symlink('/bin/busybox', join(tree, applet));
  }
  await cp(join(projectRoot, 'guest/rootfs/minimal'), tree, { recursive: true });
  await placePrograms(programs, tree);
  await copyFile(join(programs, 'sf-linkwatch'), join(tree, 'usr/sbin/sf-linkwatch'));
  await chmod(join(tree, 'usr/sbin/sf-linkwatch'), 0o755);
}

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';

export type ImageName = 'minimal' | 'debian';
export const imageNames: readonly ImageName[] = ['minimal', 'debian'];

export function isImageName(name: string): name is ImageName {
  return (imageNames as readonly string[]).includes(name);
}

/** What `image.json` in an image's folder says. File names are relative to the folder. */
export interface ImageManifest {
  format: 1;
  name: ImageName;
  /** Hash of everything the image was made from: same version, same bytes. 16 hex chars. */
  version: string;
  /** Uncompressed kernel (ELF, PVH entry), initramfs, raw ext4 root disk. */
  kernel: string;
  initrd: string;
  disk: string;
  disk_bytes: number;
  kernel_version: string;
  /** Recommended kernel command line; see `kernelCommandLine`. */
  cmdline: string;
  /** The Debian packages it holds, as file names. */
  packages: string[];
}

/** An image on this host: its manifest, and absolute paths. */
export interface BuiltImage {
  folder: string;
  manifest: ImageManifest;
  kernelPath: string;
  initrdPath: string;
  diskPath: string;
}

/**
 * The kernel command line, each word with its reason:
 * - console, quiet: output on the serial line, warnings only (each character is a VM exit);
 * - root, rw: read by the initramfs;
 * - panic=-1, reboot=t: a guest that cannot go on ends its VM at once, by triple fault, which needs
 *   no firmware; QEMU runs with -no-reboot;
 * - random.trust_cpu=on: entropy at boot without waiting (each clone is seeded by the host anyway);
 * - init_on_alloc=0: pages are not zeroed when handed out by the kernel to itself; under memory on
 *   demand that would fetch pages only to overwrite them;
 * - transparent_hugepage=never: a fork shares and copies 4 KiB pages;
 * - rcupdate.rcu_expedited=1, cryptomgr.notests: boot time under emulation;
 * - tsc=reliable, no_timer_check: an emulated machine has nothing to check its counter against; on a
 *   busy host the check would take the guest off its only good clock;
 * - i8042.noaux, i8042.nokbd, 8250.nr_uarts=1: no probing for devices that are not there;
 * - net.ifnames=0: the interface is eth0 in every image.
 */
export const KERNEL_CMDLINE = [
  'console=ttyS0 quiet root=/dev/vda rw panic=-1 reboot=t random.trust_cpu=on init_on_alloc=0',
  'transparent_hugepage=never rcupdate.rcu_expedited=1 cryptomgr.notests',
  'tsc=reliable no_timer_check',
  'i8042.noaux i8042.nokbd 8250.nr_uarts=1 net.ifnames=0',
].join(' ');

/**
 * The command line for one boot. Under TCG give `tscKhz` (src/common/tsc.ts), the host's counter
 * rate: without it the guest must calibrate against the PIT, which fails on a busy host and leaves
 * it hanging before its console is up. Under KVM the guest has kvmclock: leave it out.
 */
export function kernelCommandLine(manifest: ImageManifest, tscKhz?: number): string {
  return tscKhz === undefined ? manifest.cmdline : `${manifest.cmdline} tsc_early_khz=${tscKhz}`;
}

/** Reads an image's folder. E_IMAGE_UNKNOWN if it holds no image, E_CORRUPT if it is damaged. */
export async function readImage(folder: string): Promise<BuiltImage> {
  let text: string;
  try {
    text = await readFile(join(folder, 'image.json'), 'utf8');
  } catch (cause) {
    throw new SnowflockError('E_IMAGE_UNKNOWN', `no image in ${folder}`, { cause });
  }
  let manifest: Partial<ImageManifest>;
  try {
    manifest = JSON.parse(text) as Partial<ImageManifest>;
  } catch (cause) {
    throw new SnowflockError('E_CORRUPT', `${folder}/image.json is not JSON`, { cause });
  }
  const { kernel, initrd, disk } = manifest;
  const plain = (name: unknown): name is string =>
    typeof name === 'string' && /^[\w.-]+$/.test(name);
  if (
    manifest.format !== 1 ||
    !plain(kernel) ||
    !plain(initrd) ||
    !plain(disk) ||
    typeof manifest.cmdline !== 'string' ||
    !Number.isSafeInteger(manifest.disk_bytes)
  ) {
    throw new SnowflockError('E_CORRUPT', `${folder}/image.json is not an image manifest`);
  }
  return {
    folder,
    manifest: manifest as ImageManifest,
    kernelPath: join(folder, kernel),
    initrdPath: join(folder, initrd),
    diskPath: join(folder, disk),
  };
}

import { accessSync, existsSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { InvalidArgumentError } from 'commander';
import { SnowflockError } from '../common/errors.js';

/** Where disks are that are named without a folder. */
export function defaultStore(): string {
  return process.env.SNOWFLOCK_STORE || '/var/lib/snowflock/disks';
}

export interface DiskName {
  store: string;
  disk: string;
  /** Id or name. */
  generation: string | null;
}

const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$/;

/** `STORE/DISK[@GENERATION]`; without a `/`: in the default store. E_ARGUMENT. */
export function parseDiskName(text: string): DiskName {
  if (text.includes('/') && existsSync(join(text, 'store.journal'))) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${text} is a store; say which disk of it: ${text}/DISK`,
    );
  }
  const store = text.includes('/') ? resolve(dirname(text)) : defaultStore();
  const [disk = '', generation, ...rest] = basename(text).split('@');
  const wrong = [disk, generation ?? '_'].find((name) => !NAME.test(name));
  if (wrong !== undefined || rest.length > 0 || text.endsWith('/')) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${JSON.stringify(text)} is not STORE/DISK[@GENERATION]; names are 1 to 64 letters, digits, '.', '_', '-' and begin with none of '.', '-'`,
    );
  }
  return { store, disk, generation: generation ?? null };
}

/** As above, and must not name a generation. E_ARGUMENT. */
export function parseDisk(text: string): DiskName {
  const name = parseDiskName(text);
  if (name.generation === null) return name;
  throw new SnowflockError('E_ARGUMENT', `${text} names a generation where a disk is meant`);
}

/** As above, and must name a generation. E_ARGUMENT. */
export function parseGeneration(text: string): DiskName & { generation: string } {
  const { store, disk, generation } = parseDiskName(text);
  if (generation !== null) return { store, disk, generation };
  throw new SnowflockError('E_ARGUMENT', `${text} names no generation; say ${text}@GENERATION`);
}

/** The store that an argument names, or the disk in it. A folder with a journal is a store. */
export function parseStoreOrDisk(text: string | undefined): {
  store: string;
  disk: string | null;
  generation: string | null;
} {
  if (text === undefined) return { store: defaultStore(), disk: null, generation: null };
  if (isStore(text)) return { store: resolve(text), disk: null, generation: null };
  return parseDiskName(text);
}

/** E_IO if that cannot be found out, as by a user who may not look. */
export function isStore(path: string): boolean {
  try {
    accessSync(join(path, 'store.journal'));
    return true;
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return false;
    throw new SnowflockError('E_IO', `cannot look into ${path}: ${code}`, { cause });
  }
}

const UNITS: Record<string, number> = { b: 1, k: 2 ** 10, m: 2 ** 20, g: 2 ** 30, t: 2 ** 40 };

/** `8G`, `512M`, `512` (MiB), `1000001B` (bytes): a number of bytes. For commander's options. */
export function diskSize(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|(b))?$/i.exec(text.trim());
  const unit = (match?.[2] ?? match?.[3] ?? 'm').toLowerCase();
  const bytes = Number(match?.[1]) * (UNITS[unit] ?? Number.NaN);
  if (!Number.isSafeInteger(bytes) || bytes < 1 || bytes > 2 ** 46) {
    throw new InvalidArgumentError('must be 1 byte to 64 TiB (e.g. 8G, 512M, 1000001B).');
  }
  return bytes;
}

/** `1.5 GiB`. */
export function sizeText(bytes: number): string {
  let value = bytes;
  let unit = 'B';
  for (const next of ['KiB', 'MiB', 'GiB', 'TiB']) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(value < 10 ? 2 : 1)} ${unit}`;
}

export function timeText(ms: number): string {
  return new Date(ms).toISOString().replace('T', ' ').slice(0, 16);
}

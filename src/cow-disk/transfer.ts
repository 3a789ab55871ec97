import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { run } from '../common/run.js';
import type { NbdPlace } from './control-protocol.js';

export interface TransferOptions {
  /** Ends the copy; E_INTERRUPTED when nothing of it is left. */
  signal?: AbortSignal;
  /** How much is done, from 0 to 1. */
  progress?: (share: number) => void;
}

export const IMAGE_FORMATS = ['raw', 'qcow2', 'vmdk', 'vhdx', 'vpc', 'vdi'] as const;
export type ImageFormat = (typeof IMAGE_FORMATS)[number];

/**
 * An NBD URI (NBD's uri.md): `nbd+unix:///NAME?socket=PATH`, `nbds://HOST:PORT/NAME`, or `nbd://...`
 * without TLS.
 */
export function nbdUri(
  place: ({ socket: string } | { host: string; port: number; tls: boolean }) & {
    export_name: string;
  },
): string {
  const readable = (text: string) =>
    encodeURIComponent(text).replaceAll('%40', '@').replaceAll('%2F', '/');
  const name = readable(place.export_name);
  if ('socket' in place) return `nbd+unix:///${name}?socket=${readable(place.socket)}`;
  const host = place.host.includes(':') ? `[${place.host}]` : place.host;
  return `${place.tls ? 'nbds' : 'nbd'}://${host}:${place.port}/${name}`;
}

/** `nbdcopy`: raw pages either way, holes stay holes. `-` is standard input or output. */
export async function copyRaw(
  from: string,
  to: string,
  options: TransferOptions & { zeroed?: boolean } = {},
): Promise<void> {
  // A target that holds zeros already is not told to zero anything.
  const zeroed = options.zeroed === true ? ['--destination-is-zero'] : [];
  await transfer('nbdcopy', ['--flush', '--progress=3', ...zeroed, '--', from, to], {
    ...options,
    ...(from === '-' ? { input: 'inherit' } : {}),
    ...(to === '-' ? { stdout: 1 } : {}),
  });
}

/** `qemu-img convert` into a disk that holds zeros. */
export async function convertIn(
  from: { path: string; format: string },
  to: NbdPlace,
  options: TransferOptions,
): Promise<void> {
  const args = ['-n', '--target-is-zero', '-f', from.format, '-O', 'raw', from.path, nbdUri(to)];
  await transfer('qemu-img', ['convert', '-p', '-t', 'writeback', ...args], options);
}

/** `qemu-img convert` into a new file, synced. */
export async function convertOut(
  from: NbdPlace,
  to: { path: string; format: string },
  options: TransferOptions,
): Promise<void> {
  const args = ['-f', 'raw', '-O', to.format, nbdUri(from), to.path];
  await transfer('qemu-img', ['convert', '-p', '-t', 'writeback', ...args], options);
}

async function transfer(
  command: string,
  args: string[],
  options: TransferOptions & { input?: 'inherit'; stdout?: number },
): Promise<void> {
  try {
    await run(command, args, {
      signal: options.signal,
      ...(options.input === undefined ? {} : { input: options.input }),
      ...(options.stdout === undefined ? {} : { stdout: options.stdout }),
      onText: (_from, text) => {
        // `nbdcopy`: 42/100 a line; `qemu-img`: (42.00/100%) with carriage returns.
        const share = [...text.matchAll(/(\d+(?:\.\d+)?)\/100/g)].at(-1)?.[1];
        if (share !== undefined) options.progress?.(Number(share) / 100);
      },
    });
  } catch (error) {
    const known = asSnowflockError(error);
    if (known.code !== 'E_IO') throw known;
    if (known.message.includes('out of bounds')) {
      throw new SnowflockError('E_ARGUMENT', 'the source is longer than the size of the disk');
    }
    if (/No space left on device/.test(known.message)) {
      throw new SnowflockError('E_NO_SPACE', known.message, { cause: known });
    }
    throw known;
  }
}

/**
 * The servers that the disk bench compares, on one file system. Two sets of them:
 *
 * - *read*: disks whose pages all were written. Ours at each chain depth with its pages scattered
 *   over all slices; the peers over one raw file (the cow filter with nothing written through it),
 *   or a full qcow2.
 * - *write*: disks that a round of writes begins with, remade for each round: ours forked once more
 *   (depth 0: an empty disk), a new empty raw file, the cow filter and a new qcow2 with their data in
 *   the raw file below.
 */
import { execFile } from 'node:child_process';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { makeChain } from './chain.js';
import { NbdProcess, OwnProcess } from './nbd-process.js';

const execute = promisify(execFile);

export const DEPTHS = [0, 1, 10, 100, 1000] as const;
export const PEERS = ['nbdkit file', 'nbdkit cow 4k', 'qemu-nbd raw', 'qemu-nbd qcow2'] as const;

export const ours = (depth: number): string => `ours, depth ${depth}`;

export interface Place {
  readonly name: string;
  readonly folder: string;
  readonly size_bytes: number;
}

/** Makes all the files of the read set. The chains come from `from`, if that place has them. */
export async function makeFiles(
  place: Place,
  depths: readonly number[],
  signal: AbortSignal,
  from?: Place,
): Promise<void> {
  await mkdir(join(place.folder, 'sockets'), { recursive: true });
  for (const depth of depths) {
    signal.throwIfAborted();
    const directory = chainFolder(place, depth);
    if (from !== undefined) {
      // A closed disk is its files: making 1,000 generations syncs 10,000 times.
      await execute('cp', ['-r', '--sparse=always', chainFolder(from, depth), directory]);
      continue;
    }
    const server = await makeChain(
      {
        directory,
        socketPath: socketOf(place, 'make'),
        size_bytes: place.size_bytes,
        pages: place.size_bytes / 4096,
        depth,
        layout: 'scattered',
      },
      signal,
    );
    await server.close();
  }
  const raw = rawFile(place);
  await execute('dd', [
    'if=/dev/urandom',
    `of=${raw}`,
    'bs=1M',
    `count=${place.size_bytes / 2 ** 20}`,
  ]);
  const convert = ['convert', '-f', 'raw', '-O', 'qcow2', raw, join(place.folder, 'full.qcow2')];
  await execute('qemu-img', convert);
}

/** One server of the read set. */
export function startRead(place: Place, server: string): Promise<NbdProcess> {
  const socket = socketOf(place, 'r');
  const raw = rawFile(place);
  switch (server) {
    case 'nbdkit file':
      return nbdkit(place, socket, ['file', raw]);
    case 'nbdkit cow 4k':
      return nbdkit(place, socket, ['--filter=cow', 'file', raw, 'cow-block-size=4096']);
    case 'qemu-nbd raw':
      return qemuNbd(socket, 'raw', raw);
    case 'qemu-nbd qcow2':
      return qemuNbd(socket, 'qcow2', join(place.folder, 'full.qcow2'));
    default:
      return OwnProcess.serve(chainFolder(place, depthOf(server)), socket, place.size_bytes);
  }
}

/** One server of the write set, with nothing written yet. */
export async function startWrite(place: Place, server: string): Promise<NbdProcess> {
  const socket = socketOf(place, 'w');
  const raw = rawFile(place);
  const fresh = join(place.folder, 'fresh');
  await rm(fresh, { recursive: true, force: true });
  switch (server) {
    case 'nbdkit file':
      await execute('truncate', ['-s', String(place.size_bytes), fresh]);
      return nbdkit(place, socket, ['file', fresh]);
    case 'nbdkit cow 4k':
      return nbdkit(place, socket, ['--filter=cow', 'file', raw, 'cow-block-size=4096']);
    case 'qemu-nbd raw':
      await execute('truncate', ['-s', String(place.size_bytes), fresh]);
      return qemuNbd(socket, 'raw', fresh);
    case 'qemu-nbd qcow2':
      await execute('qemu-img', ['create', '-f', 'qcow2', '-b', raw, '-F', 'raw', fresh]);
      return qemuNbd(socket, 'qcow2', fresh);
    default: {
      const depth = depthOf(server);
      const directory = depth === 0 ? fresh : chainFolder(place, depth);
      const own = await OwnProcess.serve(directory, socket, place.size_bytes);
      if (depth > 0) await own.ask('fork 1');
      return own;
    }
  }
}

/**
 * Takes the place's files out of the page cache: written back first, then posix_fadvise DONTNEED.
 * For every server alike, and nothing else on the machine feels it.
 */
export async function evict(place: Place): Promise<void> {
  const script = [
    'import os, sys',
    'for folder, _, names in os.walk(sys.argv[1]):',
    '  for name in names:',
    '    if name.endswith((".data", "raw", ".qcow2")):',
    '      file = os.open(os.path.join(folder, name), os.O_RDONLY)',
    '      os.fdatasync(file)',
    '      os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)',
    '      os.close(file)',
  ].join('\n');
  await execute('python3', ['-c', script, place.folder]);
}

export function chainFolder(place: Place, depth: number): string {
  return join(place.folder, `chain${depth}`);
}

/** A new path each time: a server that was killed leaves its socket. */
let serial = 0;
export function socketOf(place: Place, purpose: string): string {
  return join(place.folder, 'sockets', `${purpose}${serial++}`);
}

const rawFile = (place: Place): string => join(place.folder, 'raw');
const depthOf = (server: string): number => Number(server.split(' ').at(-1));

function nbdkit(place: Place, socket: string, argv: string[]): Promise<NbdProcess> {
  // The cow filter's overlay is an unlinked file in TMPDIR.
  const env = { TMPDIR: place.folder };
  return NbdProcess.start(socket, ['nbdkit', '--foreground', '-U', socket, ...argv], env);
}

function qemuNbd(socket: string, format: string, file: string): Promise<NbdProcess> {
  const argv = ['--persistent', '--shared=8', '-f', format, '-k', socket, file];
  return NbdProcess.start(socket, ['qemu-nbd', ...argv]);
}

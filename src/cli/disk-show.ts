import type { Command } from 'commander';
import { SnowflockError } from '../common/errors.js';
import { type LineageNode, lineage, originOf } from '../cow-disk/lineage.js';
import type { DiskEntry, GenerationEntry, StoreListing } from '../cow-disk/store-api.js';
import { nbdUri } from '../cow-disk/transfer.js';
import {
  defaultStore,
  isStore,
  parseDiskName,
  parseStoreOrDisk,
  sizeText,
  timeText,
} from './disk-names.js';
import { noStore, withStore } from './disk-open.js';
import { printJson, table } from './output.js';

/** Commands that look and change nothing. */
export function addDiskShowCommands(disk: Command, json: () => boolean): void {
  disk
    .command('ls')
    .description('list disks, their generations, and below each the clones made from it')
    .argument('[store]', 'folder of the store (default: the default store)')
    .action(async (text?: string) => {
      const directory = text ?? defaultStore();
      if (!isStore(directory)) throw noStore(directory);
      const listing = await withStore(parseStoreOrDisk(text).store, (open) => open.list());
      if (json()) printJson(listing);
      else process.stdout.write(`${tree(listing)}\n`);
    });

  disk
    .command('du')
    .description('show what disks and generations take of the file system')
    .argument(
      '[what]',
      'folder of the store, STORE/DISK or STORE/DISK@GENERATION (default: the default store)',
    )
    .action(async (text?: string) => {
      const { store, disk: name, generation } = parseStoreOrDisk(text);
      const usage = await withStore(store, (open) => open.usage());
      const disks = usage.disks.filter(
        (one) => name === null || (one.name === name && generation === null),
      );
      const generations = usage.generations.filter(
        (one) =>
          name === null || (one.disk === name && [null, one.id, one.name].includes(generation)),
      );
      if (name !== null && disks.length + generations.length === 0) {
        const what = generation === null ? `disk ${name}` : `${name}@${generation}`;
        throw new SnowflockError('E_NOT_FOUND', `there is no ${what} in ${store}`);
      }
      if (json()) {
        printJson(name === null ? usage : { disks, generations });
        return;
      }
      const rows = [
        ...disks.map((one) => [one.name, one] as const),
        ...generations.map((one) => [`${one.disk}@${one.name ?? one.id}`, one] as const),
      ]
        .sort(([a], [b]) => (a < b ? -1 : 1))
        .map(([what, one]) => [
          what,
          sizeText(one.virtual_bytes),
          sizeText(one.own_bytes),
          sizeText(one.shared_bytes),
        ]);
      process.stdout.write(`${table(['name', 'virtual', 'own', 'shared'], rows)}\n`);
      if (name !== null) return;
      const waiting =
        usage.unreferenced_bytes > 0
          ? `, of which ${sizeText(usage.unreferenced_bytes)} wait to be cleaned up`
          : '';
      for (const { generation, own_bytes } of usage.replicas) {
        process.stdout.write(`replica of ${generation} ${sizeText(own_bytes)}\n`);
      }
      process.stdout.write(`total ${sizeText(usage.total_bytes)}${waiting}\n`);
    });

  disk
    .command('info')
    .description('show one disk or generation')
    .argument('<what>', 'STORE/DISK or STORE/DISK@GENERATION')
    .action(async (text: string) => {
      const { store, disk: name, generation } = parseDiskName(text);
      const listing = await withStore(store, (open) => open.list());
      const found =
        generation === null ? findDisk(listing, name) : findGeneration(listing, name, generation);
      if (json()) {
        printJson(found);
        return;
      }
      const rows = 'depth' in found ? aboutDisk(listing, found) : aboutGeneration(listing, found);
      const width = Math.max(...rows.map(([key]) => key.length)) + 2;
      process.stdout.write(
        `${rows.map(([key, value]) => `${key.padEnd(width)}${value}`).join('\n')}\n`,
      );
    });
}

function findDisk(listing: StoreListing, name: string): DiskEntry {
  const found = listing.disks.find((one) => one.name === name);
  if (found !== undefined) return found;
  throw new SnowflockError('E_NOT_FOUND', `there is no disk ${name} in ${listing.directory}`);
}

function findGeneration(listing: StoreListing, disk: string, ref: string): GenerationEntry {
  const found = listing.generations.find(
    (one) => one.disk === disk && (one.id === ref || one.name === ref),
  );
  if (found !== undefined) return found;
  throw new SnowflockError('E_NOT_FOUND', `there is no ${disk}@${ref} in ${listing.directory}`);
}

function title(one: GenerationEntry): string {
  return `${one.disk}@${one.name ?? one.id}`;
}

function aboutErrors({ errors }: DiskEntry): [string, string][] {
  if (errors === undefined) return [];
  const { io, no_space, last } = errors;
  const counts = `${io} requests failed, ${no_space} more for want of space`;
  return [['errors', last === null ? counts : `${counts}; ${last}`]];
}

function aboutDisk(listing: StoreListing, disk: DiskEntry): [string, string][] {
  const origin = originOf(listing, disk);
  const { base } = disk;
  return [
    ['disk', disk.name],
    ['store', listing.directory],
    ['size', `${sizeText(disk.size_bytes)} (${disk.size_bytes} bytes)`],
    ['created', timeText(disk.created_ms)],
    ['clone of', origin === null ? '-' : title(origin)],
    ['generations', String(listing.generations.filter((one) => one.disk === disk.name).length)],
    ['slices', String(disk.depth)],
    [
      'base',
      base.kind === 'image'
        ? `image ${base.path}`
        : base.kind === 'replica'
          ? `replica of generation ${base.generation}`
          : '-',
    ],
    ...aboutReplica(disk),
    ['open', disk.open ? 'yes' : 'no'],
    ...aboutErrors(disk),
    ...disk.exports.map((one): [string, string] => [
      'export',
      nbdUri({ socket: one.socket, export_name: one.name }),
    ]),
  ];
}

function aboutReplica({ replica }: DiskEntry): [string, string][] {
  if (replica === undefined) return [];
  const { present_bytes, size_bytes, complete, source } = replica;
  const share = Math.floor((100 * present_bytes) / size_bytes);
  const here = complete ? 'all' : `${share} % (${sizeText(present_bytes)})`;
  const state = {
    open: 'fetched on demand',
    lost: 'does not answer: absent pages are I/O errors',
    closed: 'not needed any more',
  }[source];
  return [
    ['here', here],
    ['source', state],
  ];
}

function aboutGeneration(listing: StoreListing, one: GenerationEntry): [string, string][] {
  const below = listing.generations.find((other) => other.id === one.parent);
  const clones = listing.disks.filter((disk) => originOf(listing, disk)?.id === one.id);
  return [
    ['generation', title(one)],
    ['id', one.id],
    ['store', listing.directory],
    ['size', `${sizeText(one.size_bytes)} (${one.size_bytes} bytes)`],
    ['created', timeText(one.created_ms)],
    ['lies on', below === undefined ? '-' : title(below)],
    ['clones', clones.map((disk) => disk.name).join(', ') || '-'],
  ];
}

/** The store as a tree: `├─`, `└─` as in lsblk. */
export function tree(listing: StoreListing): string {
  const rows: string[][] = [];
  const walk = (nodes: LineageNode[], indent: string, root: boolean): void => {
    nodes.forEach((node, i) => {
      const last = i === nodes.length - 1;
      const branch = root ? '' : last ? '└─' : '├─';
      const item = node.kind === 'disk' ? node.disk : node.generation;
      const name =
        node.kind === 'disk'
          ? node.disk.name
          : root
            ? title(node.generation)
            : `@${node.generation.name ?? node.generation.id}`;
      rows.push([
        `${indent}${branch}${name}`,
        sizeText(item.size_bytes),
        timeText(item.created_ms),
        node.kind === 'disk' ? (node.disk.exports.length > 0 ? 'served' : '') : '',
      ]);
      walk(node.children, root ? '' : `${indent}${last ? '  ' : '│ '}`, false);
    });
  };
  walk(lineage(listing), '', true);
  return table(['name', 'size', 'created', 'state'], rows);
}

import { stat } from 'node:fs/promises';
import { resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { SnowflockError } from '../common/errors.js';
import type { StoreService } from '../cow-disk/control-protocol.js';
import { readSourceFile } from '../disk-server/source-file.js';
import { confirm } from './confirm.js';
import { diskSize, parseDisk, parseDiskName, parseGeneration } from './disk-names.js';
import { withStore } from './disk-open.js';
import { note, printJson } from './output.js';
import { interruptible, Progress, unlessInterrupted } from './progress.js';

/** Commands that make, change and remove disks and generations. */
export function addDiskChangeCommands(disk: Command, json: () => boolean): void {
  const answer = (value: object, text: string): void => {
    if (json()) printJson(value);
    else process.stdout.write(`${text}\n`);
  };

  disk
    .command('create')
    .description('make an empty disk, or one over a raw image that is never written')
    .argument('<disk>', 'STORE/DISK; the store is made if it is missing')
    .option('--size <size>', 'MiB unless a unit is given; may be left out with --base', diskSize)
    .option('--base <image>', 'raw image that the disk lies on; it must not change')
    .action(async (text: string, o: { size?: number; base?: string }) => {
      const { store, disk: name } = parseDisk(text);
      const base = o.base === undefined ? undefined : resolve(o.base);
      if (base === undefined && o.size === undefined) {
        throw new SnowflockError('E_ARGUMENT', 'say how large the disk is: --size 8G');
      }
      const size_bytes = o.size ?? (await rawImageSize(base ?? ''));
      const made = await withStore(
        store,
        (open) =>
          open.createDisk({
            name,
            size_bytes,
            ...(base === undefined ? {} : { base: { kind: 'image', path: base } }),
          }),
        { create: true },
      );
      answer(made, made.name);
    });

  disk
    .command('snapshot')
    .description('seal what the disk holds now as a generation')
    .argument('<disk>', 'STORE/DISK')
    .option('--name <name>', 'a name for it besides its id')
    .action(async (text: string, o: { name?: string }) => {
      const { store, disk: name } = parseDisk(text);
      const made = await withStore(store, (open) =>
        open.snapshot({ disk: name, ...(o.name === undefined ? {} : { name: o.name }) }),
      );
      answer(made, `${made.disk}@${made.name ?? made.id}`);
    });

  disk
    .command('clone')
    .description('make a disk on a generation of another one, in constant time')
    .argument('<source>', 'STORE/DISK@GENERATION; without @: a snapshot is made first')
    .argument('[new]', 'name of the new disk, in the same store')
    .option(
      '--from-source <file>',
      'of a generation that another host publishes; the one argument is the new STORE/DISK',
    )
    .action(async (text: string, target: string | undefined, o: { fromSource?: string }) => {
      if (o.fromSource !== undefined) {
        if (target !== undefined) {
          throw new SnowflockError('E_ARGUMENT', 'with --from-source there is one argument');
        }
        const { store, disk: name } = parseDisk(text);
        const source = await readSourceFile(o.fromSource);
        const work = (open: StoreService) => open.cloneFromSource({ name, source });
        const made = await withStore(store, work, { create: true });
        answer(made, made.name);
        return;
      }
      if (target === undefined) {
        throw new SnowflockError('E_ARGUMENT', 'say how the new disk is called');
      }
      const from = parseDiskName(text);
      const to = target.includes('/') ? parseDisk(target) : parseDisk(`${from.store}/${target}`);
      if (to.store !== from.store) {
        throw new SnowflockError(
          'E_ARGUMENT',
          `a clone is in the store of what it is made from (${from.store}); \`disk export\` and \`disk import\` copy`,
        );
      }
      const made = await withStore(from.store, (open) => clone(open, from, to.disk));
      answer(made, made.name);
    });

  disk
    .command('rollback')
    .description('make a disk hold again what a generation of it holds; later writes are lost')
    .argument('<generation>', 'STORE/DISK@GENERATION')
    .option('--yes', 'do not ask')
    .action(async (text: string, o: { yes?: boolean }) => {
      const { store, disk: name, generation } = parseGeneration(text);
      await confirm(`Give up all that was written to ${name} since ${generation}?`, o.yes);
      await withStore(store, (open) => open.rollback({ disk: name, generation }));
      answer({ disk: name, generation }, `${name} is at ${generation}`);
    });

  disk
    .command('rm')
    .description('remove a disk with its generations, or one generation; clones keep working')
    .argument('<what>', 'STORE/DISK or STORE/DISK@GENERATION')
    .option('--yes', 'do not ask')
    .action(async (text: string, o: { yes?: boolean }) => {
      const { store, disk: name, generation } = parseDiskName(text);
      const what = generation === null ? name : `${name}@${generation}`;
      // Nobody else can use an open store: it is closed while the person thinks.
      await withStore(store, (open) => mustExist(open, name, generation));
      await confirm(
        generation === null
          ? `Remove disk ${name}, with all it holds and its generations?`
          : `Remove generation ${what}?`,
        o.yes,
      );
      await withStore(store, (open) =>
        generation === null
          ? open.removeDisk({ disk: name })
          : open.removeGeneration({ disk: name, generation }),
      );
      answer({ removed: what }, `removed ${what}`);
    });

  disk
    .command('flatten')
    .description(
      'give a disk a copy of all it reads from below, and cut it loose; works while served',
    )
    .argument('<disk>', 'STORE/DISK')
    .addOption(new Option('--rate <size>', 'copy at most this much a second').argParser(diskSize))
    .action(async (text: string, o: { rate?: number }) => {
      const { store, disk: name } = parseDisk(text);
      await withStore(store, (open) =>
        interruptible((signal) =>
          watched(
            open,
            `flatten ${name}`,
            open.flatten({
              disk: name,
              ...(o.rate === undefined ? {} : { rate_bytes_per_s: o.rate }),
              signal,
            }),
            signal,
            (task) => task.kind === 'flatten' && task.disk === name,
          ),
        ),
      );
      answer({ disk: name }, `${name} lies on nothing any more`);
    });

  disk
    .command('commit')
    .description('give the disk a clone was made from what the clone holds, and remove the clone')
    .argument('<clone>', 'STORE/DISK')
    .option('--discard', 'also if the origin was written since: give that up')
    .option('--yes', 'do not ask')
    .action(async (text: string, o: { discard?: boolean; yes?: boolean }) => {
      const { store, disk: name } = parseDisk(text);
      const lost = o.discard === true ? ', and give up what its origin has got since' : '';
      await confirm(`Commit ${name}${lost}?`, o.yes);
      const { origin } = await withStore(store, (open) =>
        open.commit({ disk: name, ...(o.discard === undefined ? {} : { discard: o.discard }) }),
      );
      answer({ origin, removed: name }, `${origin} holds what ${name} held`);
    });
}

async function rawImageSize(path: string): Promise<number> {
  try {
    return (await stat(path)).size;
  } catch (cause) {
    throw new SnowflockError('E_IMAGE_UNKNOWN', `base image ${path} cannot be read`, { cause });
  }
}

async function clone(
  open: StoreService,
  from: { disk: string; generation: string | null },
  name: string,
) {
  const { disk } = from;
  if (from.generation !== null) return open.clone({ disk, generation: from.generation, name });
  if ((await open.list()).disks.some((one) => one.name === name)) {
    throw new SnowflockError('E_EXISTS', `there is a disk ${name} already`);
  }
  const made = await open.snapshot({ disk });
  try {
    return await open.clone({ disk, generation: made.id, name });
  } catch (error) {
    await open.removeGeneration({ disk, generation: made.id }).catch(() => undefined);
    throw error;
  }
}

/** Before anybody is asked. E_NOT_FOUND. */
async function mustExist(open: StoreService, disk: string, generation: string | null) {
  const { disks, generations } = await open.list();
  const found =
    generation === null
      ? disks.some((one) => one.name === disk)
      : generations.some(
          (one) => one.disk === disk && (one.id === generation || one.name === generation),
        );
  if (found) return;
  const what = generation === null ? disk : `${disk}@${generation}`;
  throw new SnowflockError('E_NOT_FOUND', `there is no ${what} in ${open.directory}`);
}

const POLL_MS = 500;

/** Waits for background work, showing its tasks. Ctrl-C ends the wait with E_INTERRUPTED. */
export async function watched(
  open: StoreService,
  what: string,
  work: Promise<void>,
  signal: AbortSignal,
  concerns: (task: Awaited<ReturnType<StoreService['tasks']>>[number]) => boolean,
): Promise<void> {
  const progress = new Progress(what);
  const warned = new Set<string>();
  let asking = false;
  const timer = setInterval(() => {
    if (asking) return;
    asking = true;
    open
      .tasks()
      .then((tasks) => {
        const mine = tasks.filter(concerns);
        for (const { kind, error } of mine) {
          if (error === null || warned.has(error)) continue;
          warned.add(error);
          note(`${kind}: ${error}`);
        }
        const done = mine.reduce((sum, task) => sum + task.done_bytes, 0);
        const total = mine.reduce((sum, task) => sum + (task.total_bytes ?? 0), 0);
        progress.update(total > 0 ? Math.min(1, done / total) : undefined);
      })
      .catch(() => undefined) // the work itself says what is wrong
      .finally(() => {
        asking = false;
      });
  }, POLL_MS);
  try {
    await unlessInterrupted(work, signal);
  } finally {
    clearInterval(timer);
    progress.end();
  }
}

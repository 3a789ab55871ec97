import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { asSnowflockError } from '../common/errors.js';
import { readSourceFile } from '../disk-server/source-file.js';
import { JOURNAL, Journal } from './journal.js';
import { readJournal } from './journal-read.js';
import { addon, type NativeStore, native } from './native.js';
import { strayHolds } from './recover.js';
import { checkReplica } from './replica-check.js';
import {
  bootId,
  fileNames,
  liveName,
  mapName,
  readHeader,
  removeFiles,
  replicaFiles,
  type SliceFiles,
  type StoreFolder,
  scanFolder,
} from './slice-files.js';
import type { CheckFinding } from './store-api.js';
import { Tree } from './tree.js';
import { allocatedBytes } from './usage.js';

/**
 * `disk check` and `disk repair`.
 *
 * The check reads the journal, what it says, and all metadata of every slice, and finds everything
 * instead of the first thing. It changes nothing.
 *
 * The repair does what needs no guess: it cuts a torn last line, removes files that provably hold
 * nothing anybody could miss, and gives back space in data files that no map speaks of. Pages of another
 * host's generation stay, also if no disk lies on them: nobody here knows whether that host still has
 * them. It does nothing at all if the journal or the tree is damaged, and never touches a slice with an error.
 *
 * Left out: page data has no checksums, so a page altered on the device is not found.
 */

/** A finding, and what repairs it, if anything does. */
interface Found extends CheckFinding {
  repair?: () => Promise<void>;
}

interface Look {
  directory: string;
  tree: Tree;
  folder: StoreFolder;
  boot: string;
  found: Found[];
}

/** Everything that is wrong with a store. E_IN_USE if it is open, E_NOT_FOUND if there is none. */
export async function checkStore(directory: string): Promise<CheckFinding[]> {
  return locked(directory, async () => (await look(directory)).map(plain));
}

/**
 * Repairs what can be proved. The findings of a check before it, with `repaired` where it was, or
 * with `dryRun` would be, put right; what could not be says why in its message.
 */
export async function repairStore(
  directory: string,
  options: { dryRun?: boolean } = {},
): Promise<CheckFinding[]> {
  return locked(directory, async () => {
    const found = await look(directory);
    for (const each of found) {
      if (each.repair === undefined) continue;
      try {
        if (options.dryRun !== true) await each.repair();
        each.repaired = true;
      } catch (error) {
        each.message += `; the repair failed: ${asSnowflockError(error).message}`;
      }
    }
    return found.map(plain);
  });
}

const plain = ({ severity, file, message, repaired }: Found): CheckFinding => {
  return { severity, file, message, repaired };
};

async function locked<T>(directory: string, work: () => Promise<T>): Promise<T> {
  await Journal.exists(directory);
  const lock: NativeStore = await native(() => addon().openStore(directory));
  try {
    return await work();
  } finally {
    await native(() => lock.close());
  }
}

async function look(directory: string): Promise<Found[]> {
  const found: Found[] = [];
  const tree = new Tree();
  const damaged = await lookAtJournal(directory, tree, found);
  const folder = await scanFolder(directory);
  const looking: Look = { directory, tree, folder, boot: await bootId(), found };
  if (!damaged) {
    await lookAtSlices(looking);
    await lookAtBases(looking);
    await lookAtStrays(looking);
    await lookAtOthers(looking);
  }
  // What could be removed is what the journal does not name: no repair on the word of a bad one.
  if (damaged) for (const each of found) delete each.repair;
  return found;
}

/** True if the journal or the tree cannot be relied on. */
async function lookAtJournal(directory: string, tree: Tree, found: Found[]): Promise<boolean> {
  const file = join(directory, JOURNAL);
  try {
    const { tornBytes, validBytes } = await readJournal(file, (each) => tree.apply(each));
    if (tornBytes > 0) {
      found.push({
        severity: 'note',
        file,
        message: `the last line was cut short by a crash (${tornBytes} bytes from ${validBytes}); it never counted`,
        repaired: false,
        repair: async () => {
          const journal = await Journal.open(directory, () => undefined);
          await journal.close();
        },
      });
    }
  } catch (error) {
    const { message } = asSnowflockError(error);
    found.push({ severity: 'error', file, message, repaired: false });
    return true;
  }
  const problems = tree.index();
  for (const message of problems) found.push({ severity: 'error', file, message, repaired: false });
  return problems.length > 0;
}

/** Which disks and generations read this slice, as a sentence. */
function affected(tree: Tree, slice: string): string {
  const names: string[] = [];
  const more: string[] = [slice];
  const seen = new Set(more);
  for (let id = more.pop(); id !== undefined; id = more.pop()) {
    const disk = tree.diskAt(id);
    if (disk !== undefined) names.push(disk);
    const generation = tree.generationAt(id);
    const entry = tree.generations.get(generation ?? '');
    if (entry !== undefined) names.push(`${entry.disk}@${entry.name ?? generation}`);
    for (const child of tree.children(id)) {
      if (seen.has(child)) continue;
      seen.add(child);
      more.push(child);
    }
  }
  if (names.length === 0) return 'nobody reads it any more';
  const shown = names.sort().slice(0, 16).join(', ');
  return `affects ${shown}${names.length > 16 ? ` and ${names.length - 16} more` : ''}`;
}

async function lookAtSlices(looking: Look): Promise<void> {
  const { tree } = looking;
  for (const [id, { size_bytes, map }] of tree.slices) {
    const expected = tree.diskAt(id) === undefined ? 'sealed' : 'open';
    const affects = () => affected(tree, id);
    await lookAtSlice(looking, { id, size_bytes, map, expected, affects });
  }
  for (const [name, { top, spare }] of tree.disks) {
    if (spare === null) continue;
    const size_bytes = tree.slices.get(top)?.size_bytes ?? 0;
    const affects = () => `affects ${name}`;
    await lookAtSlice(looking, { id: spare, size_bytes, map: 0, expected: 'spare', affects });
  }
}

interface Slice {
  id: string;
  size_bytes: number;
  map: number;
  expected: 'spare' | 'open' | 'sealed';
  /** Costs as much as lies on the slice: for those with a finding only. */
  affects: () => string;
}

async function lookAtSlice(looking: Look, slice: Slice): Promise<void> {
  const { directory, folder, found } = looking;
  const { id, map, expected, affects } = slice;
  const files = folder.slices.get(id);
  const data = join(directory, `${id}.data`);
  const error = (file: string, message: string) =>
    found.push({ severity: 'error', file, message: `${message}; ${affects()}`, repaired: false });
  if (files?.data !== true || !files.maps.includes(map)) {
    if (files?.data !== true) error(data, 'is missing');
    if (files?.maps.includes(map) !== true) error(join(directory, mapName(id, map)), 'is missing');
    return;
  }
  const spec = { directory, id, map, sizeBytes: slice.size_bytes };
  const checked = await native(() => addon().checkSlice(spec)).catch((thrown: unknown) => {
    error(data, asSnowflockError(thrown).message);
    return undefined;
  });
  if (checked === undefined) return;
  for (const message of checked.errors) error(data, message);
  if (checked.errors.length > 0) return;
  const forked = await spareIsTop(looking, slice);
  if (forked) {
    found.push({
      severity: 'note',
      file: data,
      message: `a fork happened that the journal does not tell of yet; the next opening adds it (${affects()})`,
      repaired: false,
    });
  } else if (checked.state !== expected && !settling(looking.tree, slice, checked.state)) {
    error(data, `is ${checked.state ?? 'without a header'}, but the journal has it as ${expected}`);
    return;
  }
  if (checked.holes > 0) {
    found.push({
      severity: 'note',
      file: data,
      message: `${checked.holes} pages with data take no space and read as zeros; right if zeros were written there (${affects()})`,
      repaired: false,
    });
  }
  if (checked.leakedBytes > 0 && !forked) {
    const sealed = checked.state === 'sealed';
    found.push({
      severity: 'leak',
      file: data,
      message: `${checked.leakedBytes} bytes are taken by pages that no map speaks of`,
      repaired: false,
      ...(sealed ? { repair: async () => void (await native(() => addon().trimSlice(spec))) } : {}),
    });
  }
}

async function spareIsTop({ directory, boot, folder }: Look, slice: Slice): Promise<boolean> {
  if (slice.expected !== 'spare') return false;
  const files = folder.slices.get(slice.id);
  const names = [
    mapName(slice.id, 0),
    ...(files?.lives.includes(boot) ? [liveName(slice.id, boot)] : []),
  ];
  for (const name of names) {
    const header = await readHeader(join(directory, name));
    if (!('damage' in header) && header.state === 'open') return true;
  }
  return false;
}

/** A top that was sealed by a fork that the journal does not tell of yet. */
function settling(tree: Tree, { id, expected }: Slice, state: string | null): boolean {
  if (expected !== 'open' || state !== 'sealed') return false;
  const disk = tree.disks.get(tree.diskAt(id) ?? '');
  return disk !== undefined && disk.spare !== null;
}

async function lookAtBases(looking: Look): Promise<void> {
  const { tree, found } = looking;
  const replicas = new Map<string, { id: string; size_bytes: number }>();
  for (const [id, { base, size_bytes }] of tree.slices) {
    if (base?.kind === 'image') {
      const size = await stat(base.path).then(
        (file) => file.size,
        () => undefined,
      );
      const message =
        size === undefined
          ? 'the base image is missing'
          : size < base.image_bytes
            ? `the base image has ${size} bytes instead of ${base.image_bytes}`
            : undefined;
      if (message === undefined) continue;
      const text = `${message}; ${affected(tree, id)}`;
      found.push({ severity: 'error', file: base.path, message: text, repaired: false });
    }
    if (base?.kind === 'replica') replicas.set(base.generation, { id, size_bytes });
  }
  for (const [generation, at] of replicas) await lookAtReplica(looking, generation, at);
}

async function lookAtReplica(
  { directory, tree, folder, found }: Look,
  generation: string,
  { id, size_bytes }: { id: string; size_bytes: number },
): Promise<void> {
  const affects = affected(tree, id);
  const [data, map, source] = replicaFiles(generation);
  const say = (severity: 'error' | 'note', name: string, message: string) =>
    found.push({
      severity,
      file: join(directory, name),
      message: `${message}; ${affects}`,
      repaired: false,
    });
  const here = [data, map].filter((name) => folder.others.includes(name));
  let complete = false;
  if (here.length === 1) {
    say('error', here[0] === data ? map : data, 'is missing');
  } else if (here.length === 2) {
    const checked = await checkReplica(join(directory, data), generation, size_bytes);
    for (const [name, message] of checked.errors)
      say('error', name === 'map' ? map : data, message);
    complete = checked.complete;
    if (checked.errors.length > 0) return;
  }
  // A replica may be kept elsewhere by who opens the store: nothing at all is no error.
  if (!folder.others.includes(source)) {
    if (here.length === 2 && !complete) {
      say('error', source, 'is missing, and pages of the replica are');
    }
    return;
  }
  const path = join(directory, source);
  const fault = await readSourceFile(path).then(
    (read) => (read.generation === generation ? undefined : 'is of another generation'),
    (error: unknown) => asSnowflockError(error).message,
  );
  if (fault !== undefined) {
    say(complete ? 'note' : 'error', source, `cannot be used: ${fault}`);
  }
}

async function lookAtStrays(looking: Look): Promise<void> {
  const { directory, tree, folder, boot, found } = looking;
  const named = new Map([...tree.slices].map(([id, { map }]) => [id, map]));
  for (const { spare } of tree.disks.values()) if (spare !== null) named.set(spare, 0);
  const go = (severity: 'leak' | 'note', names: string[], message: string) => {
    for (const name of names) {
      const repair = () => removeFiles(directory, [name]);
      found.push({ severity, file: join(directory, name), message, repaired: false, repair });
    }
  };
  for (const [id, files] of folder.slices) {
    const map = named.get(id);
    if (map !== undefined) {
      const other = files.maps.filter((edition) => edition !== map);
      // Only beside the edition that counts: without that one they may be all there is.
      if (files.maps.includes(map)) {
        go(
          'leak',
          other.map((edition) => mapName(id, edition)),
          'a map of a merge that ended early',
        );
      }
      go('note', files.unfinished, 'was never finished');
      const stale = files.lives.filter((each) => each !== boot);
      go(
        'note',
        stale.map((each) => liveName(id, each)),
        'is of another boot and counts no more',
      );
    } else if (tree.removed.has(id)) {
      go('leak', fileNames(id, files), 'is of a slice that is being removed');
    } else {
      await lookAtStray(looking, id, files, go);
    }
  }
}

async function lookAtStray(
  { directory, found }: Look,
  id: string,
  files: SliceFiles,
  go: (severity: 'leak', names: string[], message: string) => void,
): Promise<void> {
  const held = await strayHolds(directory, id, files);
  if (held === undefined) {
    go('leak', fileNames(id, files), 'is of a slice that no disk names, and holds nothing');
    return;
  }
  found.push({
    severity: 'error',
    file: join(directory, `${id}.data`),
    message: `no disk or generation names this slice, but it ${held}: a line of the journal may be lost`,
    repaired: false,
  });
}

/** Never finished: a journal written anew, a source file being replaced. */
const UNFINISHED =
  /^store\.journal(\.[0-9a-f]{16})?\.new$|^[\w.-]+@[\w.-]+\.source\.[0-9a-f]{8}\.tmp$/;
const ORDINARY =
  /^(store\.(lock|sock|journal)|[0-9a-f]{32}\.(replica|replica\.map|source)|[A-Za-z0-9_][\w.-]*@[A-Za-z0-9_][\w.-]*\.source|.*\.sock)$/;
const OF_REPLICA = /^[0-9a-f]{32}\.(replica|replica\.map|source)$/;

async function lookAtOthers({ directory, tree, folder, found }: Look): Promise<void> {
  const bases = new Set<string>();
  for (const { base } of tree.slices.values()) {
    if (base?.kind === 'replica') bases.add(base.generation);
  }
  for (const name of folder.others) {
    const file = join(directory, name);
    const say = (severity: 'leak' | 'note', message: string, provable: boolean) =>
      found.push({
        severity,
        file,
        message,
        repaired: false,
        ...(provable ? { repair: () => removeFiles(directory, [name]) } : {}),
      });
    const generation = name.slice(0, 32);
    if (UNFINISHED.test(name)) {
      say('note', 'was never finished', true);
    } else if (!ORDINARY.test(name)) {
      say('note', 'is nothing of a store', false);
    } else if (OF_REPLICA.test(name) && !bases.has(generation)) {
      const held = await allocatedBytes(join(directory, replicaFiles(generation)[0]));
      if (held === 0) {
        say('leak', 'is of a replica that no disk lies on, and that holds nothing', true);
      } else {
        // Its source may be gone: a person decides.
        const advice = 'remove it by hand if its source has them or nobody needs them';
        say('leak', `no disk lies on this replica, which holds ${held} bytes; ${advice}`, false);
      }
    }
  }
}

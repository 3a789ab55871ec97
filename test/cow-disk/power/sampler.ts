// Chooses cut points, and what of the unsynced part arrived.
import type { Chooser, File } from './file-system.js';
import { type Entry, Kind } from './log.js';

export interface Sample {
  name: string;
  chooser: Chooser;
}

/** Everything that was written arrived. */
export const EVERYTHING: Chooser = {
  page: (_file, _page, count) => count - 1,
  size: (_file, count) => count - 1,
  tear: false,
  prefix: (count) => count,
  random: () => 0,
};

/** Nothing that was not synced arrived, but for names: all of them, none of them. */
export const LOST: Sample[] = [true, false].map((names) => ({
  name: `nothing, ${names ? 'all' : 'no'} names`,
  chooser: {
    page: () => 0,
    size: () => 0,
    tear: false,
    prefix: (count) => (names ? count : 0),
    random: () => 0,
  },
}));

/** A way to lose data, drawn anew for each cut; the name says which. */
export function sample(rand: () => number): Sample {
  const pick = (n: number) => Math.floor(rand() * n);
  const density = [0.05, 0.5, 0.95][pick(3)] as number;
  const arrived = new Map<File, boolean>();
  const whole = (file: File) => {
    const known = arrived.get(file) ?? rand() < 0.5;
    arrived.set(file, known);
    return known;
  };
  const newest = (count: number) => count - 1;
  const some = (count: number) => (rand() < density ? 1 + pick(count - 1) : 0);
  let last: { file: File; page: number; at: number } | undefined;
  const ways: [string, Pick<Chooser, 'page' | 'size'>][] = [
    ['nothing', { page: () => 0, size: () => 0 }],
    ['everything', { page: (_f, _p, count) => count - 1, size: (_f, count) => count - 1 }],
    ['sizes without data', { page: () => 0, size: (_f, count) => newest(count) }],
    [
      'whole files',
      {
        page: (file, _p, count) => (whole(file) ? newest(count) : 0),
        size: (file, count) => (whole(file) ? newest(count) : 0),
      },
    ],
    [
      `pages at ${density}`,
      { page: (_f, _p, count) => some(count), size: (_f, count) => pick(count) },
    ],
    ['any instant', { page: (_f, _p, count) => pick(count), size: (_f, count) => pick(count) }],
    [
      'one page',
      {
        // Pages come in no order of time: one drawn, kept for the whole cut.
        page: (file, page, count, at) => {
          if (last === undefined && rand() < 0.2) last = { file, page, at };
          return last?.file === file && last.page === page ? newest(count) : 0;
        },
        size: (_f, count) => newest(count),
      },
    ],
  ];
  const [way, data] = ways[pick(ways.length)] as (typeof ways)[number];
  const tear = rand() < 0.3;
  const names = pick(4);
  const chooser: Chooser = {
    ...data,
    tear,
    random: rand,
    prefix: (count) => [0, count, pick(count + 1)][names] ?? 0,
    ...(names === 3 ? { happened: () => rand() < 0.5 } : {}),
  };
  const order = ['no names', 'all names', 'a prefix of names', 'any names'][names];
  return { name: `${way}, ${order}${tear ? ', torn' : ''}`, chooser };
}

/**
 * A cut point in [0, entries.length]: anywhere, soon after a process began (what the one before it
 * had not synced, it may build on), or beside a sync or a name's change.
 */
export function cutPoint(rand: () => number, entries: Entry[]): number {
  const way = rand();
  const anywhere = Math.floor(rand() * (entries.length + 1));
  if (way < 0.35) return anywhere;
  if (way < 0.65) {
    const starts = entries.flatMap((entry, at) => (entry.kind === Kind.start ? [at] : []));
    const start = starts[Math.floor(rand() * starts.length)] ?? 0;
    return Math.min(entries.length, start + Math.floor(rand() * 120));
  }
  const near = (entry: Entry) =>
    entry.kind === Kind.syncEnd ||
    entry.kind === Kind.rename ||
    entry.kind === Kind.create ||
    entry.kind === Kind.unlink;
  for (let at = anywhere; at < entries.length; at++) {
    const entry = entries[at];
    if (entry !== undefined && near(entry)) return at + Math.floor(rand() * 2);
  }
  return anywhere;
}

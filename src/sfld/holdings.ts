/**
 * What replicas hold, here and elsewhere: by this a host decides whether its clones can live without
 * their source. Runs of pages are [first, count, first, count, ...], in order.
 */
import { MISSING_RUNS_MAX } from '../dataplane/protocol.js';
import { isRemote, KINDS, type Kind } from './bases.js';
import type { Host } from './host.js';

/** One replica, as its host tells others. */
export interface Holding {
  generation: string;
  /** Pages it does not hold; null: more than MISSING_RUNS_MAX runs, so it is not counted upon. */
  absent: number[] | null;
  /** UDP port of that host's mcdist server. */
  port: number;
}

export const HOLDINGS_MAX = 4096;
export const RUNS_LENGTH_MAX = 2 * MISSING_RUNS_MAX;

/** Of the generations named, those that this host has a replica of and serves. */
export async function holdings(host: Host, generations: string[]): Promise<Holding[]> {
  const known = new Set(
    host.vms
      .all()
      .filter((record) => isRemote(host, record))
      .flatMap(({ base }) => KINDS.map((kind) => base[kind].generation)),
  );
  const found = await Promise.all(
    [...new Set(generations)].map(async (generation) => {
      if (!known.has(generation)) return [];
      // It may be closed just now: then it holds nothing that anybody should count upon.
      const stats = await host.dataplane
        .call('replica.stats', { generation })
        .catch(() => undefined);
      if (stats?.served !== true) return [];
      const { absent } = await host.dataplane.call('replica.missing', { generation });
      return [{ generation, absent, port: host.config.mcdistPort }];
    }),
  );
  return found.flat();
}

/** Where a generation that this host needs pages of could come from. */
export interface Coverage {
  kind: Kind;
  generation: string;
  /** Pages somebody here may still need. */
  needed_pages: number;
  /** Of those, held by no host that answered. */
  unheld_pages: number;
  /** Hosts that hold some of what is needed here. */
  held_by: { host: string; port: number; all: boolean }[];
}

/** `needed` null: so many runs that nobody looks; then only a host that holds all counts. */
export function coverage(
  kind: Kind,
  generation: string,
  pages: number,
  needed: number[] | null,
  others: { host: string; holding: Holding }[],
): Coverage {
  const need = needed ?? [0, pages];
  const needed_pages = count(need);
  let unheld = need;
  const held_by: Coverage['held_by'] = [];
  for (const { host, holding } of others) {
    if (holding.absent === null) continue;
    const without = intersection(need, holding.absent);
    if (without.length > 0 && count(without) === needed_pages) continue;
    if (needed_pages > 0) held_by.push({ host, port: holding.port, all: without.length === 0 });
    unheld = intersection(unheld, holding.absent);
  }
  return { kind, generation, needed_pages, unheld_pages: count(unheld), held_by };
}

export function count(runs: number[]): number {
  let pages = 0;
  for (let i = 1; i < runs.length; i += 2) pages += runs[i] ?? 0;
  return pages;
}

/** Pages that are in both. */
export function intersection(a: number[], b: number[]): number[] {
  const out: number[] = [];
  let i = 0;
  let j = 0;
  while (i + 1 < a.length && j + 1 < b.length) {
    const [a0 = 0, an = 0] = [a[i], a[i + 1]];
    const [b0 = 0, bn = 0] = [b[j], b[j + 1]];
    const first = Math.max(a0, b0);
    const end = Math.min(a0 + an, b0 + bn);
    if (end > first) out.push(first, end - first);
    if (a0 + an < b0 + bn) i += 2;
    else j += 2;
  }
  return out;
}

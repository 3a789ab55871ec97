/**
 * Regions of a VM's memory and disk of which each clone will need a part of its own (a database of
 * which each searches its share): not worth multicasting (paper section 5.3). A hint: pages of such
 * a region are answered to the host that asks and not pushed, and nothing else changes.
 *
 * Said of a VM, for the forks it makes from then on; its clones begin without any.
 */
import { SnowflockError } from '../common/errors.js';
import type { Host, LiveVm } from './host.js';
import type { Disjoint } from './records.js';

/** Of memory: as the guest's RAM is laid out in the generation, without the holes of its address space. */
export interface Region {
  offset_bytes: number;
  size_bytes: number;
}

export interface DisjointRegions {
  ram: Region[];
  disk: Region[];
}

export const REGIONS_MAX = 1024;
const PAGE_BYTES = 4096;

/**
 * Takes the place of what was said before.
 * @throws E_ARGUMENT (beyond the end, too many)
 */
export async function setDisjoint(
  host: Host,
  live: LiveVm,
  regions: DisjointRegions,
): Promise<Disjoint> {
  const { record } = live;
  record.disjoint = {
    ram: pageRuns('ram', regions.ram, record.ram_bytes),
    disk: pageRuns('disk', regions.disk, record.disk_bytes),
  };
  await host.vms.save(record);
  return record.disjoint;
}

/** Whole pages within the regions, in order and without overlaps, as [first, count, ...]. */
export function pageRuns(what: 'ram' | 'disk', regions: Region[], size_bytes: number): number[] {
  if (regions.length > REGIONS_MAX) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${regions.length} regions of ${what}; at most ${REGIONS_MAX} can be named`,
    );
  }
  const ranges = regions.map(({ offset_bytes, size_bytes: bytes }) => {
    const whole = Number.isSafeInteger(offset_bytes) && Number.isSafeInteger(bytes);
    if (!whole || offset_bytes < 0 || bytes < 0 || offset_bytes + bytes > size_bytes) {
      throw new SnowflockError(
        'E_ARGUMENT',
        `the region of ${what} at ${offset_bytes} of ${bytes} bytes is not within its ${size_bytes} bytes`,
      );
    }
    return {
      first: Math.ceil(offset_bytes / PAGE_BYTES),
      end: Math.floor((offset_bytes + bytes) / PAGE_BYTES),
    };
  });
  const runs: number[] = [];
  let end = -1;
  for (const range of ranges.sort((a, b) => a.first - b.first)) {
    const first = Math.max(range.first, end);
    if (range.end <= first) continue;
    if (first === end) runs.push((runs.pop() ?? 0) + range.end - first);
    else runs.push(first, range.end - first);
    end = range.end;
  }
  return runs;
}

/** `12+5,40+1`, as guests write them: first byte and number of bytes. E_ARGUMENT. */
export function parseRegions(text: string): Region[] {
  if (text === '') return [];
  return text.split(',').map((word) => {
    const found = /^(\d{1,16})\+(\d{1,16})$/.exec(word);
    if (found === null) {
      throw new SnowflockError('E_ARGUMENT', `"${word}" is no region: OFFSET+BYTES is meant`);
    }
    return { offset_bytes: Number(found[1]), size_bytes: Number(found[2]) };
  });
}

/**
 * Where clones go. A pure function: the same hosts give the same plan.
 */
import { SnowflockError } from '../common/errors.js';
import type { Free, Need } from './resources.js';

/** A host and what it has free; a host that does not answer is simply not among them. */
export interface HostFree extends Free {
  readonly host: string;
}

export interface PlacementPolicy {
  /** Hosts that get none, e.g. the parent's. */
  readonly exclude?: readonly string[];
  /** Clones on one host at most. */
  readonly perHostMax?: number;
}

/** So many clones on this host; at least one. */
export interface Placement {
  readonly host: string;
  readonly clones: number;
}

export interface Plan {
  /** Sum of the placements; may be fewer than asked. */
  readonly granted: number;
  /** In the order of `hosts`. */
  readonly placements: readonly Placement[];
}

/** vmids are 16 bits and 0 is the parent. */
export const CLONES_MAX = 65_535;

/**
 * Spreads `n` clones as evenly as the hosts' room allows: each goes to a host that has the fewest
 * of this plan so far, among those to the one with the most room left. So counts differ by more
 * than one only where the smaller host is full.
 * @throws {SnowflockError} `E_CAPACITY` when not even one fits, `E_ARGUMENT`.
 */
export function planPlacement(
  n: number,
  need: Need,
  hosts: readonly HostFree[],
  policy: PlacementPolicy = {},
): Plan {
  if (!Number.isInteger(n) || n < 1 || n > CLONES_MAX) {
    throw new SnowflockError('E_ARGUMENT', `${n} clones: 1 to ${CLONES_MAX} are possible`);
  }
  if (!(need.memoryBytes > 0) || !(need.vcpus > 0)) {
    throw new SnowflockError('E_ARGUMENT', 'a clone needs memory and at least one vCPU');
  }
  const excluded = new Set(policy.exclude ?? []);
  const most = policy.perHostMax ?? CLONES_MAX;
  const candidates = hosts.map((host) => ({
    host: host.host,
    clones: 0,
    slots: excluded.has(host.host) ? 0 : Math.min(most, slotsOf(host, need)),
  }));
  let granted = 0;
  while (granted < n) {
    let best: (typeof candidates)[number] | undefined;
    for (const candidate of candidates) {
      if (candidate.clones >= candidate.slots) continue;
      if (
        !best ||
        candidate.clones < best.clones ||
        (candidate.clones === best.clones && candidate.slots > best.slots)
      ) {
        best = candidate;
      }
    }
    if (!best) break;
    best.clones += 1;
    granted += 1;
  }
  if (granted === 0) {
    const mib = Math.ceil(need.memoryBytes / 2 ** 20);
    throw new SnowflockError(
      'E_CAPACITY',
      `no host has ${mib} MiB and ${need.vcpus} vCPUs free for a clone`,
    );
  }
  return {
    granted,
    placements: candidates
      .filter((candidate) => candidate.clones > 0)
      .map(({ host, clones }) => ({ host, clones })),
  };
}

/** How many clones of this need fit on a host. */
export function slotsOf(free: Free, need: Need): number {
  return Math.floor(Math.min(free.memoryBytes / need.memoryBytes, free.vcpus / need.vcpus));
}

import { newSecretId } from '../common/ids.js';
import { SnowflockError } from '../common/errors.js';
import { planPlacement } from '../allocator/placement.js';
import type { Ticket } from '../allocator/tickets.js';
import type { Host, LiveVm } from './host.js';

/** Unused tickets give their resources back after this. */
export const TICKET_LIFE_MS = 60_000;
const CLONES_MAX = 4096;

/**
 * Reserves room for up to `n` clones on the cluster's hosts (paper section 2.1: the allocation may
 * be smaller than asked). Hosts that do not answer have no room. Errors: E_ARGUMENT, E_CAPACITY.
 */
export async function requestTicket(host: Host, live: LiveVm, n: number): Promise<Ticket> {
  if (!Number.isInteger(n) || n < 1 || n > CLONES_MAX) {
    throw new SnowflockError('E_ARGUMENT', `clones must be a number from 1 to ${CLONES_MAX}`);
  }
  const { record } = live;
  const need = { memoryBytes: record.ram_bytes, vcpus: record.vcpus };
  const ports = host.peers.all();
  const free = await Promise.all(
    ports.map(async (port) => {
      try {
        const { memory_bytes, vcpus } = await port.capacity();
        return [{ host: port.name, memoryBytes: memory_bytes, vcpus }];
      } catch (error) {
        host.log.warn({ host: port.name, error: String(error) }, 'host left out of a ticket');
        return [];
      }
    }),
  );
  const plan = planPlacement(n, need, free.flat());
  // What was free a moment ago may be taken: each host's own answer counts.
  const placements = await Promise.all(
    plan.map(async ({ host: name, count }) => {
      const reservation = newSecretId('res');
      const granted = await host.peers
        .get(name)
        .reserve(reservation, count, { memory_bytes: need.memoryBytes, vcpus: need.vcpus })
        .catch(() => 0);
      return { host: name, count: granted, reservation };
    }),
  );
  const given = placements.filter(({ count }) => count > 0);
  const granted = given.reduce((sum, { count }) => sum + count, 0);
  if (granted === 0) {
    throw new SnowflockError('E_CAPACITY', `no host has room for a clone of VM ${record.name}`);
  }
  return host.tickets.issue({
    owner: record.id,
    granted,
    placements: given,
    lifeMs: TICKET_LIFE_MS,
  });
}

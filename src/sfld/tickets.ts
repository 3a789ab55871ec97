import { join } from 'node:path';
import { planPlacement } from '../allocator/placement.js';
import { newTicketId, type Ticket } from '../allocator/tickets.js';
import { SnowflockError } from '../common/errors.js';
import { writeJson } from '../common/files.js';
import type { Host, LiveVm } from './host.js';
import type { VmRecord } from './records.js';

/** Unused tickets give their resources back after this. */
const TICKET_LIFE_MS = 60_000;
/** Longer than its ticket's, by the time a fork takes until its hosts commit it. */
export const RESERVATION_LIFE_MS = TICKET_LIFE_MS + 30_000;
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
  const id = newTicketId();
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
    plan.placements.map(async ({ host: name, clones }) => {
      const granted = await host.peers
        .get(name)
        .reserve(id, clones, { memory_bytes: need.memoryBytes, vcpus: need.vcpus })
        .catch(() => 0);
      return { host: name, clones: granted };
    }),
  );
  const given = placements.filter(({ clones }) => clones > 0);
  if (given.length === 0) {
    throw new SnowflockError('E_CAPACITY', `no host has room for a clone of VM ${record.name}`);
  }
  const ticket = host.tickets.issue({
    id,
    ownerVmId: record.id,
    placements: given,
    vmids: await allocateVmids(
      host,
      record,
      given.reduce((sum, { clones }) => sum + clones, 0),
    ),
    need,
    ttlMs: TICKET_LIFE_MS,
  });
  await saveTickets(host);
  return ticket;
}

/** Uses a ticket up. Errors: E_TICKET_UNKNOWN, E_TICKET_OWNER, E_TICKET_USED, E_TICKET_EXPIRED. */
export async function useTicket(host: Host, vm: string, id: string): Promise<Ticket> {
  const ticket = host.tickets.use(id, vm);
  await saveTickets(host);
  return ticket;
}

/** A VM has ended: the room behind its unused tickets is given back. */
export async function revokeTickets(host: Host, vm: string): Promise<void> {
  const revoked = host.tickets.revoke(vm);
  if (revoked.length === 0) return;
  await saveTickets(host);
  const places = revoked.flatMap((ticket) =>
    ticket.placements.map((placement) => ({ ticket: ticket.id, host: placement.host })),
  );
  await Promise.all(
    places.map((place) =>
      host.peers
        .get(place.host)
        .release(place.ticket)
        .catch((error: unknown) => {
          // It lapses there by itself.
          host.log.warn({ host: place.host, error: String(error) }, 'cannot give room back');
        }),
    ),
  );
}

/** Where this host's reservations are kept between two lives of the daemon. */
export function resourcesFile(config: { stateDir: string }): string {
  return join(config.stateDir, 'resources.json');
}

/** Where tickets are kept between two lives of the daemon. */
export function ticketFile(config: { stateDir: string }): string {
  return join(config.stateDir, 'tickets.json');
}

function saveTickets(host: Host): Promise<void> {
  return writeJson(ticketFile(host.config), host.tickets.snapshot());
}

/** Room is reserved and given back clone by clone. */
export function shareOf(ticket: string, share: number): string {
  return `${ticket}/${share}`;
}

/** vmids are unique in the family for ever; the family's host gives them out. */
async function allocateVmids(host: Host, record: VmRecord, n: number): Promise<number[]> {
  if (record.family_host !== host.config.name) {
    return host.peers.get(record.family_host).allocateVmids(record.family, n);
  }
  return takeVmids(host, record.family, n);
}

export async function takeVmids(host: Host, family: number, n: number): Promise<number[]> {
  const first = host.vms.all().find((vm) => vm.family === family && vm.vmid === 0);
  if (first === undefined) throw new SnowflockError('E_NOT_FOUND', `no family ${family} here`);
  if (first.next_vmid + n > 0xfd00) {
    throw new SnowflockError('E_CAPACITY', `family ${family} has used up its 64,768 vmids`);
  }
  const vmids = Array.from({ length: n }, (_, i) => first.next_vmid + i);
  first.next_vmid += n;
  await host.vms.save(first);
  return vmids;
}

/**
 * Tickets: the right to fork so many clones, once, by the VM that asked, for a while (paper,
 * section 3.1: sf_request_ticket; the grant may be smaller than asked).
 *
 * States: open → used, or open → expired. Used and expired tickets are remembered for a while, so
 * that the caller learns which it was; the oldest are forgotten first, never an open one. Ids are
 * 128 random bits: a guest cannot guess another's, and gets no more than an error if it could.
 *
 * Left out: the hosts' reservations behind a ticket. Whoever issues it reserves under
 * `reservation id = ticket id + clone`, for the same time.
 */
import { randomBytes } from 'node:crypto';
import Type, { type Static } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import type { Placement } from './placement.js';
import type { Need } from './resources.js';

export type TicketState = 'open' | 'used' | 'expired';

export interface Ticket {
  /** 32 lower-case hex characters. */
  readonly id: string;
  /** The VM that requested it. */
  readonly ownerVmId: string;
  /** Clones it is good for. */
  readonly granted: number;
  readonly placements: readonly Placement[];
  /** The clones' vmids, in the order of the placements. */
  readonly vmids: readonly number[];
  /** What each clone takes. */
  readonly need: Need;
  /** Wall-clock time, ms since 1970. */
  readonly expiresMs: number;
  readonly state: TicketState;
}

const TicketRecord = Type.Object({
  id: Type.String({ pattern: '^[0-9a-f]{32}$' }),
  owner_vm_id: Type.String({ minLength: 1 }),
  granted: Type.Integer({ minimum: 1 }),
  placements: Type.Array(
    Type.Object({ host: Type.String(), clones: Type.Integer({ minimum: 1 }) }),
  ),
  vmids: Type.Array(Type.Integer({ minimum: 0, maximum: 0xffff })),
  memory_bytes: Type.Integer({ minimum: 1 }),
  vcpus: Type.Integer({ minimum: 1 }),
  expires_ms: Type.Number(),
  state: Type.Union([Type.Literal('open'), Type.Literal('used'), Type.Literal('expired')]),
});

/** The schema of what `snapshot()` gives and `restore()` takes. */
export const TicketBookSnapshot = Type.Object({
  version: Type.Literal(1),
  tickets: Type.Array(TicketRecord),
});
export type TicketBookSnapshot = Static<typeof TicketBookSnapshot>;

/** 32 lower-case hex characters nobody can guess. */
export function newTicketId(): string {
  return randomBytes(16).toString('hex');
}

export interface TicketBookOptions {
  readonly now?: () => number;
  /** Open tickets of one VM at most; a guest could fill the memory otherwise. Default 64. */
  readonly openPerOwnerMax?: number;
  /** Used and expired tickets remembered at most. Default 4096. */
  readonly closedMax?: number;
}

export class TicketBook {
  /** In the order of issue. */
  readonly #tickets = new Map<string, Ticket>();
  readonly #now: () => number;
  readonly #openPerOwnerMax: number;
  readonly #closedMax: number;

  constructor(options: TicketBookOptions = {}) {
    this.#now = options.now ?? Date.now;
    this.#openPerOwnerMax = options.openPerOwnerMax ?? 64;
    this.#closedMax = options.closedMax ?? 4096;
  }

  /**
   * Issues a ticket for what was placed.
   * @throws {SnowflockError} `E_CAPACITY` when the VM holds too many, `E_ARGUMENT`.
   */
  issue(request: {
    /** The room was reserved under this id; default a new one. */
    readonly id?: string;
    readonly ownerVmId: string;
    readonly placements: readonly Placement[];
    readonly vmids?: readonly number[];
    readonly need: Need;
    readonly ttlMs: number;
  }): Ticket {
    const { ownerVmId, placements, vmids = [], need, ttlMs } = request;
    const granted = placements.reduce((sum, placement) => sum + placement.clones, 0);
    if (granted < 1 || !(ttlMs > 0)) {
      throw new SnowflockError('E_ARGUMENT', 'a ticket is for one clone or more, and for a while');
    }
    if (this.ofOwner(ownerVmId).length >= this.#openPerOwnerMax) {
      throw new SnowflockError(
        'E_CAPACITY',
        `VM ${ownerVmId} holds ${this.#openPerOwnerMax} unused tickets`,
      );
    }
    const ticket: Ticket = {
      id: request.id ?? newTicketId(),
      ownerVmId,
      granted,
      placements: placements.map(({ host, clones }) => ({ host, clones })),
      vmids: [...vmids],
      need: { memoryBytes: need.memoryBytes, vcpus: need.vcpus },
      expiresMs: this.#now() + ttlMs,
      state: 'open',
    };
    this.#tickets.set(ticket.id, ticket);
    return ticket;
  }

  /**
   * Uses a ticket up, for good: also if the fork then fails.
   * @throws {SnowflockError} `E_TICKET_UNKNOWN`, `E_TICKET_OWNER`, `E_TICKET_USED`,
   * `E_TICKET_EXPIRED`; the ticket is as before.
   */
  use(id: string, vmId: string): Ticket {
    const ticket = this.get(id);
    // Not echoed: it comes from a guest, and a right id of another VM's is a secret.
    if (!ticket) throw new SnowflockError('E_TICKET_UNKNOWN', `VM ${vmId}: no such ticket`);
    if (ticket.ownerVmId !== vmId) {
      throw new SnowflockError('E_TICKET_OWNER', `VM ${vmId}: the ticket is another VM's`);
    }
    if (ticket.state === 'used') {
      throw new SnowflockError('E_TICKET_USED', `VM ${vmId}: the ticket was used before`);
    }
    if (ticket.state === 'expired') {
      throw new SnowflockError('E_TICKET_EXPIRED', `VM ${vmId}: the ticket has expired`);
    }
    const used: Ticket = { ...ticket, state: 'used' };
    this.#close(used);
    return used;
  }

  /** A ticket as it stands, or undefined. */
  get(id: string): Ticket | undefined {
    const ticket = this.#tickets.get(id);
    return ticket && this.#isDue(ticket) ? { ...ticket, state: 'expired' } : ticket;
  }

  /** The open tickets of a VM. */
  ofOwner(vmId: string): Ticket[] {
    return [...this.#tickets.values()].filter(
      (ticket) => ticket.state === 'open' && ticket.ownerVmId === vmId && !this.#isDue(ticket),
    );
  }

  /** Expires what is due. @returns the tickets that expired by this call: release their room. */
  expire(): Ticket[] {
    return this.#expireWhere((ticket) => this.#isDue(ticket));
  }

  /** A VM has ended: its open tickets expire. @returns them: release their room. */
  revoke(vmId: string): Ticket[] {
    return this.#expireWhere((ticket) => ticket.ownerVmId === vmId);
  }

  snapshot(): TicketBookSnapshot {
    return {
      version: 1,
      tickets: [...this.#tickets.values()].map((ticket) => ({
        id: ticket.id,
        owner_vm_id: ticket.ownerVmId,
        granted: ticket.granted,
        placements: ticket.placements.map(({ host, clones }) => ({ host, clones })),
        vmids: [...ticket.vmids],
        memory_bytes: ticket.need.memoryBytes,
        vcpus: ticket.need.vcpus,
        expires_ms: ticket.expiresMs,
        state: ticket.state,
      })),
    };
  }

  /** Replaces all tickets by those of a snapshot. @throws {SnowflockError} `E_CORRUPT`. */
  restore(snapshot: unknown): void {
    if (!Value.Check(TicketBookSnapshot, snapshot)) {
      throw new SnowflockError('E_CORRUPT', 'the record of tickets is not valid');
    }
    this.#tickets.clear();
    for (const record of snapshot.tickets) {
      this.#tickets.set(record.id, {
        id: record.id,
        ownerVmId: record.owner_vm_id,
        granted: record.granted,
        placements: record.placements,
        vmids: record.vmids,
        need: { memoryBytes: record.memory_bytes, vcpus: record.vcpus },
        expiresMs: record.expires_ms,
        state: record.state,
      });
    }
  }

  // Nothing but expire() and revoke() makes a ticket expired for good: each is reported once.
  #isDue(ticket: Ticket): boolean {
    return ticket.state === 'open' && ticket.expiresMs <= this.#now();
  }

  #expireWhere(due: (ticket: Ticket) => boolean): Ticket[] {
    const expired: Ticket[] = [];
    for (const ticket of [...this.#tickets.values()]) {
      if (ticket.state !== 'open' || !due(ticket)) continue;
      const closed: Ticket = { ...ticket, state: 'expired' };
      this.#close(closed);
      expired.push(closed);
    }
    return expired;
  }

  #close(ticket: Ticket): void {
    // Put last: closed tickets are forgotten in the order in which they were closed.
    this.#tickets.delete(ticket.id);
    this.#tickets.set(ticket.id, ticket);
    let closed = 0;
    for (const other of this.#tickets.values()) if (other.state !== 'open') closed += 1;
    for (const other of this.#tickets.values()) {
      if (closed <= this.#closedMax) break;
      if (other.state === 'open') continue;
      this.#tickets.delete(other.id);
      closed -= 1;
    }
  }
}

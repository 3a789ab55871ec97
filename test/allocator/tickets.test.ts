import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { TicketBook } from '../../src/allocator/index.js';

const need = { memoryBytes: 512 * 2 ** 20, vcpus: 1 };
const placements = [
  { host: 'h1', clones: 2 },
  { host: 'h2', clones: 1 },
];
const request = { ownerVmId: 'vm-a', placements, need, ttlMs: 1000 };

function open(options: { openPerOwnerMax?: number; closedMax?: number } = {}) {
  const at = { ms: 5000 };
  return { at, book: new TicketBook({ ...options, now: () => at.ms }) };
}
const refused = (code: string) => expect.objectContaining({ code });

describe('tickets', () => {
  it('are good for one fork of their owner', () => {
    const { book } = open();
    const ticket = book.issue(request);
    expect(ticket).toMatchObject({ granted: 3, placements, expiresMs: 6000, state: 'open' });
    expect(ticket.id).toMatch(/^[0-9a-f]{32}$/);
    expect(() => book.use(ticket.id, 'vm-b')).toThrowError(refused('E_TICKET_OWNER'));
    expect(book.use(ticket.id, 'vm-a')).toEqual({ ...ticket, state: 'used' });
    expect(() => book.use(ticket.id, 'vm-a')).toThrowError(refused('E_TICKET_USED'));
    expect(() => book.use(ticket.id, 'vm-b')).toThrowError(refused('E_TICKET_OWNER'));
  });

  it('are unknown when made up, and the answer does not repeat what was sent', () => {
    const { book } = open();
    book.issue(request);
    for (const id of ['', '__proto__', 'f'.repeat(32), 'x'.repeat(10_000)]) {
      expect(() => book.use(id, 'vm-a')).toThrowError(refused('E_TICKET_UNKNOWN'));
      expect(() => book.use(id, 'vm-a')).toThrowError('VM vm-a: no such ticket');
    }
  });

  it('expire, and are reported once for their room to be released', () => {
    const { at, book } = open();
    const first = book.issue(request);
    const second = book.issue({ ...request, ttlMs: 2000 });
    at.ms += 1000;
    expect(() => book.use(first.id, 'vm-a')).toThrowError(refused('E_TICKET_EXPIRED'));
    expect(book.get(first.id)?.state).toBe('expired');
    expect(book.ofOwner('vm-a')).toEqual([second]);
    expect(book.expire()).toEqual([{ ...first, state: 'expired' }]);
    expect(book.expire()).toEqual([]);
    expect(() => book.use(first.id, 'vm-a')).toThrowError(refused('E_TICKET_EXPIRED'));
    expect(book.use(second.id, 'vm-a').state).toBe('used');
  });

  it('go with the VM that holds them', () => {
    const { book } = open();
    const mine = book.issue(request);
    const other = book.issue({ ...request, ownerVmId: 'vm-b' });
    expect(book.revoke('vm-a').map((ticket) => ticket.id)).toEqual([mine.id]);
    expect(() => book.use(mine.id, 'vm-a')).toThrowError(refused('E_TICKET_EXPIRED'));
    expect(book.use(other.id, 'vm-b').state).toBe('used');
  });

  it('are limited for each VM, and memory of old ones is limited', () => {
    const { at, book } = open({ openPerOwnerMax: 2, closedMax: 3 });
    const first = book.issue(request);
    book.issue(request);
    expect(() => book.issue(request)).toThrowError(refused('E_CAPACITY'));
    book.issue({ ...request, ownerVmId: 'vm-b' });
    at.ms += 1000;
    book.issue(request);
    book.expire();
    book.use(book.issue(request).id, 'vm-a');
    expect(book.snapshot().tickets).toHaveLength(4);
    expect(() => book.use(first.id, 'vm-a')).toThrowError(refused('E_TICKET_UNKNOWN'));
  });

  it('survive a restart in their states', () => {
    const { at, book } = open();
    const used = book.issue(request);
    book.use(used.id, 'vm-a');
    const live = book.issue({ ...request, ttlMs: 2000 });
    const next = new TicketBook({ now: () => at.ms });
    next.restore(JSON.parse(JSON.stringify(book.snapshot())));
    expect(next.get(live.id)).toEqual(live);
    expect(() => next.use(used.id, 'vm-a')).toThrowError(refused('E_TICKET_USED'));
    expect(next.use(live.id, 'vm-a').placements).toEqual(placements);
    expect(() => next.restore({ version: 1, tickets: [{}] })).toThrowError(refused('E_CORRUPT'));
  });

  it('are used once at most, whatever the order of calls', () => {
    const step = fc.oneof(
      fc.record({
        op: fc.constant('issue' as const),
        vm: fc.constantFrom('a', 'b'),
        ttlMs: fc.integer({ min: 1, max: 50 }),
      }),
      fc.record({
        op: fc.constant('use' as const),
        vm: fc.constantFrom('a', 'b'),
        nth: fc.nat(20),
      }),
      fc.record({ op: fc.constant('wait' as const), ms: fc.integer({ min: 1, max: 40 }) }),
      fc.record({ op: fc.constant('restart' as const) }),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 80 }), (steps) => {
        const { at, book } = open();
        let current = book;
        const issued: { id: string; vm: string; until: number; used: boolean }[] = [];
        for (const one of steps) {
          if (one.op === 'wait') at.ms += one.ms;
          else if (one.op === 'restart') {
            const snapshot = current.snapshot();
            current = new TicketBook({ now: () => at.ms });
            current.restore(snapshot);
          } else if (one.op === 'issue') {
            const ticket = current.issue({ ...request, ownerVmId: one.vm, ttlMs: one.ttlMs });
            issued.push({ id: ticket.id, vm: one.vm, until: ticket.expiresMs, used: false });
          } else {
            const ticket = issued[one.nth];
            if (!ticket) continue;
            if (ticket.vm === one.vm && !ticket.used && at.ms < ticket.until) {
              expect(current.use(ticket.id, one.vm).granted).toBe(3);
              ticket.used = true;
            } else expect(() => current.use(ticket.id, one.vm)).toThrow();
          }
        }
      }),
    );
  });
});

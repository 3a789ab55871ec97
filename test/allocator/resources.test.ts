import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Resources } from '../../src/allocator/index.js';

const MIB = 2 ** 20;
const limits = { cpus: 2, memoryBytes: 1024 * MIB, overcommit: { cpus: 2, memory: 1 } };
const need = { memoryBytes: 512 * MIB, vcpus: 1 };

function book(at = { ms: 1000 }) {
  return { at, resources: new Resources(limits, () => at.ms) };
}

describe('resources of a host', () => {
  it('are given up to the limit and no further', () => {
    const { resources } = book();
    resources.reserve('a', need, 1000);
    resources.reserve('b', need, 1000);
    expect(() => resources.reserve('c', need, 1000)).toThrowError(
      expect.objectContaining({
        code: 'E_CAPACITY',
        message: 'c needs 512 MiB and 1 vCPUs, 0 MiB and 2 are free',
      }),
    );
    expect(resources.release('a')).toBe(true);
    expect(resources.release('a')).toBe(false);
    resources.reserve('c', need, 1000);
    expect(resources.free()).toEqual({ memoryBytes: 0, vcpus: 2 });
  });

  it('lapse when reserved and not used, and stay when committed', () => {
    const { at, resources } = book();
    resources.reserve('a', need, 1000);
    resources.reserve('b', need, 1000);
    resources.commit('b');
    at.ms += 999;
    expect(resources.used().vcpus).toBe(2);
    at.ms += 1;
    expect(resources.expire()).toEqual(['a']);
    expect(resources.has('a')).toBe(false);
    expect(resources.has('b')).toBe(true);
    expect(() => resources.commit('a')).toThrowError(
      expect.objectContaining({ code: 'E_NOT_FOUND' }),
    );
    resources.commit('b');
  });

  it('survive a restart, reservations with the time they have left', () => {
    const { at, resources } = book();
    resources.reserve('a', need, 1000);
    resources.reserve('b', need, 500);
    resources.commit('b');
    const next = new Resources(limits, () => at.ms);
    next.restore(JSON.parse(JSON.stringify(resources.snapshot())));
    expect(next.used()).toEqual(resources.used());
    at.ms += 1000;
    expect(next.expire()).toEqual(['a']);
    expect(next.used()).toEqual(need);
  });

  it('keep account of what runs when limits were lowered, and grant nothing more', () => {
    const { at, resources } = book();
    for (const id of ['a', 'b']) {
      resources.reserve(id, need, 1000);
      resources.commit(id);
    }
    const lower = { ...limits, memoryBytes: 512 * MIB };
    const next = new Resources(lower, () => at.ms);
    next.restore(resources.snapshot());
    expect(next.used().memoryBytes).toBe(1024 * MIB);
    expect(next.free().memoryBytes).toBe(0);
  });

  it('refuse a damaged record and keep what they had', () => {
    const { resources } = book();
    resources.reserve('a', need, 1000);
    const good = resources.snapshot();
    const twice = { ...good, entries: [...good.entries, ...good.entries] };
    for (const bad of [undefined, {}, { version: 2, entries: [] }, twice]) {
      expect(() => resources.restore(bad)).toThrowError(
        expect.objectContaining({ code: 'E_CORRUPT' }),
      );
    }
    expect(resources.has('a')).toBe(true);
  });

  it('refuse what is no need', () => {
    const { resources } = book();
    for (const bad of [0, -1, 0.5, Number.NaN, Number.POSITIVE_INFINITY]) {
      for (const wrong of [
        { memoryBytes: bad, vcpus: 1 },
        { memoryBytes: 1, vcpus: bad },
      ]) {
        expect(() => resources.reserve('x', wrong, 1000)).toThrowError(
          expect.objectContaining({ code: 'E_ARGUMENT' }),
        );
      }
    }
    resources.reserve('x', need, 1000);
    expect(() => resources.reserve('x', need, 1000)).toThrowError(
      expect.objectContaining({ code: 'E_EXISTS' }),
    );
  });

  it('are never over-committed, whatever is asked in whatever order', () => {
    const id = fc.constantFrom('a', 'b', 'c', 'd', 'e', 'f');
    const step = fc.oneof(
      fc.record({
        op: fc.constant('reserve' as const),
        id,
        memoryBytes: fc.integer({ min: 1, max: 700 }).map((n) => n * MIB),
        vcpus: fc.integer({ min: 1, max: 3 }),
        ttlMs: fc.integer({ min: 1, max: 50 }),
      }),
      fc.record({ op: fc.constant('commit' as const), id }),
      fc.record({ op: fc.constant('release' as const), id }),
      fc.record({ op: fc.constant('wait' as const), ms: fc.integer({ min: 1, max: 60 }) }),
      fc.record({ op: fc.constant('restart' as const) }),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const at = { ms: 0 };
        let { resources } = book(at);
        // The same account kept the slow way.
        const held = new Map<string, { memoryBytes: number; vcpus: number; until: number }>();
        const sum = () => {
          for (const [key, value] of held) if (value.until <= at.ms) held.delete(key);
          const all = [...held.values()];
          return {
            memoryBytes: all.reduce((total, one) => total + one.memoryBytes, 0),
            vcpus: all.reduce((total, one) => total + one.vcpus, 0),
          };
        };
        for (const one of steps) {
          const before = sum();
          if (one.op === 'wait') at.ms += one.ms;
          else if (one.op === 'release') {
            expect(resources.release(one.id)).toBe(held.delete(one.id));
          } else if (one.op === 'restart') {
            const snapshot = resources.snapshot();
            resources = book(at).resources;
            resources.restore(snapshot);
          } else if (one.op === 'commit') {
            const entry = held.get(one.id);
            if (entry) {
              resources.commit(one.id);
              entry.until = Number.POSITIVE_INFINITY;
            } else expect(() => resources.commit(one.id)).toThrow();
          } else {
            const fits =
              !held.has(one.id) &&
              before.memoryBytes + one.memoryBytes <= 1024 * MIB &&
              before.vcpus + one.vcpus <= 4;
            if (fits) {
              resources.reserve(one.id, one, one.ttlMs);
              held.set(one.id, { ...one, until: at.ms + one.ttlMs });
            } else expect(() => resources.reserve(one.id, one, one.ttlMs)).toThrow();
          }
          expect(resources.used()).toEqual(sum());
          expect(resources.used().memoryBytes).toBeLessThanOrEqual(1024 * MIB);
          expect(resources.used().vcpus).toBeLessThanOrEqual(4);
        }
      }),
    );
  });
});

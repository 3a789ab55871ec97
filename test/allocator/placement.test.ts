import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { planPlacement, Resources, slotsOf } from '../../src/allocator/index.js';

const MIB = 2 ** 20;
const need = { memoryBytes: 512 * MIB, vcpus: 1 };
const host = (name: string, slots: number, vcpus = slots) => ({
  host: name,
  memoryBytes: slots * need.memoryBytes,
  vcpus,
});

describe('placement', () => {
  it('spreads clones evenly', () => {
    const hosts = ['h1', 'h2', 'h3', 'h4'].map((name) => host(name, 10));
    expect(planPlacement(8, need, hosts)).toEqual({
      granted: 8,
      placements: hosts.map(({ host: name }) => ({ host: name, clones: 2 })),
    });
  });

  it('prefers the host with the most room', () => {
    const hosts = [host('h1', 2), host('h2', 7), host('h3', 4)];
    expect(planPlacement(1, need, hosts).placements).toEqual([{ host: 'h2', clones: 1 }]);
    expect(planPlacement(5, need, hosts).placements).toEqual([
      { host: 'h1', clones: 1 },
      { host: 'h2', clones: 2 },
      { host: 'h3', clones: 2 },
    ]);
  });

  it('grants fewer than asked when no more fit, and says so when none does', () => {
    expect(planPlacement(9, need, [host('h1', 2), host('h2', 3)])).toEqual({
      granted: 5,
      placements: [
        { host: 'h1', clones: 2 },
        { host: 'h2', clones: 3 },
      ],
    });
    const none = [host('h1', 0), host('h2', 5, 0), { ...host('h3', 5), memoryBytes: 511 * MIB }];
    for (const hosts of [none, []]) {
      expect(() => planPlacement(1, need, hosts)).toThrowError(
        expect.objectContaining({
          code: 'E_CAPACITY',
          message: 'no host has 512 MiB and 1 vCPUs free for a clone',
        }),
      );
    }
  });

  it('leaves out excluded hosts and keeps to a number for each', () => {
    const hosts = [host('h1', 9), host('h2', 9)];
    expect(planPlacement(4, need, hosts, { exclude: ['h1'] }).placements).toEqual([
      { host: 'h2', clones: 4 },
    ]);
    expect(planPlacement(4, need, hosts, { perHostMax: 1 }).granted).toBe(2);
  });

  it('refuses numbers that cannot be', () => {
    for (const n of [0, -1, 1.5, 65_536, Number.NaN]) {
      expect(() => planPlacement(n, need, [host('h1', 9)])).toThrowError(
        expect.objectContaining({ code: 'E_ARGUMENT' }),
      );
    }
  });

  const hostsOf = fc
    .array(
      fc.record({
        memoryBytes: fc.integer({ min: 0, max: 20 }).map((n) => n * 300 * MIB),
        vcpus: fc.integer({ min: 0, max: 12 }),
      }),
      { maxLength: 8 },
    )
    .map((all) => all.map((one, at) => ({ host: `h${at + 1}`, ...one })));
  const needs = fc.record({
    memoryBytes: fc.integer({ min: 1, max: 6 }).map((n) => n * 100 * MIB),
    vcpus: fc.integer({ min: 1, max: 4 }),
  });

  it('grants all that was asked or all that fits, fairly, and every host can honour it', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 100 }), needs, hostsOf, (n, each, hosts) => {
        const room = hosts.reduce((sum, one) => sum + slotsOf(one, each), 0);
        if (room === 0) {
          expect(() => planPlacement(n, each, hosts)).toThrow();
          return;
        }
        const plan = planPlacement(n, each, hosts);
        expect(plan.granted).toBe(Math.min(n, room));
        expect(plan.placements.reduce((sum, one) => sum + one.clones, 0)).toBe(plan.granted);
        const clones = new Map(plan.placements.map((one) => [one.host, one.clones]));
        const largest = Math.max(...clones.values());
        for (const one of hosts) {
          const here = clones.get(one.host) ?? 0;
          if (here < largest - 1) expect(here).toBe(slotsOf(one, each));
          const resources = new Resources({
            cpus: one.vcpus,
            memoryBytes: one.memoryBytes,
            overcommit: { cpus: 1, memory: 1 },
          });
          for (let at = 0; at < here; at++) resources.reserve(`c${at}`, each, 1000);
        }
      }),
    );
  });
});

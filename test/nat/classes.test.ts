/** Classes of addresses and ports answer as the rules do that are asked one after the other. */
import { randomBytes } from 'node:crypto';
import { expect, test } from 'vitest';
import { type Classes, type ClassRule, classify } from '../../src/nat/classes.js';
import { joinRanges } from '../../src/nat/policy.js';
import { Random } from '../netback-filter/generate.js';

const SEED = Number(process.env.SEED ?? randomBytes(4).readUInt32LE());
const ADDRESS_LAST = 0xffff_ffff;

/** The rule that decides, by looking up as the kernel does. */
function answer({ classes, addresses }: Classes, address: number, port: number) {
  const within = addresses.filter((it) => it.first <= address && address <= it.last);
  expect(within.length).toBeLessThanOrEqual(1);
  const ports = classes[within[0]?.class ?? -1] ?? [];
  const found = ports.filter((it) => it.first <= port && port <= it.last);
  expect(found.length).toBeLessThanOrEqual(1);
  return found[0]?.rule;
}

test('generated rules, at all their edges: the first rule with address and port decides', () => {
  console.log(`SEED=${SEED}`);
  const random = new Random(SEED);
  const near = [0, 1, 5, 10, 80, 90, 1000, 65_534, 65_535];
  for (let round = 0; round < 200; round++) {
    const range = (from: readonly number[]) => {
      const [a, b] = [random.pick(from), random.pick(from)];
      return { first: Math.min(a, b), last: Math.max(a, b) };
    };
    const rules = Array.from({ length: 1 + random.below(8) }, (_, i): ClassRule => {
      const some = Array.from({ length: 1 + random.below(3) }, () =>
        range([0, 1, 9, 100, 101, 200, 0x0a00_0000, ADDRESS_LAST - 1, ADDRESS_LAST]),
      );
      const ports = Array.from({ length: 1 + random.below(3) }, () => range(near));
      const addresses = joinRanges(some);
      return { name: `r${i}`, addresses, ...(random.chance(3) ? {} : { ports }) };
    });
    const found = classify(rules);
    const edges = rules.flatMap((rule) => rule.addresses.flatMap((it) => [it.first, it.last]));
    for (const at of new Set(edges.flatMap((edge) => [edge - 1, edge, edge + 1]))) {
      if (at < 0 || at > ADDRESS_LAST) continue;
      for (const port of near.flatMap((it) => [Math.max(0, it - 1), it])) {
        const expected = rules.find(
          (rule) =>
            rule.addresses.some((it) => it.first <= at && at <= it.last) &&
            (rule.ports ?? [{ first: 0, last: 65_535 }]).some(
              (it) => it.first <= port && port <= it.last,
            ),
        );
        const what = `SEED=${SEED} ${at}:${port} ${JSON.stringify(rules)}`;
        expect(answer(found, at, port), what).toBe(expected?.name);
      }
    }
  }
});

test('rules that overlap in too many ways are refused', () => {
  const all = { first: 0, last: ADDRESS_LAST };
  const wide = Array.from({ length: 300 }, (_, i): ClassRule => {
    const ports = Array.from({ length: 60 }, (_, p) => ({
      first: i * 200 + p * 3,
      last: i * 200 + p * 3,
    }));
    return { name: `wide${i}`, addresses: [all], ports };
  });
  const single = Array.from({ length: 10 }, (_, i): ClassRule => {
    const addresses = [{ first: i * 2, last: i * 2 }];
    return { name: `one${i}`, addresses, ports: [{ first: 65_000 + i, last: 65_000 + i }] };
  });
  expect(classify(wide).classes.length).toBe(1);
  expect(() => classify([...single, ...wide])).toThrow(
    expect.objectContaining({ code: 'E_CONFIG' }),
  );
});

import { expect, test } from 'vitest';
import { loadAddon } from '../../src/common/native.js';
import type { McdistPolicyOptions } from '../../src/mcdist/mcdist.js';

interface Policy {
  heard(said: {
    peer: number;
    receiveRateBytesPerS: number;
    subscribe: boolean;
    nowMs: number;
  }): void;
  report(said: { peer: number; block: number; missing: number[]; nowMs: number }): string;
  next(nowMs: number, wireBytes: number): { kind: string; page: number; pushed: boolean } | null;
  state(nowMs: number): { rateBytesPerS: number; noise: number; cuts: number; cutsUndone: number };
}
const { McdistPolicy } = loadAddon<{
  McdistPolicy: new (options: McdistPolicyOptions, pages: number) => Policy;
}>('dataplane');

const PAGE_WIRE_BYTES = 4300;

/** Numbers from 0 to 1 that are the same each time. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/**
 * A push for `ms` in virtual time: each receiver's link takes `linkBytesPerS`, drops what is more
 * once 256 KiB wait, and loses `loss` of the symbols at random. What a receiver lacks of a block is
 * reported 5 ms after it was sent; rates are said each 20 ms, as of the last 40.
 */
function push(options: {
  receivers: number;
  linkBytesPerS: number;
  loss: number;
  ms: number;
  policy?: McdistPolicyOptions;
  lie?: (peer: number, rate: number) => number;
}) {
  const policy = new McdistPolicy(
    { pushDelayMs: 0, endgameShare: 2, ...options.policy },
    8_000_000,
  );
  const draw = random(7);
  const queue = new Array<number>(options.receivers).fill(0);
  const got = Array.from({ length: options.receivers }, () => [0]);
  const missing = Array.from({ length: options.receivers }, () => new Map<number, number[]>());
  const due: { at: number; peer: number; block: number }[] = [];
  const rates: number[] = [];
  let sentSymbols = 0;
  let lostSymbols = 0;
  for (let now = 0; now <= options.ms; now++) {
    got.forEach((bytes, peer) => {
      queue[peer] = Math.max(0, (queue[peer] ?? 0) - options.linkBytesPerS / 1000);
      bytes.push(bytes.at(-1) ?? 0);
      if (now % 20 !== 0) return;
      const rate = ((bytes.at(-1) ?? 0) - (bytes.at(-41) ?? 0)) / 0.04;
      const said = options.lie?.(peer, rate) ?? rate;
      policy.heard({ peer: peer + 1, receiveRateBytesPerS: said, subscribe: true, nowMs: now });
    });
    for (let item = policy.next(now, PAGE_WIRE_BYTES); item !== null; ) {
      if (item.kind === 'page' && item.pushed) {
        for (let peer = 0; peer < options.receivers; peer++) {
          const block = Math.floor(item.page / 32);
          for (let fragment = 0; fragment < 3; fragment++) {
            sentSymbols++;
            const full = (queue[peer] ?? 0) > 256 << 10;
            if (full || draw() < options.loss) {
              lostSymbols++;
              const list = missing[peer]?.get(block) ?? [];
              if (list.length === 0) due.push({ at: now + 5, peer, block });
              list.push((item.page % 32) * 3 + fragment);
              missing[peer]?.set(block, list);
            } else {
              queue[peer] = (queue[peer] ?? 0) + PAGE_WIRE_BYTES / 3;
              const bytes = got[peer] ?? [];
              bytes[bytes.length - 1] = (bytes.at(-1) ?? 0) + PAGE_WIRE_BYTES / 3;
            }
          }
        }
      }
      item = policy.next(now, PAGE_WIRE_BYTES);
    }
    while ((due[0]?.at ?? Number.POSITIVE_INFINITY) <= now) {
      const { peer, block } = due.shift() as { peer: number; block: number };
      const list = missing[peer]?.get(block) ?? [];
      missing[peer]?.delete(block);
      policy.report({ peer: peer + 1, block, missing: list, nowMs: now });
    }
    rates.push(policy.state(now).rateBytesPerS);
  }
  const received = got.map((bytes) => bytes.at(-1) ?? 0);
  return { state: policy.state(options.ms), rates, received, lost: lostSymbols / sentSymbols };
}

for (const receivers of [1, 8]) {
  for (const loss of [0, 0.01, 0.05]) {
    test(`${receivers} receivers, ${loss * 100}% lost at random: their links are found and used`, () => {
      const linkBytesPerS = 125e6;
      const ms = 2500;
      const { state, received, lost } = push({ receivers, linkBytesPerS, loss, ms });
      const used = Math.min(...received) / (linkBytesPerS * (ms / 1000));
      console.log(
        `${(100 * used).toFixed(1)}% used, ${(100 * lost).toFixed(1)}% lost, ` +
          `${state.cuts} cuts, ${state.cutsUndone} undone`,
      );
      expect(used).toBeGreaterThan(0.88);
      expect(lost).toBeLessThan(loss + 0.04);
    });
  }
}

test('a slow link is found in a few windows', () => {
  const { rates, received } = push({ receivers: 2, linkBytesPerS: 12.5e6, loss: 0, ms: 2000 });
  expect(rates[400]).toBeLessThan(20e6);
  expect(Math.min(...received)).toBeGreaterThan(0.8 * 12.5e6 * 2);
});

test('random loss of 20% does not slow a link that has room', () => {
  const { rates, state } = push({
    receivers: 4,
    linkBytesPerS: 1e9,
    loss: 0.2,
    ms: 1500,
    policy: { maxRateBytesPerS: 200e6 },
  });
  expect(state.cutsUndone).toBeGreaterThan(0);
  expect(state.noise).toBeGreaterThan(0.15);
  expect(rates.at(-1)).toBeGreaterThan(180e6);
});

for (const [name, lie] of [
  ['nothing', () => 0],
  ['more than was sent', () => 1e12],
] as const) {
  test(`a client that says it receives ${name} moves nothing among four`, () => {
    const { received } = push({
      receivers: 4,
      linkBytesPerS: 125e6,
      loss: 0.01,
      ms: 1500,
      lie: (peer, rate) => (peer === 0 ? lie() : rate),
    });
    expect(Math.min(...received)).toBeGreaterThan(0.85 * 125e6 * 1.5);
  });
}

test('with the constants of the paper each loss cuts, and random loss leaves little', () => {
  const paper = {
    recover: 0.75,
    probe: 1,
    lossTolerance: 0,
    learnNoise: false,
    startRateBytesPerS: 200e6,
  };
  const common = { receivers: 2, linkBytesPerS: 125e6, ms: 1500, policy: paper };
  const clean = push({ ...common, loss: 0 });
  expect(clean.state.cuts).toBeGreaterThan(0);
  expect(clean.state.cutsUndone).toBe(0);
  expect(clean.rates.at(-1)).toBeLessThan(0.8 * 125e6);
  const lossy = push({ ...common, loss: 0.05 });
  expect(lossy.state.cuts).toBeGreaterThan(clean.state.cuts);
  expect(lossy.rates.at(-1)).toBeLessThan(0.5 * (clean.rates.at(-1) ?? 0));
});

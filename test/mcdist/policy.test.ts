import { expect, test } from 'vitest';
import { loadAddon } from '../../src/common/native.js';
import type { McdistPolicyOptions } from '../../src/mcdist/mcdist.js';

interface Asked {
  peer?: number;
  page: number;
  urgent?: boolean;
  retry?: boolean;
  fragments?: number;
  nowMs: number;
}
interface Policy {
  request(asked: Asked): string;
  report(peer: number, bytesPerS: number, nowMs: number): void;
  next(
    nowMs: number,
    wireBytes: number,
  ): { page: number; fragments: number; urgent: boolean } | null;
  state(nowMs: number): {
    queued: number;
    rateBytesPerS: number;
    meanReceiveRateBytesPerS: number;
    readyAtMs: number;
    cuts: number;
  };
}
const { McdistPolicy } = loadAddon<{
  McdistPolicy: new (options?: McdistPolicyOptions) => Policy;
}>('dataplane');

const wireBytes = 4384;

test('first come first served, faults before prefetches', () => {
  const policy = new McdistPolicy();
  for (const page of [5, 3]) policy.request({ page, nowMs: 1 });
  for (const page of [9, 1]) policy.request({ page, urgent: true, nowMs: 2 });
  const order = [0, 1, 2, 3].map(() => policy.next(3, wireBytes)?.page);
  expect(order).toEqual([9, 1, 5, 3]);
  expect(policy.next(3, wireBytes)).toBeNull();
});

test('a page queued is not queued twice; a fault moves it to the front', () => {
  const policy = new McdistPolicy();
  policy.request({ page: 1, nowMs: 1 });
  policy.request({ page: 2, nowMs: 1 });
  expect(policy.request({ peer: 2, page: 2, urgent: true, nowMs: 2 })).toBe('merged');
  expect(policy.next(3, wireBytes)).toMatchObject({ page: 2, urgent: true });
  expect(policy.next(3, wireBytes)).toMatchObject({ page: 1, urgent: false });
  expect(policy.state(3).queued).toBe(0);
});

test('lockstep: a page just sent is not sent again, until time or requests have passed', () => {
  const policy = new McdistPolicy({ lockstepWindowMs: 20, lockstepRequests: 3 });
  const ask = (page: number, nowMs: number) => policy.request({ page, urgent: true, nowMs });
  ask(1, 0);
  policy.next(0, wireBytes);
  expect([ask(1, 1), ask(1, 2), ask(1, 3), ask(1, 4)]).toEqual([
    'lockstep',
    'lockstep',
    'lockstep',
    'queued',
  ]);
  ask(2, 10);
  policy.next(10, wireBytes);
  policy.next(10, wireBytes);
  expect(ask(2, 29)).toBe('lockstep');
  expect(ask(2, 31)).toBe('queued');
});

test('a retry is answered, unless it crossed with the answer', () => {
  const policy = new McdistPolicy({ lockstepWindowMs: 1000, retryWindowMs: 5 });
  policy.request({ page: 1, nowMs: 0 });
  policy.next(0, wireBytes);
  expect(policy.request({ page: 1, retry: true, nowMs: 4 })).toBe('lockstep');
  expect(policy.request({ page: 1, retry: true, fragments: 2, nowMs: 6 })).toBe('queued');
  expect(policy.next(6, wireBytes)).toMatchObject({ page: 1, fragments: 2 });
  // Another fragment than the one just sent is no lockstep.
  expect(policy.request({ page: 1, retry: true, fragments: 1, nowMs: 7 })).toBe('queued');
  expect(policy.request({ page: 1, nowMs: 7 })).toBe('merged');
  expect(policy.next(7, wireBytes)).toMatchObject({ page: 1, fragments: 0 });
});

test('the queue and the share of each peer are bounded, urgent and prefetch apart', () => {
  const policy = new McdistPolicy({ queuePages: 10, peerPages: 4 });
  const verdicts = (peer: number, first: number, urgent: boolean) =>
    [0, 1, 2, 3, 4].map((i) => policy.request({ peer, page: first + i, urgent, nowMs: 0 }));
  expect(verdicts(1, 0, false)).toEqual(['queued', 'queued', 'queued', 'queued', 'peer-full']);
  expect(verdicts(1, 100, true).at(-1)).toBe('peer-full');
  verdicts(2, 200, false);
  expect(verdicts(3, 300, false)).toEqual([
    'queued',
    'queued',
    'queue-full',
    'queue-full',
    'queue-full',
  ]);
  expect(policy.state(0).queued).toBe(14);
  // What is sent frees the peer's share.
  for (let i = 0; i < 14; i++) policy.next(1, wireBytes);
  expect(policy.request({ peer: 1, page: 50, nowMs: 1 })).toBe('queued');
});

test('sending keeps to the rate, which rises linearly', () => {
  const policy = new McdistPolicy({ startRateBytesPerS: 1e7, increaseBytesPerSPerS: 1e6 });
  let sent = 0;
  let page = 0;
  policy.request({ page: page++, nowMs: 0 });
  for (let nowMs = 0; nowMs <= 1000; nowMs++) {
    for (let i = 0; i < 8; i++) policy.request({ page: page++, nowMs });
    while (policy.next(nowMs, wireBytes) !== null) sent += wireBytes;
  }
  // 1 s at 10 to 11 MB/s, and the first burst.
  expect(sent).toBeGreaterThan(10.4e6);
  expect(sent).toBeLessThan(10.6e6 + 65536 + wireBytes);
  expect(policy.state(1000).rateBytesPerS).toBeCloseTo(11e6, -4);
  const { readyAtMs } = policy.state(1000);
  expect(policy.next(readyAtMs + 0.001, wireBytes)).not.toBeNull();
});

test('heavy loss cuts the rate to 3/4 of what the clients receive; light loss does not', () => {
  for (const [lostOf100, cuts] of [
    [10, 0],
    [60, 1],
  ] as const) {
    const policy = new McdistPolicy({
      startRateBytesPerS: 1e9,
      minRateBytesPerS: 1e6,
      increaseBytesPerSPerS: 0,
      lossTolerance: 0.25,
      lossIntervalMs: 100,
    });
    policy.report(1, 30e6, 0);
    policy.report(2, 50e6, 0);
    for (let page = 0; page < 100; page++) {
      policy.request({ page, nowMs: 0 });
      policy.next(0, wireBytes);
    }
    for (const peer of [1, 2]) {
      for (let page = 0; page < lostOf100; page++) {
        policy.request({ peer, page, retry: true, nowMs: 50 });
      }
    }
    const state = policy.state(50);
    expect(policy.next(150, wireBytes)).not.toBeNull();
    expect(policy.state(150).cuts).toBe(cuts);
    expect(policy.state(150).rateBytesPerS).toBe(cuts === 0 ? 1e9 : 0.75 * 40e6);
    expect(state.meanReceiveRateBytesPerS).toBe(40e6);
  }
});

test('a long run keeps the memory of what was sent bounded and forgets in time', () => {
  const policy = new McdistPolicy({ lockstepWindowMs: 500, startRateBytesPerS: 1e10 });
  for (let page = 0; page < 200_000; page++) {
    const nowMs = page / 1000;
    policy.request({ page, nowMs });
    expect(policy.next(nowMs, 1)).not.toBeNull();
  }
  // Within the window, but long pushed out by newer ones.
  expect(policy.request({ page: 0, nowMs: 200 })).toBe('queued');
  expect(policy.request({ page: 199_999, nowMs: 200 })).toBe('lockstep');
});

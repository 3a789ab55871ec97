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
interface Sent {
  kind: 'page' | 'parity' | 'announce';
  page: number;
  fragments: number;
  peer: number;
  urgent: boolean;
  repair: boolean;
  pushed: boolean;
  replayed: boolean;
  cursor: number;
  position: number;
  coverId: number;
  coverSymbols: number;
  parityFirst: number;
  parities: number;
}
interface Policy {
  heard(said: {
    peer?: number;
    receiveRateBytesPerS?: number;
    unicastOnly?: boolean;
    subscribe?: boolean;
    history?: boolean;
    roomBytes?: number;
    nowMs: number;
  }): void;
  request(asked: Asked): string;
  report(said: {
    peer?: number;
    block?: number;
    fragments?: number;
    need?: number;
    cover?: number;
    wanted?: number;
    missing: number[];
    nowMs: number;
  }): string;
  next(nowMs: number, wireBytes: number, outcome?: 'zero' | 'refused'): Sent | null;
  state(nowMs: number): {
    queued: number;
    subscribers: number;
    rateBytesPerS: number;
    noise: number;
    meanReceiveRateBytesPerS: number;
    readyAtMs: number;
    cuts: number;
    cutsUndone: number;
    pushing: boolean;
    historyPages: number;
  };
  history(): Buffer;
}
const { McdistPolicy } = loadAddon<{
  McdistPolicy: new (options?: McdistPolicyOptions, pages?: number) => Policy;
}>('dataplane');

const wireBytes = 4300;

/** All that is sent at one time, without announces. */
function drain(policy: Policy, nowMs: number, outcome?: 'zero' | 'refused'): Sent[] {
  const out: Sent[] = [];
  for (let item = policy.next(nowMs, wireBytes, outcome); item !== null; ) {
    if (item.kind !== 'announce') out.push(item);
    item = policy.next(nowMs, wireBytes, outcome);
  }
  return out;
}

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

test('who has part of a page, or joined since it was sent, is answered all the same', () => {
  const policy = new McdistPolicy({ flightWindowMs: 2 });
  for (const peer of [1, 2]) policy.heard({ peer, nowMs: 0 });
  policy.request({ peer: 1, page: 1, urgent: true, nowMs: 0 });
  expect(drain(policy, 10)).toHaveLength(1);
  const ask = (peer: number, fragments: number, nowMs: number) =>
    policy.request({ peer, page: 1, urgent: true, fragments, nowMs });
  expect(ask(2, 4, 11.9)).toBe('lockstep');
  expect(ask(2, 0, 12.1)).toBe('lockstep');
  expect(ask(2, 4, 12.1)).toBe('queued');
  expect(drain(policy, 13)).toMatchObject([{ page: 1, fragments: 4 }]);

  policy.request({ peer: 1, page: 2, urgent: true, nowMs: 20 });
  drain(policy, 20);
  policy.heard({ peer: 3, nowMs: 21 });
  expect(policy.request({ peer: 3, page: 2, nowMs: 21.9 })).toBe('lockstep');
  expect(policy.request({ peer: 2, page: 2, nowMs: 22.1 })).toBe('lockstep');
  expect(policy.request({ peer: 3, page: 2, nowMs: 22.1 })).toBe('queued');
});

test('with many peers more requests in lockstep are ignored', () => {
  const policy = new McdistPolicy({ lockstepRequests: 3 });
  for (let peer = 1; peer <= 10; peer++) policy.heard({ peer, nowMs: 0 });
  policy.request({ page: 1, nowMs: 1 });
  expect(drain(policy, 1)).toHaveLength(1);
  const verdicts = Array.from({ length: 21 }, (_, i) =>
    policy.request({ peer: (i % 10) + 1, page: 1, nowMs: 2 }),
  );
  expect(verdicts.slice(0, 20)).toEqual(Array(20).fill('lockstep'));
  expect(verdicts[20]).toBe('queued');
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

test('a subscription is pushed all pages in order, none twice, and its end is announced', () => {
  const policy = new McdistPolicy({ pushDelayMs: 20, startRateBytesPerS: 1e9 }, 100);
  policy.heard({ peer: 1, subscribe: true, nowMs: 0 });
  policy.request({ peer: 2, page: 5, nowMs: 0 });
  expect(drain(policy, 1).map((item) => item.page)).toEqual([5]);
  expect(drain(policy, 19)).toEqual([]);
  const pushed = drain(policy, 21);
  expect(pushed.map((item) => item.page)).toEqual(
    Array.from({ length: 100 }, (_, page) => page).filter((page) => page !== 5),
  );
  expect(pushed.every((item) => item.pushed && item.cursor === 0 && item.peer === 0)).toBe(true);
  expect(policy.state(22).pushing).toBe(false);
  const after = policy.next(40, wireBytes);
  expect(after).toMatchObject({ kind: 'announce', pushed: false, position: 100 });
  // A late joiner asks for what it missed; nothing starts anew while the first one is there.
  policy.heard({ peer: 3, subscribe: true, nowMs: 100 });
  expect(drain(policy, 200)).toEqual([]);
  // Long after, with nobody else: all of it again.
  policy.heard({ peer: 4, subscribe: true, nowMs: 10_000 });
  expect(drain(policy, 10_100)).toHaveLength(100);
});

test('a push begins at once when all who are there subscribed and nobody is new', () => {
  const policy = new McdistPolicy({ pushDelayMs: 20, startRateBytesPerS: 1e9 }, 100);
  for (const peer of [1, 2]) policy.heard({ peer, nowMs: 0 });
  policy.heard({ peer: 1, subscribe: true, nowMs: 100 });
  expect(drain(policy, 130)).toEqual([]); // the other one may follow
  policy.heard({ peer: 2, subscribe: true, nowMs: 131 });
  expect(drain(policy, 131)).toHaveLength(100);
});

test('who is there and does not subscribe is waited for twice as long as a newcomer', () => {
  const policy = new McdistPolicy({ pushDelayMs: 20, startRateBytesPerS: 1e9 }, 100);
  for (const peer of [1, 2]) policy.heard({ peer, nowMs: 0 });
  policy.heard({ peer: 1, subscribe: true, nowMs: 100 });
  expect(drain(policy, 139)).toEqual([]);
  expect(drain(policy, 141)).toHaveLength(100);
});

test('no more is pushed than the receivers have room for, but for a trickle', () => {
  const policy = new McdistPolicy({ pushDelayMs: 0, startRateBytesPerS: 1e9 }, 100_000);
  const pages = 20;
  for (const peer of [1, 2]) {
    policy.heard({ peer, subscribe: true, roomBytes: pages * peer * wireBytes, nowMs: 0 });
  }
  const sent = (nowMs: number) => drain(policy, nowMs).length;
  // To the one that has least; then a page each millisecond, see min_rate.
  let first = 0;
  for (let nowMs = 0; nowMs < 10; nowMs += 0.1) first += sent(nowMs);
  expect(first).toBeGreaterThanOrEqual(pages);
  expect(first).toBeLessThanOrEqual(pages + 11);
  for (const peer of [1, 2]) {
    policy.heard({ peer, subscribe: true, roomBytes: 1000 * wireBytes, nowMs: 11 });
  }
  let then = 0;
  for (let nowMs = 11; nowMs < 30; nowMs += 0.1) then += sent(nowMs);
  expect(then).toBeGreaterThanOrEqual(1000);
  expect(then).toBeLessThanOrEqual(1020);
});

test('one among four without room slows a push to half the rate at most', () => {
  const rate = 100e6;
  const policy = new McdistPolicy({ pushDelayMs: 0, startRateBytesPerS: rate }, 1_000_000);
  let sent = 0;
  for (let nowMs = 0; nowMs < 200; nowMs += 0.02) {
    if (Math.round(nowMs * 50) % 250 === 0) {
      for (const peer of [1, 2, 3, 4]) {
        const roomBytes = peer === 1 ? 1 : 64 << 20;
        policy.heard({ peer, subscribe: true, receiveRateBytesPerS: rate, roomBytes, nowMs });
      }
    }
    sent += drain(policy, nowMs).length * wireBytes;
  }
  expect(sent).toBeGreaterThan(0.4 * rate * 0.2);
});

test('a push pauses when its subscribers are silent, and goes on for one that comes back', () => {
  const policy = new McdistPolicy({ subscriberSilenceMs: 500, startRateBytesPerS: 1e6 }, 10_000);
  policy.heard({ peer: 1, subscribe: true, nowMs: 0 });
  let sent = 0;
  for (let nowMs = 0; nowMs < 1000; nowMs += 10) sent += drain(policy, nowMs).length;
  expect(policy.state(1000)).toMatchObject({ pushing: false, subscribers: 0 });
  expect(sent).toBeGreaterThan(100);
  expect(sent).toBeLessThan(200);
  policy.heard({ peer: 1, subscribe: true, nowMs: 1100 });
  expect(drain(policy, 1110)[0]).toMatchObject({ pushed: true, page: sent });
});

test('faults go before a push, prefetches in turn with it', () => {
  const policy = new McdistPolicy({ pushDelayMs: 0, startRateBytesPerS: 1e9 }, 100);
  policy.heard({ peer: 1, subscribe: true, nowMs: 0 });
  for (const page of [90, 91]) policy.request({ peer: 1, page, urgent: true, nowMs: 1 });
  for (const page of [80, 81]) policy.request({ peer: 2, page, nowMs: 1 });
  const order = drain(policy, 1).map((item) => item.page);
  expect(order.slice(0, 2)).toEqual([90, 91]);
  expect(order.slice(2, 6).filter((page) => page >= 80)).toEqual([80, 81]);
  expect(order.slice(2, 6).filter((page) => page < 80)).toEqual([0, 1]);
});

test('one answer repairs different losses: as many parities as the worst reporter lacks', () => {
  const policy = new McdistPolicy({ repairGatherMs: 3, push: 'off' }, 1000);
  for (const peer of [1, 2, 3]) policy.heard({ peer, subscribe: true, nowMs: 0 });
  const losses = [[1, 2], [40, 41, 95], [2]];
  losses.forEach((missing, i) => {
    expect(policy.report({ peer: i + 1, block: 2, missing, nowMs: 1 })).toBe('taken');
  });
  expect(drain(policy, 3)).toEqual([]);
  const [parity, ...rest] = drain(policy, 4.1);
  expect(rest).toEqual([]);
  expect(parity).toMatchObject({ kind: 'parity', page: 64, fragments: 3, repair: true });
  expect(parity).toMatchObject({ coverSymbols: 5, parityFirst: 0, parities: 3 });
  // Reported before it can have come: on its way.
  expect(policy.report({ peer: 2, block: 2, missing: [40, 41, 95], nowMs: 5 })).toBe('on-its-way');
  // One parity was lost too: the next index of the same cover.
  const cover = parity?.coverId ?? 0;
  policy.report({ peer: 2, block: 2, missing: [40, 41, 95], need: 1, cover, nowMs: 40 });
  expect(drain(policy, 44)).toMatchObject([{ coverId: cover, parityFirst: 3, parities: 1 }]);
  // Something else is lacking: another cover.
  policy.report({ peer: 1, block: 2, missing: [50], nowMs: 80 });
  policy.report({ peer: 2, block: 2, missing: [51], nowMs: 80 });
  const [other] = drain(policy, 84);
  expect(other).toMatchObject({ coverSymbols: 2, parityFirst: 0, parities: 1 });
  expect(other?.coverId).not.toBe(cover);
});

test('a loss of one receiver alone is repaired by the symbols themselves, at once', () => {
  const policy = new McdistPolicy({ push: 'off' }, 1000);
  policy.heard({ peer: 1, subscribe: true, nowMs: 0 });
  policy.report({ peer: 1, block: 0, missing: [3, 4, 5, 10], nowMs: 1 });
  expect(drain(policy, 1)).toMatchObject([
    { kind: 'page', page: 1, fragments: 0, repair: true },
    { kind: 'page', page: 3, fragments: 0b010, repair: true },
  ]);
  // Only what is wanted there is sent again.
  policy.report({ peer: 1, block: 1, missing: [0, 95], wanted: 1, nowMs: 100 });
  expect(drain(policy, 100)).toMatchObject([{ page: 32, fragments: 0b001 }]);
});

test('without parity the union is sent again; zero pages are told as such', () => {
  const policy = new McdistPolicy({ parity: false, pushDelayMs: 0, startRateBytesPerS: 1e9 }, 64);
  policy.heard({ peer: 1, subscribe: true, nowMs: 0 });
  policy.heard({ peer: 2, subscribe: true, nowMs: 0 });
  drain(policy, 1, 'zero');
  policy.report({ peer: 1, block: 0, missing: [0, 1, 2], nowMs: 100 });
  policy.report({ peer: 2, block: 1, missing: [9], nowMs: 100 });
  expect(drain(policy, 110).map((item) => [item.kind, item.page, item.repair])).toEqual([
    ['page', 0, false],
    ['page', 35, false],
  ]);
});

test('the memory of blocks to repair is bounded', () => {
  const policy = new McdistPolicy({ push: 'off', repairGatherMs: 1000 }, 1 << 20);
  for (const peer of [1, 2]) policy.heard({ peer, subscribe: true, nowMs: 0 });
  const verdicts = new Map<string, number>();
  for (let block = 0; block < 5000; block++) {
    const verdict = policy.report({ block, missing: [block % 96], nowMs: 1 });
    verdicts.set(verdict, (verdicts.get(verdict) ?? 0) + 1);
  }
  expect([...verdicts]).toEqual([
    ['taken', 4096],
    ['full', 904],
  ]);
});

test('who multicast does not reach is answered alone, and is not pushed to', () => {
  const policy = new McdistPolicy({ pushDelayMs: 0, startRateBytesPerS: 1e9 }, 100);
  policy.heard({ peer: 1, subscribe: true, unicastOnly: true, nowMs: 0 });
  policy.heard({ peer: 2, nowMs: 0 });
  policy.request({ peer: 1, page: 3, nowMs: 1 });
  expect(policy.request({ peer: 2, page: 3, nowMs: 1 })).toBe('queued');
  expect(drain(policy, 1).map((item) => item.peer)).toEqual([1, 0]);
  expect(policy.request({ peer: 1, page: 3, nowMs: 2 })).toBe('lockstep');
});

test('end-game: by unicast when most was sent, or nobody else was heard for long', () => {
  const most = new McdistPolicy({ endgameShare: 0.5 }, 10);
  for (const peer of [1, 2]) most.heard({ peer, nowMs: 0 });
  for (let page = 0; page < 6; page++) {
    most.request({ peer: 1, page, nowMs: 1 });
    expect(drain(most, 1)).toMatchObject([{ page, peer: 0 }]);
  }
  most.request({ peer: 2, page: 8, nowMs: 2000 });
  most.request({ peer: 2, page: 1, nowMs: 2000 });
  expect(drain(most, 2000)).toMatchObject([
    { page: 8, peer: 0 },
    { page: 1, peer: 2 },
  ]);

  const silent = new McdistPolicy({ endgameSilenceMs: 100 }, 10);
  silent.heard({ peer: 1, nowMs: 0 });
  silent.heard({ peer: 2, nowMs: 90 });
  silent.request({ peer: 2, page: 1, nowMs: 90 });
  expect(drain(silent, 90)).toMatchObject([{ peer: 0 }]);
  silent.heard({ peer: 2, nowMs: 150 });
  silent.request({ peer: 2, page: 2, nowMs: 150 });
  expect(drain(silent, 150)).toMatchObject([{ peer: 2 }]);
});

test('disjoint regions are not pushed and are answered by unicast', () => {
  const policy = new McdistPolicy({ pushDelayMs: 0, disjoint: [{ first: 10, count: 80 }] }, 100);
  for (const peer of [1, 2]) policy.heard({ peer, subscribe: true, nowMs: 0 });
  expect(drain(policy, 1)).toHaveLength(20);
  policy.request({ peer: 2, page: 50, nowMs: 2 });
  expect(drain(policy, 2)).toMatchObject([{ page: 50, peer: 2 }]);
});

test("the paper's push starts behind each requested page, in idle time, nothing twice", () => {
  const policy = new McdistPolicy({ push: 'behind', pushCounters: 2 }, 10);
  policy.heard({ peer: 1, nowMs: 0 });
  policy.heard({ peer: 2, nowMs: 0 });
  for (const page of [2, 7]) policy.request({ peer: 1, page, urgent: true, nowMs: 1 });
  const sent = drain(policy, 1);
  expect(sent.slice(0, 2).map((item) => [item.page, item.pushed])).toEqual([
    [2, false],
    [7, false],
  ]);
  // In turn from behind 2 and behind 7; the former stops where the latter has been.
  expect(sent.slice(2).map((item) => item.page)).toEqual([8, 3, 9, 4, 5, 6]);
  expect(sent.slice(2).every((item) => item.pushed && item.cursor > 0)).toBe(true);
});

test('history: later clones get first what earlier ones faulted on, in that order', () => {
  const policy = new McdistPolicy({ historyPages: 3, lockstepWindowMs: 0, pushDelayMs: 10 }, 100);
  policy.heard({ peer: 1, nowMs: 0 });
  for (const page of [40, 7, 40, 90, 5]) {
    policy.request({ peer: 1, page, urgent: true, nowMs: 1 });
    drain(policy, 1);
  }
  expect(policy.state(1).historyPages).toBe(3);
  // The only one that asks gets them alone.
  for (const nowMs of [50, 55]) policy.heard({ peer: 2, history: true, nowMs });
  expect(drain(policy, 59)).toEqual([]);
  expect(policy.state(59).readyAtMs).toBe(60);
  expect(drain(policy, 60).map((item) => [item.page, item.peer, item.replayed])).toEqual([
    [40, 2, true],
    [7, 2, true],
    [90, 2, true],
  ]);
  // Two at once get them together, but for what the group is sent meanwhile.
  for (const peer of [3, 4]) policy.heard({ peer, history: true, nowMs: 70 });
  policy.request({ peer: 3, page: 7, urgent: true, nowMs: 71 });
  expect(drain(policy, 80).map((item) => [item.page, item.peer, item.replayed])).toEqual([
    [7, 0, false],
    [40, 0, true],
    [90, 0, true],
  ]);
});

test('history: begins with that of the generation before; what nobody faults on for long is left out', () => {
  let policy = new McdistPolicy({ lockstepWindowMs: 0, pushDelayMs: 0 }, 100);
  policy.heard({ peer: 1, nowMs: 0 });
  for (const page of [40, 7, 90]) policy.request({ peer: 1, page, urgent: true, nowMs: 1 });
  const replayed = () => {
    policy.heard({ peer: 2, history: true, nowMs: 50 });
    return drain(policy, 50).map((item) => item.page);
  };
  for (let generation = 0; generation < 8; generation++) {
    const history = policy.history();
    // Smaller: what is beyond its end is no page of it.
    policy = new McdistPolicy(
      { lockstepWindowMs: 0, pushDelayMs: 0, history },
      generation < 4 ? 100 : 80,
    );
    if (generation === 5) {
      policy.heard({ peer: 1, nowMs: 0 });
      policy.request({ peer: 1, page: 7, urgent: true, nowMs: 1 });
      drain(policy, 1);
    }
    expect(replayed()).toEqual(generation < 4 ? [40, 7, 90] : [40, 7]);
  }
  policy = new McdistPolicy({ pushDelayMs: 0, history: policy.history() }, 100);
  expect(replayed()).toEqual([7]);
  const bounded = new McdistPolicy({ history: policy.history(), historyPages: 0 }, 100);
  expect(bounded.state(0).historyPages).toBe(0);
  expect(() => new McdistPolicy({ history: Buffer.alloc(7) }, 100)).toThrow(
    expect.objectContaining({ code: 'E_ARGUMENT' }),
  );
});

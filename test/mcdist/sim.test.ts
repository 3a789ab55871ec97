/**
 * Policy and Requester in virtual time, with hundreds of clients. The simulator itself ends a run
 * with E_INTERNAL when a page is lost or wrong, a client starves or a queue grows out of its bound.
 */
import { expect, test } from 'vitest';
import { SIM_OUTCOMES, type SimOptions, simulate } from '../../src/mcdist/simulator.js';

const seeds = [1, 2, Date.now() % 1_000_000];
const PAGES = 4096;

/** 1024 pages touched in order, 0.1 ms of computing before each. */
function options(seed: number, more: Partial<SimOptions>): SimOptions {
  return {
    seed,
    pages: PAGES,
    segments: [{ clients: 100 }],
    traces: [
      {
        pages: Uint32Array.from({ length: 1024 }, (_, i) => i * 4),
        computeNs: new Uint32Array(1024).fill(100_000),
      },
    ],
    jitterPages: 16,
    speedSpread: 0.05,
    joinSpreadMs: 20,
    ...more,
  };
}

const outcomes = (result: { outcome: Uint8Array }) =>
  Array.from(result.outcome, (index) => SIM_OUTCOMES[index]);

test.each(seeds)(
  'every page reaches every client, with and without loss (seed %i)',
  async (seed) => {
    for (const loss of [0, 0.01, 0.05]) {
      const result = await simulate(
        options(seed, { segments: [{ clients: 100, loss }], zeroShare: 0.2, privateShare: 0.02 }),
      );
      expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
      expect(result.zeroPagesServed).toBeGreaterThan(0);
      if (loss > 0) expect(result.retries).toBeGreaterThan(100);
    }
  },
);

test('the same seed gives the same run, another one another', async () => {
  const run = async (seed: number) => {
    const result = await simulate(options(seed, { segments: [{ clients: 64, loss: 0.02 }] }));
    return [result.events, result.sentBytes, result.finishedMs.join()];
  };
  expect(await run(7)).toEqual(await run(7));
  expect(await run(7)).not.toEqual(await run(8));
});

test.each(seeds)('clones in lockstep are answered once (seed %i)', async (seed) => {
  const lockstep = { jitterPages: 1, speedSpread: 0, joinSpreadMs: 0 };
  const result = await simulate(
    options(seed, { ...lockstep, segments: [{ clients: 60 }], maxBytesRatio: 1.05 }),
  );
  expect(result.pagesServed).toBe(1024);
  expect(result.pagesRequested).toBeGreaterThan(10_000);
});

test.each(seeds)('a crowd on the same pages asks few questions (seed %i)', async (seed) => {
  const crowd = { speedSpread: 0, jitterPages: 1, joinSpreadMs: 5, history: false };
  const result = await simulate(options(seed, { ...crowd, segments: [{ clients: 2000 }] }));
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
  const questions = result.requests / 1024;
  const ended = Math.max(...result.finishedMs);
  console.log(`${questions.toFixed(0)} questions a page, ended after ${ended.toFixed(0)} ms`);
  expect(questions).toBeLessThan(0.35 * 2000);
});

test.each(seeds)('a clone that others feed is not taken for absent (seed %i)', async (seed) => {
  // Two scans of 8 s, one 50 ms behind the other.
  const result = await simulate(
    options(seed, {
      segments: [{ clients: 2 }],
      traces: [
        {
          pages: Uint32Array.from({ length: PAGES }, (_, i) => i),
          computeNs: new Uint32Array(PAGES).fill(2_000_000),
        },
      ],
      jitterPages: 1,
      speedSpread: 0,
      joins: [
        { client: 0, atMs: 0 },
        { client: 1, atMs: 50 },
      ],
    }),
  );
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
  expect(result.pagesServed).toBeLessThan(1.01 * PAGES);
});

test.each(seeds)('a page lost in part is not waited for twice (seed %i)', async (seed) => {
  const run = (loss: number) =>
    simulate(options(seed, { speedSpread: 0, segments: [{ clients: 100, loss }] }));
  const waited = async (loss: number) => {
    const { waitedMs } = await run(loss);
    return waitedMs.reduce((sum, ms) => sum + ms, 0) / waitedMs.length;
  };
  const [clean, lossy] = [await waited(0), await waited(0.01)];
  console.log(`waited ${clean.toFixed(1)} ms without loss, ${lossy.toFixed(1)} ms with 1%`);
  expect(lossy).toBeLessThan(clean + 150);
});

test.each(seeds)(
  'more clients than places: some are served, none push out others (seed %i)',
  async (seed) => {
    const result = await simulate(options(seed, { maxPeers: 50, maxWaitMs: 20_000 }));
    expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
    expect(result.refusedPeers).toBeGreaterThan(0);
    expect(result.evictedPeers).toBeGreaterThan(10);
    expect(result.evictedPeers).toBeLessThanOrEqual(50);
  },
);

test.each(seeds)('prefetch of a whole generation by many, with loss (seed %i)', async (seed) => {
  const result = await simulate(
    options(seed, { segments: [{ clients: 40, loss: 0.01 }], prefetchAll: true }),
  );
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
  expect(result.distinctPages).toBe(PAGES);
});

test.each(seeds)('slow receivers get all, behind a small queue (seed %i)', async (seed) => {
  const result = await simulate(
    options(seed, {
      segments: [{ clients: 60 }, { clients: 4, bytesPerS: 12.5e6, queueBytes: 65536 }],
      prefetchAll: true,
    }),
  );
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
});

test.each(seeds)(
  'joins, deaths and a partition do not hold up the others (seed %i)',
  async (seed) => {
    const result = await simulate(
      options(seed, {
        segments: [{ clients: 64, loss: 0.01 }, { clients: 36 }],
        joins: [
          { client: 0, atMs: 2000 },
          { client: 99, atMs: 3000 },
        ],
        changes: [
          { atMs: 60, kind: 'die', first: 10, count: 5 },
          { atMs: 50, kind: 'part', first: 20, count: 10 },
          { atMs: 900, kind: 'heal', first: 20, count: 10 },
        ],
      }),
    );
    expect(outcomes(result).filter((outcome) => outcome === 'died')).toHaveLength(5);
    expect(outcomes(result).filter((outcome) => outcome === 'finished')).toHaveLength(95);
    expect(result.finishedMs[20]).toBeGreaterThan(900);
    expect(result.startMs[99]).toBe(3000);
  },
);

test.each(seeds)('the rate finds a limit that all receivers share (seed %i)', async (seed) => {
  const result = await simulate(
    options(seed, {
      pages: 32_768,
      segments: [{ clients: 16, bytesPerS: 62.5e6 }],
      prefetchAll: true,
    }),
  );
  expect(result.sentBytes).toBeLessThan(1.1 * 32_768 * 4300);
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
  const rates = result.samples
    .filter(({ atMs }) => atMs >= 500 && atMs <= 1500)
    .map(({ rateBytesPerS }) => rateBytesPerS);
  const mean = rates.reduce((sum, rate) => sum + rate, 0) / rates.length;
  expect(mean).toBeGreaterThan(0.75 * 62.5e6);
  expect(mean).toBeLessThan(1.2 * 62.5e6);
});

test.each(seeds)('pushing behind faults, no page is pushed twice (seed %i)', async (seed) => {
  const result = await simulate(options(seed, { policy: { push: 'behind' } }));
  expect(new Set(outcomes(result))).toEqual(new Set(['finished']));
  expect(result.pagesPushed).toBeGreaterThan(100);
  expect(result.pagesPushed).toBeLessThanOrEqual(PAGES);
});

test('a server that restarts is used again; one that stays away is an error within its time-out', async () => {
  const restarted = await simulate(
    options(1, {
      changes: [
        { atMs: 50, kind: 'server-die' },
        { atMs: 600, kind: 'server-restart' },
      ],
    }),
  );
  expect(new Set(outcomes(restarted))).toEqual(new Set(['finished']));
  const lost = await simulate(
    options(1, { changes: [{ atMs: 50, kind: 'server-die' }], sourceTimeoutMs: 2000 }),
  );
  expect(new Set(outcomes(lost))).toEqual(new Set(['source-lost']));
  expect(lost.endMs).toBeLessThan(2000 + 1000);
});

test('a starved client ends the run with seed, time and client', async () => {
  // The server forgets each client before it asks again.
  await expect(simulate(options(5, { maxPeers: 8, maxWaitMs: 2000 }))).rejects.toMatchObject({
    code: 'E_INTERNAL',
    message: expect.stringMatching(/seed 5, at [\d.]+ ms: client \d+.* waited for \d+ ms/),
  });
});

test('more bytes than the bound end the run', async () => {
  await expect(simulate(options(6, { unicast: true, maxBytesRatio: 3 }))).rejects.toMatchObject({
    message: expect.stringMatching(/seed 6.* bytes were sent for/),
  });
});

test('options that make no sense are refused', async () => {
  for (const wrong of [
    { pages: 0 },
    { segments: [] },
    { traces: [{ pages: Uint32Array.of(PAGES), computeNs: Uint32Array.of(1) }] },
    { joins: [{ client: 100, atMs: 0 }] },
    { fragments: 5 },
    { privateShare: 1.5 },
  ]) {
    await expect(simulate(options(1, wrong))).rejects.toMatchObject({ code: 'E_ARGUMENT' });
  }
});

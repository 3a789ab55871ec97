import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistServerStats } from '../../src/mcdist/mcdist.js';
import { type Host, Net, newGeneration, startReceiver, startSource } from './net.js';

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(() => net.close());

const digest = (host: Host, name: string) => host.call<string>('digest', { name });
const serverStats = (host: Host) => host.call<McdistServerStats>('stats', { name: 'server' });

test('all of a generation is pushed once to all who want it', async () => {
  const generation = newGeneration();
  const pages = 4096;
  const source = await net.host();
  const server = await startSource(net, source, generation, {
    pages,
    zeros: [
      [1000, 300],
      [4000, 1],
    ],
    policy: { maxRateBytesPerS: 40e6, startRateBytesPerS: 40e6 },
  });
  const receivers: Host[] = [];
  for (let i = 0; i < 2; i++) {
    const host = await net.host();
    await startReceiver(net, host, generation, server, { pages });
    receivers.push(host);
  }
  await Promise.all(
    receivers.map((host) =>
      host.call('prefetchAll', { name: 'client', replica: 'replica', count: pages }),
    ),
  );
  const expected = await digest(source, 'source');
  for (const host of receivers) expect(await digest(host, 'replica')).toBe(expected);
  const stats = await serverStats(source);
  // A client that waited for long for the push to begin may have asked for some pages before.
  expect(stats.pagesPushed).toBeLessThanOrEqual(pages - 301);
  expect(stats.pagesPushed).toBeGreaterThan(0.7 * pages);
  expect(stats.pushing).toBe(0);
  expect(stats.announces).toBeGreaterThan(0);
  expect(stats.badPackets + stats.sendErrors).toBe(0);
});

test('pages of a disjoint region are answered to the one that asks, and not pushed', async () => {
  const generation = newGeneration();
  const pages = 256;
  const [source, asking, hearing] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, {
    pages,
    policy: { disjoint: [{ first: 0, count: 128 }] },
  });
  for (const host of [asking, hearing]) {
    await startReceiver(net, host, generation, server, { pages });
  }
  await asking.call('fetch', { name: 'client', pages: [0, 127, 128] });
  expect((await serverStats(source)).unicastAnswers).toBe(2);
  // What the group was sent has been heard by all; the rest by nobody else.
  await hearing.call('fetch', { name: 'client', pages: [200] });
  const { present } = await hearing.call<{ present: number }>('replicaStats', { name: 'replica' });
  expect(present).toBe(2);
});

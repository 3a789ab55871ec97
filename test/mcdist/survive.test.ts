// What dies or is cut off while a generation is being distributed. Whatever arrived is right, whoever
// waits hears of it in time, and what can go on does.
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistClientStats, McdistServerStats } from '../../src/mcdist/mcdist.js';
import {
  type Host,
  Net,
  newGeneration,
  startReceiver,
  startSource,
  type TestGeneration,
} from './net.js';

const PAGES = 2048;
// So slow that there is a middle of a push: the generation takes about half a second.
const SLOW = { startRateBytesPerS: 2e7, minRateBytesPerS: 4e6, maxRateBytesPerS: 2e7 };

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(async () => {
  await net.close();
});

const serverStats = (host: Host, name = 'server') =>
  host.call<McdistServerStats>('stats', { name });
const clientStats = (host: Host) => host.call<McdistClientStats>('stats', { name: 'client' });
const digest = (host: Host, name = 'replica', pages?: number[]) =>
  host.call<string>('digest', { name, pages });
const subscribe = (host: Host) =>
  host.call('call', { name: 'client', method: 'prefetch', args: [0, PAGES] });
const filled = (host: Host, least: number) =>
  host.call('reached', { name: 'replica', counter: 'present', least });
const present = async (host: Host) =>
  (await host.call<{ present: number }>('replicaStats', { name: 'replica' })).present;
const absent = async (host: Host): Promise<number> =>
  Number(/^absent (\d+)$/.exec(await digest(host))?.[1] ?? -1);

/** The replica of a host is served to the others as well. */
async function serveReplica(
  host: Host,
  generation: TestGeneration,
): Promise<{ address: string; port: number }> {
  const port = await host.call<number>('server', {
    name: 'server',
    bindAddress: host.address,
    port: 0,
    interfaceAddress: host.address,
  });
  await host.call('serve', {
    name: 'server',
    provider: 'replica',
    ...generation,
    policy: { announceMs: 100 },
  });
  return { address: host.address, port };
}

/** Which pages are here are those of the source. */
async function expectRight(host: Host, source: Host): Promise<void> {
  const here: number[] = [];
  for (let page = 0; page < PAGES; page += 31) {
    if (!(await digest(host, 'replica', [page])).startsWith('absent')) here.push(page);
  }
  expect(await digest(host, 'replica', here)).toBe(await digest(source, 'source', here));
}

const points = [
  { name: 'at the begin', least: 1 },
  { name: 'in the middle', least: PAGES / 2 },
  { name: 'in the last blocks', least: PAGES - 64 },
];

for (const { name, least } of points) {
  test(`the source is killed ${name} of a push: an error in time, and it goes on when it is back`, async () => {
    const generation = newGeneration();
    const [source, one, two] = [await net.host(), await net.host(), await net.host()];
    const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
    for (const host of [one, two]) {
      await startReceiver(net, host, generation, server, { pages: PAGES, sourceTimeoutMs: 1000 });
      await subscribe(host);
    }
    await filled(one, least);
    await source.kill();
    for (const host of [one, two]) {
      const page = await absent(host);
      if (page < 0) continue; // it had all of it before
      await expect(host.call('fetch', { name: 'client', pages: [page] })).rejects.toMatchObject({
        code: 'E_SOURCE_LOST',
      });
      expect(await clientStats(host)).toMatchObject({ lost: true, subscribed: false });
    }
    const back = await net.restart(source.namespace, source.address);
    await startSource(net, back, generation, { pages: PAGES, port: server.port, fresh: false });
    const expected = await digest(back, 'source');
    for (const host of [one, two]) {
      await expectRight(host, back);
      await host.call('call', { name: 'client', method: 'setServer', args: [server] });
      await subscribe(host);
    }
    for (const host of [one, two]) {
      await filled(host, PAGES);
      expect(await digest(host)).toBe(expected);
    }
  });

  test(`the source is killed ${name} of a push: the host that has all of it goes on`, async () => {
    const generation = newGeneration();
    const source = await net.host();
    const [full, one, two] = [await net.host(), await net.host(), await net.host()];
    const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
    await startReceiver(net, full, generation, server, { pages: PAGES });
    await full.call('fetchAll', { name: 'client', count: PAGES });
    const expected = await digest(source, 'source');
    for (const host of [one, two]) {
      await startReceiver(net, host, generation, server, { pages: PAGES });
      await host.call('reached', { name: 'client', counter: 'welcomes', least: 1 });
    }
    await serveReplica(full, generation);
    for (const host of [one, two]) await subscribe(host);
    for (const host of [one, two]) {
      await host.call('reached', { name: 'client', counter: 'serversKnown', least: 2 });
    }
    await filled(one, least);
    await source.kill();
    for (const host of [one, two]) {
      await filled(host, PAGES);
      expect(await digest(host)).toBe(expected);
      // Else it had all of it before.
      if (least === 1) expect((await clientStats(host)).failOvers).toBeGreaterThan(0);
      const { lost, pagesFailed } = await clientStats(host);
      expect({ lost, pagesFailed }).toEqual({ lost: false, pagesFailed: 0 });
    }
  });
}

test('the source is killed: what two replicas hold together both get, the rest fails in time', async () => {
  const generation = newGeneration();
  const [source, one, two] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES });
  // Each asks before the other one is there to overhear it.
  const range = (first: number, count: number) =>
    Array.from({ length: count }, (_, i) => first + i);
  await startReceiver(net, one, generation, server, { pages: PAGES, sourceTimeoutMs: 3000 });
  await one.call('fetch', { name: 'client', pages: range(0, 300) });
  await net.link(one, 'down');
  await startReceiver(net, two, generation, server, { pages: PAGES, sourceTimeoutMs: 3000 });
  await two.call('fetch', { name: 'client', pages: range(300, 300) });
  const expected = await digest(source, 'source', range(0, 600));
  await source.kill();
  await net.link(one, 'up');
  for (const host of [one, two]) await serveReplica(host, generation);
  await Promise.all([
    one.call('fetch', { name: 'client', pages: range(0, 600) }),
    two.call('fetch', { name: 'client', pages: range(0, 600) }),
  ]);
  for (const host of [one, two])
    expect(await digest(host, 'replica', range(0, 600))).toBe(expected);
  await expect(one.call('fetch', { name: 'client', pages: [700] })).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
});

test('the source is killed: without multicast, what hosts hold together is had from those that are named', async () => {
  const generation = newGeneration();
  const source = await net.host();
  const [one, two, late] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES });
  const range = (first: number, count: number) =>
    Array.from({ length: count }, (_, i) => first + i);
  for (const host of [one, two, late]) {
    await net.noMulticast(host);
    await startReceiver(net, host, generation, server, { pages: PAGES });
  }
  await one.call('fetch', { name: 'client', pages: range(0, 300) });
  await two.call('fetch', { name: 'client', pages: range(300, 300) });
  await late.call('reached', { name: 'client', counter: 'welcomes', least: 1 });
  const expected = await digest(source, 'source', range(0, 600));
  const named: { address: string; port: number }[] = [];
  for (const host of [one, two]) named.push(await serveReplica(host, generation));
  await source.kill();
  const [first, ...others] = named;
  await late.call('call', { name: 'client', method: 'setServer', args: [first, others] });
  await late.call('fetch', { name: 'client', pages: range(0, 600) });
  expect(await digest(late, 'replica', range(0, 600))).toBe(expected);
  const stats = await clientStats(late);
  expect(stats).toMatchObject({ announces: 0, lost: false, pagesFailed: 0 });
  expect(stats.negativeAnswers).toBeGreaterThan(0);
});

test('a receiver is killed and comes back: it and the others end with every page', async () => {
  const generation = newGeneration();
  const [source, one, two] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  for (const host of [one, two]) {
    await startReceiver(net, host, generation, server, { pages: PAGES });
    await subscribe(host);
  }
  await filled(one, PAGES / 4);
  await one.kill();
  await filled(two, PAGES / 2);
  const back = await net.restart(one.namespace, one.address);
  await startReceiver(net, back, generation, server, { pages: PAGES });
  await subscribe(back);
  const expected = await digest(source, 'source');
  for (const host of [two, back]) {
    await filled(host, PAGES);
    expect(await digest(host)).toBe(expected);
  }
  // The one that died is not told of, and is no reason to push for ever.
  expect((await serverStats(source)).peers).toBe(3);
});

test('a partition shorter than the time-out is survived without a word', async () => {
  const generation = newGeneration();
  const [source, cut, other] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  for (const host of [cut, other]) {
    await startReceiver(net, host, generation, server, { pages: PAGES });
    await subscribe(host);
  }
  await filled(cut, PAGES / 4);
  await net.link(cut, 'down');
  const waiting = cut.call('fetch', { name: 'client', pages: [PAGES - 1] });
  await filled(other, PAGES);
  const had = await present(cut);
  expect(had).toBeLessThan(PAGES);
  await net.link(cut, 'up');
  await waiting;
  await filled(cut, PAGES);
  expect(await digest(cut)).toBe(await digest(source, 'source'));
  expect(await clientStats(cut)).toMatchObject({ lost: false, pagesFailed: 0 });
});

test('a partition longer than the time-out ends the waits; setServer goes on after it', async () => {
  const generation = newGeneration();
  const [source, cut, other] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  for (const host of [cut, other]) {
    await startReceiver(net, host, generation, server, { pages: PAGES, sourceTimeoutMs: 1000 });
    await subscribe(host);
  }
  await filled(cut, PAGES / 4);
  await net.link(cut, 'down');
  await expect(cut.call('fetch', { name: 'client', pages: [PAGES - 1] })).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
  await filled(other, PAGES);
  await net.link(cut, 'up');
  await cut.call('call', { name: 'client', method: 'setServer', args: [server] });
  await subscribe(cut);
  await filled(cut, PAGES);
  for (const host of [cut, other]) expect(await digest(host)).toBe(await digest(source, 'source'));
});

test('where multicast does not come through everything arrives by unicast', async () => {
  const generation = newGeneration();
  const [source, deaf, other] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, {
    pages: PAGES,
    zeros: [[100, 200]],
  });
  await net.noMulticast(deaf);
  for (const host of [deaf, other]) {
    await startReceiver(net, host, generation, server, { pages: PAGES });
    await subscribe(host);
  }
  await deaf.call('fetch', { name: 'client', pages: [PAGES - 1] });
  for (const host of [deaf, other]) await filled(host, PAGES - 200);
  const expected = await digest(source, 'source');
  for (const host of [deaf, other]) await host.call('fetchAll', { name: 'client', count: PAGES });
  for (const host of [deaf, other]) expect(await digest(host)).toBe(expected);
  expect(await clientStats(deaf)).toMatchObject({ unicastOnly: true, pushedPackets: 0 });
  expect(await clientStats(other)).toMatchObject({ unicastOnly: false });
  expect((await serverStats(source)).unicastAnswers).toBeGreaterThan(PAGES / 2);
});

test('who joins late is served at once, and the others are not sent anything twice for it', async () => {
  const generation = newGeneration();
  const source = await net.host();
  const [one, two, late] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  for (const host of [one, two]) {
    await startReceiver(net, host, generation, server, { pages: PAGES });
    await subscribe(host);
  }
  await filled(one, PAGES / 4);
  await startReceiver(net, late, generation, server, { pages: PAGES });
  const begin = (await serverStats(source)).pushPosition;
  await late.call('fetch', { name: 'client', pages: [5, 6, 7] });
  const then = await serverStats(source);
  // Its page came while the push went on, and the push had not to wait for it.
  expect(then.pushing).toBe(1);
  expect(then.pushPosition).toBeGreaterThanOrEqual(begin);
  await subscribe(late);
  for (const host of [one, two, late]) {
    await filled(host, PAGES);
    expect(await digest(host)).toBe(await digest(source, 'source'));
  }
  const stats = await serverStats(source);
  console.log(`late: ${stats.pagesServed} pages sent, push at ${begin} when it came`);
  // Besides each page once: what had gone by before it came.
  expect(stats.pagesServed).toBeLessThanOrEqual(PAGES + then.pushPosition + PAGES / 8);
  expect(stats.pagesPushed).toBeLessThanOrEqual(PAGES);
});

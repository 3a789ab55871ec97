import { truncate } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistClientStats, McdistServerStats } from '../../src/mcdist/mcdist.js';
import { type Host, Net, newGeneration, startReceiver, startSource } from './net.js';

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(async () => {
  await net.close();
});

const serverStats = (host: Host) => host.call<McdistServerStats>('stats', { name: 'server' });
const clientStats = (host: Host, name = 'client') =>
  host.call<McdistClientStats>('stats', { name });
const digest = (host: Host, name: string) => host.call<string>('digest', { name });
/** From then on it can open what the server sends to others. */
const welcomed = (host: Host, name = 'client') =>
  host.call('reached', { name, counter: 'welcomes', least: 1 });
const filled = (host: Host, least: number, name = 'replica') =>
  host.call('reached', { name, counter: 'present', least });

test('one receiver fetches every page, each asked for and sent once', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 512 });
  await startReceiver(net, receiver, generation, server, { pages: 512 });
  await receiver.call('fetchAll', { name: 'client', count: 512 });
  expect(await digest(receiver, 'replica')).toBe(await digest(source, 'source'));
  const stats = await serverStats(source);
  expect(stats.payloadBytes).toBeGreaterThanOrEqual(512 * 4096);
  // Three packets of 1434 bytes at most for a page, UDP and IP headers of 28 bytes each.
  expect(stats.wireBytes / stats.packetsSent).toBeLessThanOrEqual(1434 + 28);
});

test('what one client asks for fills all replicas, one on the source host too', async () => {
  const generation = newGeneration();
  const source = await net.host();
  const pages = 1024;
  const server = await startSource(net, source, generation, { pages });
  const receivers: Host[] = [];
  for (let i = 0; i < 4; i++) receivers.push(await net.host());
  for (const host of [...receivers, source]) {
    await startReceiver(net, host, generation, server, { pages });
    await welcomed(host);
  }
  const [first, ...others] = receivers;
  if (first === undefined) throw new Error('no receiver');
  await first.call('fetchAll', { name: 'client', count: pages });
  const expected = await digest(source, 'source');
  for (const host of [...others, source]) {
    await filled(host, pages);
    expect(await digest(host, 'replica')).toBe(expected);
    const stats = await clientStats(host);
    expect(stats.pagesRequested).toBe(0);
    expect(stats.pagesOverheard).toBe(pages);
  }
});

test('two clients of one host in one group each get every page', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64 });
  await startReceiver(net, receiver, generation, server, { pages: 64, name: 'A' });
  await startReceiver(net, receiver, generation, server, { pages: 64, name: 'B' });
  await welcomed(receiver, 'clientB');
  await receiver.call('fetchAll', { name: 'clientA', count: 64 });
  await filled(receiver, 64, 'replicaB');
  expect(await digest(receiver, 'replicaB')).toBe(await digest(source, 'source'));
});

test('eight clients in lockstep cost the source hardly more than one', async () => {
  const pages = 2048;
  const sent: number[] = [];
  for (const clients of [1, 8]) {
    const generation = newGeneration();
    const source = await net.host();
    const server = await startSource(net, source, generation, { pages });
    const receivers: Host[] = [];
    for (let i = 0; i < clients; i++) {
      const host = await net.host();
      await startReceiver(net, host, generation, server, { pages, name: `${clients}` });
      receivers.push(host);
    }
    await Promise.all(
      receivers.map((host) => host.call('fetchAll', { name: `client${clients}`, count: pages })),
    );
    const expected = await digest(source, 'source');
    for (const host of receivers) expect(await digest(host, `replica${clients}`)).toBe(expected);
    sent.push((await serverStats(source)).wireBytes);
    for (const host of [...receivers, source]) await host.kill();
    await net.forgetSource();
  }
  const [one = 0, eight = 0] = sent;
  console.log(`wire bytes: ${one} for 1 client, ${eight} for 8`);
  expect(eight).toBeLessThanOrEqual(1.3 * one);
});

test('with 5% of packets lost on every host all pages are right', async () => {
  const generation = newGeneration();
  const pages = 1024;
  const source = await net.host();
  const server = await startSource(net, source, generation, { pages, zeros: [[100, 50]] });
  await net.lose(source, 5);
  const receivers: Host[] = [];
  for (let i = 0; i < 3; i++) {
    const host = await net.host();
    await net.lose(host, 5);
    await startReceiver(net, host, generation, server, { pages });
    receivers.push(host);
  }
  await Promise.all(receivers.map((h) => h.call('fetchAll', { name: 'client', count: pages })));
  const expected = await digest(source, 'source');
  for (const host of receivers) expect(await digest(host, 'replica')).toBe(expected);
  expect((await serverStats(source)).retries).toBeGreaterThan(0);
});

test('what a push loses on eight hosts is repaired by parities for all of them', async () => {
  const generation = newGeneration();
  const pages = 2048;
  const source = await net.host();
  const server = await startSource(net, source, generation, { pages });
  const receivers: Host[] = [];
  for (let i = 0; i < 8; i++) {
    const host = await net.host();
    await net.lose(host, 5);
    await startReceiver(net, host, generation, server, { pages });
    await welcomed(host);
    receivers.push(host);
  }
  const args = { name: 'client', replica: 'replica', count: pages };
  await Promise.all(receivers.map((host) => host.call('prefetchAll', args)));
  const expected = await digest(source, 'source');
  for (const host of receivers) {
    expect(await digest(host, 'replica')).toBe(expected);
    const stats = await clientStats(host);
    expect(stats.paritiesReceived).toBeGreaterThan(0);
    expect(stats.pagesRepaired).toBeGreaterThan(0);
    // Blocks of 32 pages: about one report of each, more only for repairs that are lost too.
    expect(stats.blocksReported).toBeLessThan((3 * pages) / 32);
  }
  const { wireBytes, paritySymbols } = await serverStats(source);
  console.log(`sent ${(wireBytes / (pages * 4096)).toFixed(3)} of the payload`);
  expect(paritySymbols).toBeGreaterThan(0);
});

test('zero pages cost a few bytes', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const pages = 4096;
  const server = await startSource(net, source, generation, { pages, zeros: [[0, pages]] });
  await startReceiver(net, receiver, generation, server, { pages });
  await receiver.call('prefetchAll', { name: 'client', replica: 'replica', count: pages });
  const stats = await serverStats(source);
  expect(stats.pagesServed).toBe(0);
  expect(stats.wireBytes).toBeLessThan(pages * 16);
  expect(await digest(receiver, 'replica')).toBe(await digest(source, 'source'));
});

test('a page the source does not hold, or cannot read, fails alone and soon', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64, held: 32 });
  await startReceiver(net, receiver, generation, server, { pages: 64 });
  await expect(receiver.call('fetch', { name: 'client', pages: [40] })).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
    message: expect.stringContaining('page 40: the source does not hold it'),
  });
  await receiver.call('fetch', { name: 'client', pages: [3] });
  await truncate(join(await net.folder, 'source'), 16 * 4096);
  await expect(receiver.call('fetch', { name: 'client', pages: [20] })).rejects.toMatchObject({
    code: 'E_IO',
  });
  await receiver.call('fetch', { name: 'client', pages: [4] });
  expect((await clientStats(receiver)).pagesFailed).toBe(2);
});

test('a replica of another size is told so, not filled', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64 });
  await startReceiver(net, receiver, generation, server, { pages: 65 });
  await expect(receiver.call('fetch', { name: 'client', pages: [1] })).rejects.toMatchObject({
    code: 'E_REPLICA_MISMATCH',
  });
});

test('with an MTU of 9000 a page is one packet', async () => {
  await net.close();
  net = await Net.make(9000);
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64, mtuBytes: 9000 });
  await startReceiver(net, receiver, generation, server, { pages: 64, mtuBytes: 9000 });
  await receiver.call('fetchAll', { name: 'client', count: 64 });
  expect(await digest(receiver, 'replica')).toBe(await digest(source, 'source'));
  const stats = await serverStats(source);
  expect(stats.packetsSent).toBe(stats.pagesServed + stats.welcomes + stats.announces);
});

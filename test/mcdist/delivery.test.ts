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

test('a page crosses from source to replica', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64 });
  await startReceiver(net, receiver, generation, server, { pages: 64 });
  await receiver.call('fetch', { name: 'client', pages: [5] });
  await receiver.call('fetchAll', { name: 'client', count: 64 });
  expect(await digest(receiver, 'replica')).toBe(await digest(source, 'source'));
  console.log(await serverStats(source), await clientStats(receiver));
});

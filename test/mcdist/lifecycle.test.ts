import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistClientStats } from '../../src/mcdist/mcdist.js';
import { type Host, Net, newGeneration, startReceiver, startSource } from './net.js';

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(async () => {
  await net.close();
});

const clientStats = (host: Host) => host.call<McdistClientStats>('stats', { name: 'client' });

test('a server killed with pages outstanding and restarted: the client goes on', async () => {
  const generation = newGeneration();
  const pages = 4096;
  const [source, receiver] = [await net.host(), await net.host()];
  const slow = { startRateBytesPerS: 4e6, minRateBytesPerS: 4e6 };
  const server = await startSource(net, source, generation, { pages, policy: slow });
  await startReceiver(net, receiver, generation, server, { pages });
  const fetched = receiver.call('fetchAll', { name: 'client', count: pages });
  await receiver.call('reached', { name: 'replica', counter: 'present', least: 200 });
  await source.kill();
  const restarted = await net.restart(source.namespace, source.address);
  await startSource(net, restarted, generation, { pages, port: server.port, fresh: false });
  await fetched;
  expect(await receiver.call('digest', { name: 'replica' })).toBe(
    await restarted.call('digest', { name: 'source' }),
  );
  expect((await clientStats(receiver)).welcomes).toBeGreaterThanOrEqual(2);
});

test('a source back on another port is found through setServer', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const pages = 64;
  const server = await startSource(net, source, generation, { pages });
  await startReceiver(net, receiver, generation, server, { pages });
  await receiver.call('fetch', { name: 'client', pages: [0] });
  await source.call('close', { name: 'server' });
  const waiting = receiver.call('fetch', { name: 'client', pages: [1] });
  const port = await source.call<number>('server', {
    name: 'server',
    bindAddress: source.address,
    interfaceAddress: source.address,
  });
  await source.call('serve', { name: 'server', provider: 'source', ...generation });
  const args = [{ address: source.address, port }];
  await receiver.call('call', { name: 'client', method: 'setServer', args });
  await waiting;
});

test('a source gone for good ends all waits with E_SOURCE_LOST; setServer revives', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const pages = 64;
  const server = await startSource(net, source, generation, { pages });
  await startReceiver(net, receiver, generation, server, { pages, sourceTimeoutMs: 500 });
  await receiver.call('fetch', { name: 'client', pages: [0] });
  await source.kill();
  await expect(receiver.call('fetch', { name: 'client', pages: [1] })).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
  expect((await clientStats(receiver)).lost).toBe(true);
  await expect(receiver.call('fetch', { name: 'client', pages: [2] })).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
  await receiver.call('fetch', { name: 'client', pages: [0] });

  const restarted = await net.restart(source.namespace, source.address);
  await startSource(net, restarted, generation, { pages, port: server.port, fresh: false });
  await receiver.call('call', { name: 'client', method: 'setServer', args: [server] });
  await receiver.call('fetchAll', { name: 'client', count: pages });
  expect(await receiver.call('digest', { name: 'replica' })).toBe(
    await restarted.call('digest', { name: 'source' }),
  );
});

test('a client may be there before its server', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = { address: source.address, port: 7001 };
  await startReceiver(net, receiver, generation, server, { pages: 8 });
  const waiting = receiver.call('fetchAll', { name: 'client', count: 8 });
  await startSource(net, source, generation, { pages: 8, port: server.port });
  await waiting;
});

test('waiters outlive their client and are served by the next', async () => {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const nobody = { address: receiver.address, port: 9 };
  await startReceiver(net, receiver, generation, nobody, { pages: 8 });
  const waiting = receiver.call('fetch', { name: 'client', pages: [3] });
  await receiver.call('close', { name: 'client' });
  const server = await startSource(net, source, generation, { pages: 8 });
  await receiver.call('client', {
    ...generation,
    name: 'next',
    replica: 'replica',
    server,
    interfaceAddress: receiver.address,
  });
  await waiting;
});

test('generations served by one server do not mix', async () => {
  const [source, receiver] = [await net.host(), await net.host()];
  const [one, two] = [newGeneration(), newGeneration()];
  // The worst case: both in one group and port.
  const both = { group: one.group, groupPort: one.groupPort };
  const pages = 256;
  const server = await startSource(net, source, one, { pages, seed: 1 });
  const path = `${await net.folder}/source2`;
  const { generation } = two;
  const medium = 'disk';
  await source.call('replica', { name: 'source2', path, generation, pages, medium });
  await source.call('fillSource', { name: 'source2', seed: 2, count: pages });
  await source.call('serve', { name: 'server', provider: 'source2', ...two, ...both });
  await startReceiver(net, receiver, one, server, { pages, name: 'One' });
  await startReceiver(net, receiver, { ...two, ...both }, server, { pages, name: 'Two' });
  await Promise.all([
    receiver.call('fetchAll', { name: 'clientOne', count: pages }),
    receiver.call('fetchAll', { name: 'clientTwo', count: pages }),
  ]);
  const digest = (host: Host, name: string) => host.call<string>('digest', { name });
  expect(await digest(receiver, 'replicaOne')).toBe(await digest(source, 'source'));
  expect(await digest(receiver, 'replicaTwo')).toBe(await digest(source, 'source2'));
  const stats = await receiver.call<McdistClientStats>('stats', { name: 'clientOne' });
  expect(stats.wrongGeneration).toBeGreaterThan(0);
});

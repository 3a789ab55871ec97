/**
 * Figures of mcdist on this machine, across network namespaces:
 *   npx tsc && node dist/test/mcdist/measure.js [MiB]
 */
import type { McdistClientStats, McdistServerStats } from '../../src/mcdist/mcdist.js';
import { type Host, Net, newGeneration, startReceiver, startSource } from './net.js';

const mib = Number(process.argv[2] ?? 256);
const pages = mib * 256;

function quantiles(values: number[]): string {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (q: number) => (sorted[Math.floor(q * (sorted.length - 1))] ?? 0).toFixed(0);
  return `p50 ${at(0.5)} us, p90 ${at(0.9)} us, p99 ${at(0.99)} us (n=${sorted.length})`;
}

async function latency(): Promise<void> {
  const net = await Net.make();
  try {
    const generation = newGeneration();
    const [source, receiver] = [await net.host(), await net.host()];
    const count = 4000;
    const server = await startSource(net, source, generation, { pages: 6 * count });
    await startReceiver(net, receiver, generation, server, { pages: 6 * count });
    const ports = await source.call<{ udpPort: number; tcpPort: number }>('benchServer', {
      address: source.address,
    });
    const trips = (kind: string, port: number) =>
      receiver.call<number[]>('roundTrips', { kind, address: source.address, port, count });
    for (let round = 0; round < 6; round++) {
      const handedOver = round % 2 === 1;
      console.log('udp ping-pong', quantiles(await trips('udp', ports.udpPort)));
      console.log('tcp          ', quantiles(await trips('tcp', ports.tcpPort)));
      const took = await receiver.call<number[]>('fetchTimed', {
        replica: 'replica',
        from: round * count,
        count,
        handedOver,
      });
      console.log(handedOver ? 'mcdist, thread' : 'mcdist, lent  ', quantiles(took));
    }
    const stats = await receiver.call<McdistClientStats>('stats', { name: 'client' });
    console.log(`mcdist: ${stats.retries} retries, ${stats.duplicates} duplicates`);
  } finally {
    await net.close();
  }
}

async function bulk(receivers: number, percent: number): Promise<void> {
  const net = await Net.make();
  try {
    const generation = newGeneration();
    const source = await net.host();
    const server = await startSource(net, source, generation, { pages });
    const hosts: Host[] = [];
    for (let i = 0; i < receivers; i++) {
      const host = await net.host();
      await startReceiver(net, host, generation, server, { pages });
      if (percent > 0) await net.lose(host, percent);
      hosts.push(host);
    }
    const cpu = () => source.call<{ user: number; system: number }>('cpu');
    const before = await cpu();
    const seconds = await Promise.all(
      hosts.map((host) =>
        host.call<number>('prefetchAll', { name: 'client', replica: 'replica', count: pages }),
      ),
    );
    const after = await cpu();
    const stats = await source.call<McdistServerStats>('stats', { name: 'server' });
    const clients = await Promise.all(
      hosts.map((host) => host.call<McdistClientStats>('stats', { name: 'client' })),
    );
    const sum = (key: 'retries' | 'duplicates' | 'requests') =>
      clients.reduce((total, client) => total + client[key], 0);
    const slowest = Math.max(...seconds);
    console.log(
      `${receivers} receivers, ${percent}% loss: ${slowest.toFixed(2)} s, ` +
        `${(mib / slowest).toFixed(0)} MiB/s each, wire/payload ` +
        `${(stats.wireBytes / (pages * 4096)).toFixed(3)}, retries ${sum('retries')}, ` +
        `duplicates ${sum('duplicates')}, requests ${sum('requests')}, lockstep ` +
        `${stats.lockstepIgnored}, merged ${stats.merged}, dropped ${stats.queueDropped}, cuts ` +
        `${stats.rateCuts}, source cpu ` +
        `${((after.user + after.system - before.user - before.system) / 1e6).toFixed(2)} s`,
    );
  } finally {
    await net.close();
  }
}

await latency();
for (const [receivers, percent] of [
  [1, 0],
  [4, 0],
  [1, 5],
  [4, 5],
] as const) {
  await bulk(receivers, percent);
}

/**
 * How long a reader waits for a page while the rest of the replica is prefetched, across network
 * namespaces. Peers are measured in turns, so that other load on the machine hits all:
 *   npx tsc && node dist/test/disk-server/measure.js [MiB] [rounds]
 */
import type { PrefetchProgress } from '../../src/pagestore/replica.js';
import { Net, newGeneration, startReceiver, startSource } from '../mcdist/net.js';

const mib = Number(process.argv[2] ?? 256);
const rounds = Number(process.argv[3] ?? 3);
const pages = mib * 256;
const BATCH = 50;
const MOST = 1000;

/** Bytes a second; 0 is no limit, null no prefetch. */
const rates = [null, 16e6, 64e6, 256e6, 0];

function quantiles(values: number[]): string {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (q: number) => (sorted[Math.floor(q * (sorted.length - 1))] ?? 0).toFixed(0);
  return `p50 ${at(0.5)} us, p99 ${at(0.99)} us, most ${at(1)} us (n=${sorted.length})`;
}

const net = await Net.make();
try {
  const generation = newGeneration();
  const [source, receiver] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages });
  const took = new Map(rates.map((rate) => [rate, [] as number[]]));
  const speed = new Map(rates.map((rate) => [rate, [] as number[]]));
  const yields = new Map(rates.map((rate) => [rate, 0]));
  for (let round = 0; round < rounds; round++) {
    for (const rate of rates) {
      const name = `${round}-${rate}`;
      await startReceiver(net, receiver, generation, server, { pages, name });
      const prefetcher = `prefetcher${name}`;
      const progress = () =>
        receiver.call<PrefetchProgress>('call', { name: prefetcher, method: 'progress' });
      if (rate !== null) {
        await receiver.call('prefetcher', { name: prefetcher, replica: `replica${name}` });
        await receiver.call('call', { name: prefetcher, method: 'start', args: [rate] });
      }
      // From the end, where the prefetch comes last.
      for (let read = BATCH; read <= MOST; read += BATCH) {
        const from = pages - read;
        const batch = await receiver.call<number[]>('fetchTimed', {
          replica: `replica${name}`,
          from,
          count: BATCH,
        });
        const now = rate === null ? null : await progress();
        if (now !== null && now.state !== 'running') break;
        took.get(rate)?.push(...batch);
        if (now !== null && read + BATCH > MOST) {
          speed.get(rate)?.push((now.pages * 4096) / (now.elapsedMs / 1000));
          yields.set(rate, (yields.get(rate) ?? 0) + now.yields);
        }
      }
      if (rate !== null) await receiver.call('call', { name: prefetcher, method: 'close' });
      await receiver.call('close', { name: `client${name}` });
      await receiver.call('call', { name: `replica${name}`, method: 'close' });
    }
  }
  for (let round = 0; round < rounds; round++) {
    // Nobody waits: the prefetcher beside one range given to the client at once.
    const [name, bare] = [`alone${round}`, `bare${round}`];
    await startReceiver(net, receiver, generation, server, { pages, name });
    await receiver.call('prefetcher', { name: 'alone', replica: `replica${name}` });
    await receiver.call('call', { name: 'alone', method: 'start', args: [0] });
    await receiver.call('reached', { name: `replica${name}`, counter: 'present', least: pages });
    const done = await receiver.call<PrefetchProgress>('call', {
      name: 'alone',
      method: 'progress',
    });
    await receiver.call('call', { name: 'alone', method: 'close' });
    await receiver.call('close', { name: `client${name}` });
    await startReceiver(net, receiver, generation, server, { pages, name: bare });
    const took = await receiver.call<number>('prefetchAll', {
      name: `client${bare}`,
      replica: `replica${bare}`,
      count: pages,
    });
    await receiver.call('close', { name: `client${bare}` });
    const alone = (mib / done.elapsedMs) * 1000;
    console.log(`alone: ${alone.toFixed(0)} MiB/s, bare client: ${(mib / took).toFixed(0)} MiB/s`);
  }
  for (const rate of rates) {
    const label = rate === null ? 'no prefetch' : rate === 0 ? 'no limit' : `${rate / 1e6} MB/s`;
    const at = speed.get(rate) ?? [];
    const mean = at.reduce((sum, value) => sum + value, 0) / Math.max(at.length, 1) / 1e6;
    console.log(
      `${label}: ${quantiles(took.get(rate) ?? [])}; ` +
        `prefetched meanwhile ${mean.toFixed(0)} MB/s, ${yields.get(rate)} yields`,
    );
  }
} finally {
  await net.close();
}

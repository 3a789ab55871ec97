/**
 * The control channel between two hosts: what a message costs on a connection opened in advance,
 * and what it would cost with a new one.
 *
 * Both ends run in one process on loopback addresses: the figures are the channel's own, without a
 * network's.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  Cluster,
  createPeerServer,
  initCluster,
  listenForPeers,
  loadClusterConfig,
} from '../src/cluster/index.js';
import { SnowflockError } from '../src/common/errors.js';
import type { Bench } from './lib/bench.js';
import { type Summary, summarize, timeEach } from './lib/stats.js';
import { ratio, spread } from './lib/table.js';

const DESCRIPTOR_BYTES = 300 * 1024;

const bench: Bench = {
  name: 'control',
  description: 'a message between two hosts over mutual TLS, connection kept against new',
  async run({ quick, signal }) {
    const runs = quick ? 20 : 300;
    const dir = await mkdtemp(join(tmpdir(), 'sf-bench-'));
    const closing: (() => unknown)[] = [];
    try {
      const files = await initCluster({
        dir: join(dir, 'cluster'),
        hosts: [
          { name: 'h1', address: '127.91.0.1', uplink: 'lo' },
          { name: 'h2', address: '127.91.0.2', uplink: 'lo' },
        ],
      });
      const [config1, config2] = [...files.values()].map(loadClusterConfig);
      if (!config1 || !config2) throw new SnowflockError('E_INTERNAL', 'two hosts were asked for');
      const server = createPeerServer(config2);
      server.put('/v1/descriptor', async (request) => ({
        bytes: (request.body as Buffer).byteLength,
      }));
      await listenForPeers(server, config2);
      closing.push(() => server.close());
      const kept = new Cluster(config1);
      closing.push(() => kept.close());
      await kept.peer('h2').warm(4);

      const binary = Buffer.alloc(DESCRIPTOR_BYTES, 1);
      const measured: [string, string, Summary][] = [];
      const measure = async (id: string, title: string, work: () => Promise<void>) => {
        signal.throwIfAborted();
        measured.push([id, title, summarize(await timeEach(runs, work))]);
      };
      await measure('kept', 'message, connection kept', async () => {
        await kept.peer('h2').ping();
      });
      await measure('new', 'message, new connection', async () => {
        const fresh = new Cluster(config1);
        await fresh.peer('h2').ping();
        fresh.close();
      });
      await measure('descriptor', '300 KiB of descriptor, kept', async () => {
        await kept.peer('h2').request('PUT', '/v1/descriptor', { binary });
      });
      const base = measured[0]?.[2].median ?? Number.NaN;
      return {
        tables: [
          {
            title: `Round trips, ms, median (min–max) of ${runs}`,
            columns: ['what', 'ms', 'p95 ms', 'ratio'],
            rows: measured.map(([, title, summary]) => [
              title,
              spread(summary),
              summary.p95,
              ratio(summary.median, base),
            ]),
          },
        ],
        figures: Object.fromEntries(measured.map(([id, , summary]) => [`${id}_ms`, summary])),
        notes: ['client and server share one process and its event loop'],
      };
    } finally {
      for (const close of closing.reverse()) await close();
      await rm(dir, { recursive: true, force: true });
    }
  },
};
export default bench;

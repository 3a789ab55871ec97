/**
 * What sending a descriptor to each host by itself costs, beside the same message without it and
 * beside fetching the same bytes as a small generation by mcdist. All on loopback; the hosts are
 * servers in one other process, so with many of them the times are those of its one thread.
 *   npx tsc && node dist/test/cluster/measure-descriptor.js [bytes] [rounds]
 */
import { type ChildProcess, fork } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  Cluster,
  createPeerServer,
  listenForPeers,
  loadClusterConfig,
} from '../../src/cluster/index.js';
import { newGenerationId, newGenerationKey } from '../../src/common/ids.js';
import { within } from '../../src/common/timeout.js';
import { randomGroup } from '../../src/mcdist/groups.js';
import { McdistServer } from '../../src/mcdist/mcdist.js';
import { RemoteReplica } from '../../src/pagestore/remote-replica.js';
import { openReplica } from '../../src/pagestore/replica.js';
import { get, makeCluster, temporaryFolder } from './helpers.js';

const HOSTS = 64;
const names = Array.from({ length: HOSTS + 1 }, (_, i) => `h${i + 1}`);

function median(values: number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
}

async function serveHosts(files: string[]): Promise<void> {
  for (const file of files) {
    const config = loadClusterConfig(file);
    const server = createPeerServer(config);
    server.post('/v1/descriptor', async () => ({}));
    await listenForPeers(server, config);
  }
  process.send?.('ready');
}

async function measureTls(bytes: number, rounds: number): Promise<void> {
  const folder = temporaryFolder();
  let child: ChildProcess | undefined;
  try {
    const hosts = await makeCluster(join(folder.path, 'cluster'), names);
    const files = names.slice(1).map((name) => get(hosts, name).file);
    child = fork(fileURLToPath(import.meta.url), ['--hosts', ...files]);
    await once(child, 'message');
    const cluster = new Cluster(get(hosts, 'h1'));
    const bodies = [randomBytes(64), randomBytes(bytes)];
    for (const n of [1, 4, 16, HOSTS]) {
      const peers = cluster.others().slice(0, n);
      const send = (binary: Buffer): Promise<unknown> =>
        Promise.all(peers.map((peer) => peer.request('POST', '/v1/descriptor', { binary })));
      for (const body of bodies) await send(body); // connections
      const took = bodies.map(() => ({ ms: [] as number[], cpu_us: [] as number[] }));
      for (let round = 0; round < rounds; round++) {
        for (const [i, body] of bodies.entries()) {
          const [cpu, at] = [process.cpuUsage(), performance.now()];
          await send(body);
          const { user, system } = process.cpuUsage(cpu);
          took[i]?.ms.push(performance.now() - at);
          took[i]?.cpu_us.push(user + system);
        }
      }
      const shown = took.map(
        (one, i) =>
          `${bodies[i]?.length} bytes ${median(one.ms).toFixed(2)} ms, sender ${median(one.cpu_us)} us of CPU`,
      );
      process.stdout.write(`TLS to ${n} hosts: ${shown.join('; ')}\n`);
    }
    cluster.close();
  } finally {
    child?.kill('SIGTERM');
    folder.remove();
  }
}

/** One host that opens a replica of the descriptor's generation and has it whole. */
async function measureMcdist(bytes: number, rounds: number): Promise<void> {
  const folder = { path: mkdtempSync('/dev/shm/sf-measure-') };
  const address = '127.0.0.1';
  const server = new McdistServer({ bindAddress: address, interfaceAddress: address });
  const took: number[] = [];
  try {
    const pages = Math.ceil(bytes / 4096);
    for (let round = 0; round < rounds; round++) {
      const generation = newGenerationId();
      const key = Buffer.from(newGenerationKey(), 'hex');
      const { group, port: groupPort } = randomGroup();
      const held = openReplica(join(folder.path, `held${round}`), generation, pages, 'memory');
      for (let page = 0; page < pages; page++) held.fill(page, randomBytes(4096));
      server.serve({ generation, key, provider: held.provider, group, groupPort });
      const at = performance.now();
      const remote = new RemoteReplica({
        path: join(folder.path, `there${round}`),
        generation,
        pages,
        medium: 'memory',
        source: { address, port: server.port, group, groupPort, key },
        interfaceAddress: address,
      });
      // The timeout also keeps this process going: the client's thread does not.
      const complete = within(once(remote, 'complete'), 10_000, 'fetching a descriptor');
      for (let page = 0; page < pages; page++) remote.replica.prefetch(page);
      await complete;
      took.push(performance.now() - at);
      await remote.close();
      await server.unserve(generation);
      held.close();
    }
  } finally {
    await server.close();
    rmSync(folder.path, { recursive: true, force: true });
  }
  process.stdout.write(
    `mcdist, one host, replica opened and whole: ${median(took).toFixed(2)} ms\n`,
  );
}

if (process.argv[2] === '--hosts') {
  await serveHosts(process.argv.slice(3));
} else {
  const bytes = Number(process.argv[2] ?? 17_000);
  const rounds = Number(process.argv[3] ?? 30);
  await measureTls(bytes, rounds);
  await measureMcdist(bytes, rounds);
}

// A host of the tests, in its own network namespace: publishes disks, makes disks over published
// generations, and serves them. Messages as those of test/mcdist/host.mjs.
import { asSnowflockError } from '../../src/common/errors.js';
import { loadAddon } from '../../src/common/native.js';
import { Disk } from '../../src/cow-disk/disk.js';
import { type Published, publishGeneration } from '../../src/disk-server/publish.js';
import {
  openRemoteGeneration,
  type RemoteGeneration,
} from '../../src/disk-server/remote-generation.js';
import { readSourceFile, writeSourceFile } from '../../src/disk-server/source-file.js';
import type { McdistPolicyOptions } from '../../src/mcdist/mcdist.js';
import type { RemoteReplicaStats } from '../../src/pagestore/remote-replica.js';

const disks = new Map<string, Disk>();
const published = new Map<string, Published>();
const remotes = new Map<string, RemoteGeneration>();
const completed = new Set<string>();
const troubles: string[] = [];

function get<T>(map: Map<string, T>, name: string): T {
  const found = map.get(name);
  if (found === undefined) throw new Error(`there is no ${name}`);
  return found;
}

async function serve(name: string, directory: string, options: Parameters<typeof Disk.open>[1]) {
  const disk = await Disk.open(directory, options);
  disks.set(name, disk);
  await disk.serve({ socketPath: `${directory}.nbd`, exportName: 'disk' });
  return `${directory}.nbd`;
}

const operations = {
  async disk(p: { name: string; directory: string; sizeBytes: number }) {
    await Disk.create(p.directory, { sizeBytes: p.sizeBytes });
    return serve(p.name, p.directory, {});
  },
  reopen: (p: { name: string; directory: string }) => serve(p.name, p.directory, {}),
  async publish(p: {
    name: string;
    generation: string;
    address: string;
    file: string;
    fork?: boolean;
    previous?: boolean;
    policy?: McdistPolicyOptions;
  }) {
    const disk = get(disks, p.name);
    if (p.fork !== false) await disk.fork(p.generation);
    const done = await publishGeneration(disk, p.generation, {
      address: p.address,
      ...(p.policy === undefined ? {} : { policy: p.policy }),
      ...(p.previous === true ? { previous: await readSourceFile(p.file) } : {}),
    });
    published.set(p.name, done);
    await writeSourceFile(p.file, done.source);
    return done.source;
  },
  async remote(p: {
    name: string;
    file: string;
    replica: string;
    prefetch?: number;
    sourceTimeoutMs?: number;
  }) {
    const remote = await openRemoteGeneration(await readSourceFile(p.file), p.replica, {
      ...(p.prefetch === undefined ? {} : { prefetch: p.prefetch }),
      sourceTimeoutMs: p.sourceTimeoutMs ?? 20_000,
    });
    remote.events.once('complete', () => completed.add(p.name));
    remote.events.on('trouble', (error) => troubles.push(error.code));
    remotes.set(p.name, remote);
  },
  async clone(p: { name: string; remote: string; directory: string; create?: boolean }) {
    const remote = get(remotes, p.remote);
    if (p.create !== false) {
      await Disk.create(p.directory, { sizeBytes: remote.sizeBytes, base: remote.base });
    }
    return serve(p.name, p.directory, { replica: remote.replica });
  },
  prefetch: (p: { name: string; rate: number }) => get(remotes, p.name).prefetch(p.rate),
  pause: (p: { name: string }) => get(remotes, p.name).events.pausePrefetch(),
  resume: (p: { name: string }) => get(remotes, p.name).events.resumePrefetch(),
  reconnect: (p: { name: string }) => get(remotes, p.name).reconnect(),
  stats(p: { name: string }) {
    const { prefetch, ...stats } = get(remotes, p.name).stats();
    const code = prefetch?.error == null ? null : asSnowflockError(prefetch.error).code;
    return { ...stats, prefetch, code, completed: completed.has(p.name), troubles };
  },
  diskStats: (p: { name: string }) => get(disks, p.name).stats(),
  serverStats: (p: { name: string }) => get(published, p.name).stats(),
  /** Resolves once the stats say so. The test's own time-out bounds it. */
  async until(p: {
    name: string;
    state?: string;
    present?: number;
    complete?: boolean;
    underWay?: number;
  }) {
    for (;;) {
      const stats: RemoteReplicaStats = get(remotes, p.name).stats();
      const here = stats.present + stats.zero;
      if (
        (p.state === undefined || stats.prefetch?.state === p.state) &&
        (p.underWay === undefined || stats.prefetch?.underWay === p.underWay) &&
        (p.present === undefined || here >= p.present) &&
        (p.complete === undefined || completed.has(p.name) === p.complete)
      ) {
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  },
  async closeDisk(p: { name: string }) {
    await get(disks, p.name).close();
    disks.delete(p.name);
  },
  async closeRemote(p: { name: string }) {
    await get(remotes, p.name).close();
    remotes.delete(p.name);
  },
  /** Waits for one page after the other through the remote's replica; microseconds each took. */
  fetchTimed(p: { name: string; from: number; count: number }) {
    const { mcdistBench } = loadAddon<{
      mcdistBench: { fetch(replica: unknown, from: number, count: number): Promise<number[]> };
    }>('dataplane');
    return mcdistBench.fetch(get(remotes, p.name).replica, p.from, p.count);
  },
};

process.on('message', async ({ id, op, args }: { id: number; op: string; args: never }) => {
  try {
    const operation = operations[op as keyof typeof operations] as (p: never) => unknown;
    process.send?.({ id, value: await operation(args) });
  } catch (error) {
    const { code, message } = asSnowflockError(error);
    process.send?.({ id, error: { code, message } });
  }
});
process.on('disconnect', () => process.exit(0));
process.send?.({ ready: true });

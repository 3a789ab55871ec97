/**
 * A host of the mcdist benches: a process in a namespace of its own that does what its parent asks
 * over IPC, `{id, op, args}` -> `{id, value}` or `{id, error}`. All times are this machine's
 * monotonic clock, milliseconds, which all processes share.
 */
import { readFileSync } from 'node:fs';
import { loadAddon } from '../../src/common/native.js';
import { McdistClient, McdistServer } from '../../src/mcdist/mcdist.js';
import { RemoteReplica } from '../../src/pagestore/remote-replica.js';
import { openReplica, type Replica } from '../../src/pagestore/replica.js';

const PAGE_BYTES = 4096;

interface Group {
  generation: string;
  keyHex: string;
  group: string;
  groupPort: number;
}

interface Addon {
  tcpBench: {
    serve(address: string, path: string): number;
    receive(address: string, port: number, path: string, bytes: number): Promise<void>;
  };
}

const addon = loadAddon<Addon>('dataplane');
let source: Replica | undefined;
let server: McdistServer | undefined;
let remote: RemoteReplica | undefined;
let client: McdistClient | undefined;
let filled: Replica | undefined;

const now_ms = (): number => Number(process.hrtime.bigint()) / 1e6;

const operations = {
  /** Makes the generation's replica at `path` of the bytes of `file`. */
  fill({ path, file, generation }: { path: string; file: string; generation: string }) {
    const data = readFileSync(file);
    const replica = openReplica(path, generation, data.length / PAGE_BYTES, 'memory');
    for (let page = 0; page < data.length / PAGE_BYTES; page++) {
      replica.fill(page, data.subarray(page * PAGE_BYTES, (page + 1) * PAGE_BYTES));
    }
    replica.close();
  },
  serve(args: Group & { path: string; pages: number; address: string }): number {
    const { keyHex, path, pages, address, ...group } = args;
    source = openReplica(path, group.generation, pages, 'memory');
    server = new McdistServer({ bindAddress: address, interfaceAddress: address });
    server.serve({ ...group, key: Buffer.from(keyHex, 'hex'), provider: source.provider });
    return server.port;
  },
  /** Resolves when the server has answered the client's greeting. */
  async open(
    args: Group & {
      path: string;
      pages: number;
      address: string;
      server: [string, number];
      /** Asks the client itself for all pages; else the replica's prefetcher does. */
      direct: boolean;
    },
  ) {
    const { keyHex, generation, path, pages, group, groupPort } = args;
    const [address, port] = args.server;
    const key = Buffer.from(keyHex, 'hex');
    const interfaceAddress = args.address;
    if (args.direct) {
      filled = openReplica(path, generation, pages, 'memory');
      const at = { generation, key, group, groupPort, interfaceAddress };
      client = new McdistClient({ ...at, replica: filled.handle, server: { address, port } });
    } else {
      const source = { address, port, group, groupPort, key };
      const replica = { path, generation, pages, medium: 'memory' } as const;
      remote = new RemoteReplica({ ...replica, interfaceAddress, source });
    }
    while ((client?.stats() ?? remote?.stats().client)?.welcomed !== true) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  },
  /** Prefetches all; resolves with the time at which all was here. */
  async prefetch(): Promise<number> {
    if (client !== undefined && filled !== undefined) {
      const replica = filled;
      const complete = new Promise<number>((resolve) => {
        replica.onComplete(() => resolve(now_ms()));
      });
      client.prefetch(0, replica.stats().pages);
      return complete;
    }
    const replica = remote;
    if (replica === undefined) throw new Error('no replica is open');
    const complete = new Promise<number>((resolve, reject) => {
      replica.once('complete', () => resolve(now_ms()));
      replica.once('trouble', reject);
    });
    replica.prefetch({ rateBytesPerS: 0 });
    return complete;
  },
  tcpServe: ({ address, path }: { address: string; path: string }) =>
    addon.tcpBench.serve(address, path),
  async tcpReceive(args: { server: [string, number]; path: string; bytes: number }) {
    await addon.tcpBench.receive(...args.server, args.path, args.bytes);
    return now_ms();
  },
  cpuSeconds(): number {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1e6;
  },
  pid: () => process.pid,
  /** Counters of the server and the client here; null where there is none. */
  stats: () => ({
    server: server?.stats() ?? null,
    client: client?.stats() ?? remote?.stats().client ?? null,
  }),
};

type Operations = typeof operations;

process.on('message', async (message: { id: number; op: keyof Operations; args: never }) => {
  const { id, op, args } = message;
  try {
    process.send?.({ id, value: await operations[op](args) });
  } catch (error) {
    const { code, message: text } = error as { code?: string; message: string };
    process.send?.({ id, error: { code, message: text } });
  }
});
process.on('disconnect', () => process.exit(0));
process.send?.({ ready: true });

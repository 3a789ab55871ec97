/**
 * A host of the bench of single pages: serves and fetches pages with mcdist, and does the bare round
 * trips beside it. Speaks as mcdist-child.ts does. `start_ns` and `period_ns`: when the i-th page is
 * asked for, on the monotonic clock; 0 and 0: as soon as the last one is there.
 */
import { randomBytes } from 'node:crypto';
import { loadAddon } from '../../src/common/native.js';
import { McdistClient, McdistServer } from '../../src/mcdist/mcdist.js';
import { type Guest, Bench as Guests, type ReplicaJs } from '../../test/memtap/harness.js';

const PAGE_BYTES = 4096;

interface Group {
  generation: string;
  keyHex: string;
  group: string;
  groupPort: number;
}
interface Turn {
  from: number;
  count: number;
  start_ns: number;
  period_ns: number;
}

interface Addon {
  mcdistBench: {
    server(address: string): { udpPort: number; tcpPort: number };
    fetch(
      replica: unknown,
      from: number,
      count: number,
      handedOver: boolean,
      start: number,
      period: number,
    ): Promise<number[]>;
    roundTrips(
      kind: string,
      address: string,
      port: number,
      count: number,
      start: number,
      period: number,
    ): Promise<number[]>;
  };
}

const bench = loadAddon<Addon>('dataplane').mcdistBench;
const guests = new Guests();
let replica: ReplicaJs | undefined;
let guest: Guest | undefined;
let client: McdistClient | undefined;
let server: McdistServer | undefined;

const operations = {
  serve(args: Group & { pages: number; address: string }) {
    const { keyHex, pages, address, ...group } = args;
    replica = guests.replica(pages);
    for (let page = 0; page < pages; page++) replica.fill(page, randomBytes(PAGE_BYTES));
    server = new McdistServer({ bindAddress: address, interfaceAddress: address });
    server.serve({ ...group, key: Buffer.from(keyHex, 'hex'), provider: replica.provider });
    return { port: server.port, ...bench.server(address) };
  },
  /** Resolves when the client was welcomed and a guest has the replica for its memory. */
  async open(args: Group & { pages: number; address: string; server: [string, number] }) {
    const { keyHex, pages, address: interfaceAddress, server: at, ...group } = args;
    const [address, port] = at;
    replica = guests.replica(pages);
    client = new McdistClient({
      ...{ ...group, interfaceAddress, replica: replica.handle, server: { address, port } },
      key: Buffer.from(keyHex, 'hex'),
    });
    while (!client.stats().welcomed) await new Promise((resolve) => setTimeout(resolve, 5));
    ({ guest } = await guests.vm(guests.server(), pages, replica));
  },
  fetch: ({ from, count, start_ns, period_ns }: Turn) =>
    bench.fetch(replica?.handle, from, count, false, start_ns, period_ns),
  /** A guest's thread touches pages; a fault each. */
  async fault({ from, count, start_ns, period_ns }: Turn): Promise<number[]> {
    const said = await guest?.say(`time ${from} ${count} ${start_ns} ${period_ns}`);
    return (said ?? '').split(' ').slice(0, count).map(Number);
  },
  trips: (args: Turn & { kind: string; server: [string, number] }) =>
    bench.roundTrips(args.kind, ...args.server, args.count, args.start_ns, args.period_ns),
  stats: () => client?.stats() ?? server?.stats(),
  async end() {
    await client?.close();
    await server?.close();
    await guests.end();
  },
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
process.on('disconnect', () => {
  void guests.end().finally(() => process.exit(0));
});
process.send?.({ ready: true });

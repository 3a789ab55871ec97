import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { loadAddon } from '../../src/common/native.js';
import { McdistClient } from '../../src/mcdist/mcdist.js';
import { codec } from './codec.js';
import { FakeServer, FRAGMENTS, fakeGeneration, LOOPBACK } from './fake-server.js';

interface Replica {
  readonly handle: unknown;
  read(page: number): Buffer | null;
  close(): void;
}
const { Replica } = loadAddon<{
  Replica: new (path: string, generation: string, pages: number, medium: string) => Replica;
}>('dataplane');

const PAGES = 128; // four blocks
const OTHER = '127.0.0.2'; // not the client's own address

let folder: string;
let of: ReturnType<typeof fakeGeneration>;
let server: FakeServer;
let replica: Replica;
let client: McdistClient;
const others: FakeServer[] = [];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'sf-mcdist-'));
  of = fakeGeneration(PAGES);
  server = await FakeServer.start(of, OTHER);
  replica = new Replica(join(folder, 'replica'), of.generation, PAGES, 'disk');
  client = new McdistClient({
    ...{ generation: of.generation, key: of.key, group: of.group, groupPort: of.groupPort },
    ...{ replica: replica.handle, server: server.address, interfaceAddress: LOOPBACK },
    sourceTimeoutMs: 20_000,
    pushWaitMs: 1500, // a busy machine's JavaScript is slow to begin one
  });
});
afterEach(async () => {
  await client.close();
  replica.close();
  for (const other of [server, ...others.splice(0)]) await other.close();
  await rm(folder, { recursive: true, force: true });
});

async function another(): Promise<FakeServer> {
  const other = await FakeServer.start(of, '127.0.0.3');
  others.push(other);
  return other;
}

const here = (first: number, count: number) =>
  Array.from({ length: count }, (_, i) => first + i).filter((page) => {
    const read = replica.read(page);
    return read !== null && of.pages[page]?.equals(read);
  }).length;

/** Answers like a server that only pushes and repairs nothing. */
function answerRuns(from: FakeServer): void {
  from.onRequest = ({ runs }) => {
    for (const run of runs) {
      for (let i = 0; i < Number(run.count); i++) from.page(Number(run.first) + i);
    }
  };
}

async function subscribed(): Promise<void> {
  await expect.poll(() => client.stats().welcomed).toBe(true);
  server.announce({ complete: true }); // or it would take itself for out of the group's reach
  await expect.poll(() => client.stats()).toMatchObject({ announces: 1, unicastOnly: false });
  client.subscribe();
  expect((await server.asked((request) => request.subscribe)).runs).toEqual([]);
}

/** Pushes all pages but some symbols, as page -> fragments that are sent. */
function push(lost: Record<number, number[]>): void {
  server.announce({ pushing: true, complete: true });
  for (let page = 0; page < PAGES; page++) {
    server.page(page, { pushed: true, fragments: lost[page] ?? [0, 1, 2] });
  }
  server.announce({ complete: true, position: BigInt(PAGES) });
}

const bit = (page: number, fragment: number) => 1n << BigInt((page % 32) * FRAGMENTS + fragment);

test('what a push loses is reported by block, exactly, and nothing else is asked for', async () => {
  await subscribed();
  push({ 3: [0, 2], 40: [], 41: [1] });
  await server.asked(({ reports }) => reports.some(({ block }) => block === 1n));
  expect(server.requests.flatMap(({ runs }) => runs)).toEqual([]);
  expect(server.requests.flatMap(({ reports }) => reports)).toEqual([
    { block: 0n, fragments: 3, need: 1, cover: 0, wanted: 1 << 3, missing: bit(3, 1) },
    {
      ...{ block: 1n, fragments: 3, need: 5, cover: 0, wanted: (1 << 8) | (1 << 9) },
      missing: bit(40, 0) | bit(40, 1) | bit(40, 2) | bit(41, 0) | bit(41, 2),
    },
  ]);
  await expect.poll(() => here(0, PAGES)).toBe(PAGES - 3);
  server.page(3, { fragments: [1] });
  server.page(40);
  server.page(41, { fragments: [0, 2] });
  // All is here: the server is told to push no more.
  await expect.poll(() => here(0, PAGES)).toBe(PAGES);
  await expect.poll(() => server.requests.at(-1)?.subscribe).toBe(false);
  expect(client.stats()).toMatchObject({ retries: 0, pagesRequested: 0, subscribed: false });
});

test('a block is reported while the push goes on, and asked again if nothing comes', async () => {
  await subscribed();
  server.announce({ pushing: true, complete: true });
  for (let page = 0; page < 64; page++) if (page !== 5) server.page(page, { pushed: true });
  const { reports } = await server.asked(({ reports }) => reports.length > 0);
  expect(reports).toMatchObject([{ block: 0n, wanted: 1 << 5 }]);
  server.requests.length = 0;
  await server.asked(({ reports }) => reports.length > 0);
  await expect.poll(() => here(0, 64)).toBe(63);
});

test('parities repair as many lost symbols as there are, over several pages', async () => {
  await subscribed();
  push({ 33: [0, 1], 50: [2], 51: [0, 1] });
  const { reports } = await server.asked(({ reports }) => reports.length > 0);
  const missing = reports[0]?.missing ?? 0n;
  expect(reports).toMatchObject([{ block: 1n, need: 4 }]);
  const cover = Buffer.alloc(16);
  cover.writeBigUInt64BE(missing >> 64n, 0);
  cover.writeBigUInt64BE(missing & 0xffffffffffffffffn, 8);
  const block = Buffer.concat(of.pages.slice(32, 64));
  const parities = codec.encode(block, FRAGMENTS, cover, 0, 4);
  if (parities === null) throw new Error('not encoded');
  const size = parities.length / 4;
  const parity = (i: number) =>
    server.parity(1, i, 9, missing, parities.subarray(i * size, (i + 1) * size));
  for (const i of [0, 1, 1, 3]) parity(i);
  await expect.poll(() => client.stats().paritiesReceived).toBe(4);
  await expect.poll(() => here(0, PAGES)).toBe(PAGES - 3);
  // Asked again, the report says which parities are held and how many more are needed.
  const again = await server.asked(({ reports }) => reports.some(({ cover }) => cover === 9));
  expect(again.reports).toMatchObject([{ block: 1n, need: 1, missing }]);
  parity(2);
  await expect.poll(() => here(0, PAGES)).toBe(PAGES);
  expect(client.stats()).toMatchObject({ pagesRepaired: 3, pagesRequested: 0 });
});

test('without a push the pages are asked for one by one', async () => {
  await subscribed();
  answerRuns(server);
  await expect.poll(() => here(0, PAGES), { timeout: 20_000 }).toBe(PAGES);
  expect(client.stats().pagesRequested).toBeGreaterThanOrEqual(PAGES);
});

test('who joins a push late asks for what went by, at once, and waits for the rest', async () => {
  await subscribed();
  server.announce({ pushing: true, complete: true, position: 96n });
  const { runs } = await server.asked(({ runs }) => runs.length > 0);
  expect(runs).toMatchObject([{ first: 0n, count: 96n, urgent: false }]);
  for (let page = 0; page < PAGES; page++) server.page(page, { pushed: page >= 96 });
  await expect.poll(() => here(0, PAGES)).toBe(PAGES);
  const { pagesRequested, retries } = client.stats();
  expect(pagesRequested - retries).toBe(96);
});

test('a fault for a page that a push will bring is asked for all the same', async () => {
  await subscribed();
  server.announce({ pushing: true, complete: true });
  const fetched = client.fetch(100);
  const { runs } = await server.asked(({ runs }) => runs.length > 0);
  expect(runs).toMatchObject([{ first: 100n, count: 1n, urgent: true }]);
  server.page(100);
  await fetched;
});

test('a silent server is left for the one that holds all, and not gone back to', async () => {
  const [partial, complete] = [await another(), await another()];
  partial.announce({ held: 100n });
  complete.announce({ complete: true });
  await expect.poll(() => client.stats().serversKnown).toBe(3);
  answerRuns(complete);
  server.welcoming = false;
  await client.fetch(7);
  expect(here(7, 1)).toBe(1);
  expect(client.stats()).toMatchObject({ failOvers: 1, serverPort: complete.address.port });
  expect(partial.requests).toEqual([]);
  // It speaks again, and is not asked.
  server.welcoming = true;
  server.announce({ complete: true });
  server.requests.length = 0;
  await client.fetch(8);
  expect(server.requests).toEqual([]);
});

test('a page that one server refuses is had from another one that holds it', async () => {
  const other = await another();
  other.announce({ held: 1n });
  await expect.poll(() => client.stats().serversKnown).toBe(2);
  answerRuns(other);
  server.onRequest = ({ runs }) => {
    for (const run of runs) server.negative(Number(run.first), Number(run.count));
  };
  await client.fetch(9);
  expect(here(9, 1)).toBe(1);
  expect(client.stats()).toMatchObject({ pagesFailed: 0, failOvers: 1 });
});

test('negative answers of a server that was not asked count for nothing', async () => {
  const other = await another();
  const fetched = client.fetch(10);
  await server.asked(({ runs }) => runs.length > 0);
  for (let i = 0; i < 50; i++) other.announce({ held: 1n });
  for (let i = 0; i < 50; i++) other.negative(10);
  await expect.poll(() => client.stats().announces).toBe(50);
  server.page(10);
  await fetched;
  expect(client.stats()).toMatchObject({ negativeAnswers: 0, failOvers: 0 });
});

test('a client that the group does not reach says so, until it is reached', async () => {
  await expect.poll(() => client.stats().unicastOnly).toBe(true);
  client.prefetch(0, 1);
  expect((await server.asked(({ runs }) => runs.length > 0)).unicastOnly).toBe(true);
  server.requests.length = 0;
  server.announce();
  await expect.poll(() => client.stats().unicastOnly).toBe(false);
  client.prefetch(1, 1);
  const told = await server.asked(({ runs }) => runs.some(({ first }) => first === 1n));
  expect(told.unicastOnly).toBe(false);
});

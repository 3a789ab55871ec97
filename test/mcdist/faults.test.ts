// Members that lie, hosts that repeat and alter what they hear, and packed pages: with real servers
// and clients. No wrong byte, an end in time, and counters that show what happened.
import { randomBytes } from 'node:crypto';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistClientStats, McdistServerStats } from '../../src/mcdist/mcdist.js';
import {
  type Host,
  Net,
  newGeneration,
  startReceiver,
  startSource,
  type TestGeneration,
} from './net.js';
import {
  type Announce,
  announceBody,
  type RequestOptions,
  type Run,
  requestBody,
  seal,
  TYPE,
  unseal,
} from './wire.js';

const PAGES = 2048;
const SLOW = { startRateBytesPerS: 2e7, minRateBytesPerS: 4e6, maxRateBytesPerS: 2e7 };

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(async () => {
  await net.close();
});

const serverStats = (host: Host) => host.call<McdistServerStats>('stats', { name: 'server' });
const clientStats = (host: Host) => host.call<McdistClientStats>('stats', { name: 'client' });
const subscribe = (host: Host, pages = PAGES) =>
  host.call('call', { name: 'client', method: 'prefetch', args: [0, pages] });
const filled = (host: Host, least = PAGES) =>
  host.call('reached', { name: 'replica', counter: 'present', least });
const serverReached = (host: Host, counter: string, least: number) =>
  host.call('reached', { name: 'server', counter, least });

async function expectSame(source: Host, ...hosts: Host[]): Promise<void> {
  const expected = await source.call<string>('digest', { name: 'source' });
  for (const host of hosts) expect(await host.call('digest', { name: 'replica' })).toBe(expected);
}

/** A member of the generation that says what a test tells it to. */
class Liar {
  readonly boot = randomBytes(16);
  readonly #id: Buffer;
  readonly #key: Buffer;
  #counter = 0n;
  #cookie = 0n;

  constructor(
    readonly host: Host,
    readonly generation: TestGeneration,
    readonly server: { address: string; port: number },
  ) {
    this.#id = Buffer.from(generation.generation, 'hex');
    this.#key = Buffer.from(generation.keyHex, 'hex');
  }

  request(runs: Run[], options: RequestOptions = {}): string {
    return seal(this.#key, {
      ...{ type: TYPE.request, generation: this.#id, boot: this.boot },
      ...{ counter: ++this.#counter, body: requestBody(this.#cookie, runs, options) },
    }).toString('hex');
  }

  welcomed(reply: string): void {
    this.#cookie = unseal(this.#key, this.#id, Buffer.from(reply, 'hex')).readBigUInt64BE(0);
  }

  async greet(): Promise<void> {
    const args = { ...this.server, hex: this.request([]), ms: 5000 };
    this.welcomed(await this.host.call<string>('ask', args));
  }

  tell(runs: Run[], options: RequestOptions = {}): Promise<void> {
    return this.host.call('send', { ...this.server, hex: this.request(runs, options) });
  }

  /** An announce to the group, as of a server with this boot id. */
  announce(announce: Announce): Promise<void> {
    const packet = seal(this.#key, {
      ...{ type: TYPE.announce, generation: this.#id, boot: this.boot },
      ...{ counter: ++this.#counter, body: announceBody(announce) },
    });
    const { group: address, groupPort: port } = this.generation;
    const interfaceAddress = this.host.address;
    return this.host.call('send', {
      address,
      port,
      interfaceAddress,
      hex: packet.toString('hex'),
    });
  }
}

for (const [name, lies] of Object.entries({
  'nothing arrives and all is lost': { receiveKbps: 0, lossPermille: 1000 },
  'more arrives than there is': { receiveKbps: 0xffff_ffff, lossPermille: 0xffff },
})) {
  test(`a member that says ${name} holds up nobody`, async () => {
    const generation = newGeneration();
    const [source, bad, ...good] = [await net.host(), await net.host(), await net.host()];
    good.push(await net.host(), await net.host());
    const server = await startSource(net, source, generation, { pages: PAGES });
    for (const host of good) await startReceiver(net, host, generation, server, { pages: PAGES });
    const liar = new Liar(bad, generation, server);
    await liar.greet();
    for (const host of good) await subscribe(host);
    for (let i = 0; i < 50; i++) await liar.tell([], { ...lies, subscribe: true });
    for (const host of good) await filled(host);
    await expectSame(source, ...good);
    const stats = await serverStats(source);
    expect(stats.requests).toBeGreaterThanOrEqual(50);
    expect(stats.rateLimitBytesPerS).toBeGreaterThanOrEqual(4e6);
    expect(stats.rateLimitBytesPerS).toBeLessThanOrEqual(10e9);
  });
}

test('a member that reports all as lost, for ever, gets a bounded share', async () => {
  const generation = newGeneration();
  const [source, bad, good] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  await startReceiver(net, good, generation, server, { pages: PAGES });
  const liar = new Liar(bad, generation, server);
  await liar.greet();
  await subscribe(good);
  await filled(good, 64);
  const all = (1n << 96n) - 1n;
  const blocks = PAGES / 32;
  const sent = 40;
  for (let i = 0; i < sent; i++) {
    const reports = Array.from({ length: 16 }, (_, k) => ({
      block: BigInt((i * 16 + k) % blocks),
      fragments: 3,
      need: 96,
      cover: (i + k) % 256,
      wanted: i % 2 === 0 ? 0xffff_ffff : 0,
      missing: k % 3 === 0 ? 1n : all,
    }));
    await liar.tell([], { subscribe: true, lossPermille: 1000, reports });
  }
  // Not of the generation, more needed than there is, symbols that no block has: dropped whole.
  const report = { block: 0n, fragments: 3, need: 1, wanted: 1, missing: 1n };
  await liar.tell([], { reports: [{ ...report, block: BigInt(blocks) }] });
  await liar.tell([], { reports: [{ ...report, need: 97 }] });
  await liar.tell([], { reports: [{ ...report, missing: all << 32n }] });
  await liar.tell([], { reports: [{ ...report, fragments: 0 }] });
  await serverReached(source, 'badPackets', 4);
  await filled(good);
  await expectSame(source, good);
  const stats = await serverStats(source);
  expect(stats.reports).toBeGreaterThanOrEqual(sent * 16);
  // Each report is answered once at most, and a repair is no larger than its block.
  expect(stats.repairSymbols + stats.paritySymbols).toBeLessThanOrEqual(stats.reports * 96);
});

test('a thousand members that subscribe and say no more: the others get all', async () => {
  const generation = newGeneration();
  const [source, bad, good] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: PAGES });
  const liars = Array.from({ length: 1000 }, () => new Liar(bad, generation, server));
  const ask = (hexes: string[]) => bad.call<string[]>('askAll', { ...server, hexes });
  const cookies = new Map<string, string>();
  const id = Buffer.from(generation.generation, 'hex');
  const key = Buffer.from(generation.keyHex, 'hex');
  for (const reply of await ask(liars.map((liar) => liar.request([])))) {
    const body = unseal(key, id, Buffer.from(reply, 'hex'));
    cookies.set(body.subarray(8, 24).toString('hex'), reply);
  }
  expect(cookies.size).toBe(1000);
  for (const liar of liars) liar.welcomed(cookies.get(liar.boot.toString('hex')) ?? '');
  // Without runs or reports it is answered by a welcome, so each is known to have come.
  await ask(liars.map((liar) => liar.request([], { subscribe: true })));
  await startReceiver(net, good, generation, server, { pages: PAGES });
  await subscribe(good);
  await filled(good);
  await expectSame(source, good);
  expect((await serverStats(source)).peers).toBe(1001);
  // Silent for two seconds, they are no reason to push.
  await good.call('fetchAll', { name: 'client', count: PAGES });
  await expect
    .poll(async () => (await serverStats(source)).subscribers, { timeout: 20_000 })
    .toBe(0);
});

test('announces that lie about place, pages and position: left for the server that has it', async () => {
  const generation = newGeneration();
  const [source, bad, full, good] = [
    await net.host(),
    await net.host(),
    await net.host(),
    await net.host(),
  ];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW });
  await startReceiver(net, full, generation, server, { pages: PAGES });
  await full.call('fetchAll', { name: 'client', count: PAGES });
  await startReceiver(net, good, generation, server, { pages: PAGES });
  await good.call('reached', { name: 'client', counter: 'welcomes', least: 1 });
  const pages = BigInt(PAGES);
  const truth = { address: bad.address, port: 9, held: pages, position: pages, pages };
  const announced = async () => (await clientStats(good)).announces;
  // Complete, and nobody is there.
  for (const port of [9, 10]) {
    await new Liar(bad, generation, server).announce({ ...truth, complete: true, port });
  }
  await good.call('reached', { name: 'client', counter: 'serversKnown', least: 3 });
  // What cannot be: more than all, no port, no host's address, of another size.
  const lies = [
    { held: pages + 1n },
    { position: pages + 1n },
    { port: 0 },
    { pages: pages * 2n },
    { address: '0.0.0.0' },
    { address: '255.255.255.255' },
    { address: generation.group },
  ];
  for (const lie of lies) await new Liar(bad, generation, server).announce({ ...truth, ...lie });
  await good.call('reached', { name: 'client', counter: 'badPackets', least: lies.length });
  expect(await announced()).toBeGreaterThan(0);
  await full.call('server', {
    ...{ name: 'server', bindAddress: full.address, port: 0, interfaceAddress: full.address },
  });
  await full.call('serve', {
    ...{ name: 'server', provider: 'replica', ...generation, policy: { announceMs: 100 } },
  });
  await subscribe(good);
  await filled(good, 64);
  const expected = await source.call<string>('digest', { name: 'source' });
  await source.kill();
  await filled(good);
  expect(await good.call('digest', { name: 'replica' })).toBe(expected);
  expect(await clientStats(good)).toMatchObject({ lost: false, pagesFailed: 0 });
});

test('thirty servers that died use up little of the time-out: the one that lives is found', async () => {
  const generation = newGeneration();
  const [source, bad, full, good] = [
    await net.host(),
    await net.host(),
    await net.host(),
    await net.host(),
  ];
  const server = await startSource(net, source, generation, { pages: PAGES });
  await startReceiver(net, full, generation, server, { pages: PAGES });
  // All but one, so that those who say that they have all come first.
  await full.call('fetchAll', { name: 'client', count: PAGES - 1 });
  await full.call('close', { name: 'client' });
  const sourceTimeoutMs = 6000;
  await startReceiver(net, good, generation, server, { pages: PAGES, sourceTimeoutMs });
  await good.call('reached', { name: 'client', counter: 'welcomes', least: 1 });
  const pages = BigInt(PAGES);
  await full.call('server', {
    ...{ name: 'server', bindAddress: full.address, port: 0, interfaceAddress: full.address },
  });
  await full.call('serve', {
    ...{ name: 'server', provider: 'replica', ...generation, policy: { announceMs: 100 } },
  });
  await good.call('reached', { name: 'client', counter: 'serversKnown', least: 2 });
  for (let port = 9; port < 39; port++) {
    const truth = { address: bad.address, held: pages, position: pages, pages };
    await new Liar(bad, generation, server).announce({ ...truth, complete: true, port });
  }
  await good.call('reached', { name: 'client', counter: 'serversKnown', least: 32 });
  const held = Array.from({ length: PAGES - 1 }, (_, page) => page);
  const expected = await source.call<string>('digest', { name: 'source', pages: held });
  await source.kill();
  await good.call('fetchAll', { name: 'client', count: PAGES - 1 });
  expect(await good.call('digest', { name: 'replica', pages: held })).toBe(expected);
  const stats = await clientStats(good);
  expect(stats).toMatchObject({ lost: false, pagesFailed: 0, serverAddress: full.address });
  // Each once at most.
  expect(stats.failOvers).toBeGreaterThan(1);
  expect(stats.failOvers).toBeLessThanOrEqual(31);
  console.log(`${stats.failOvers} servers tried`);
});

test('a host that repeats and alters all it hears, during a push: no byte is wrong', async () => {
  const generation = newGeneration();
  const [source, bad, ...good] = [await net.host(), await net.host(), await net.host()];
  good.push(await net.host());
  const zeros: [number, number][] = [[500, 100]];
  const server = await startSource(net, source, generation, { pages: PAGES, policy: SLOW, zeros });
  const { group, groupPort: port } = generation;
  await bad.call('echo', { name: 'echo', group, port, interfaceAddress: bad.address });
  for (const host of good) {
    await net.lose(host, 2);
    await startReceiver(net, host, generation, server, { pages: PAGES });
    await subscribe(host);
  }
  for (const host of good) {
    await filled(host, PAGES - 100);
    await host.call('fetchAll', { name: 'client', count: PAGES });
  }
  await expectSame(source, ...good);
  for (const host of good) {
    const stats = await clientStats(host);
    expect(stats.duplicates).toBeGreaterThan(0);
    expect(stats.authFailures).toBeGreaterThan(0);
    expect(stats.wrongGeneration).toBeGreaterThan(0);
  }
});

test('pages that pack go in one packet each, the others as ever', async () => {
  const generation = newGeneration();
  const [source, ...good] = [await net.host(), await net.host(), await net.host()];
  const packs: [number, number] = [200, 800];
  const server = await startSource(net, source, generation, {
    ...{ pages: PAGES, packs, policy: { pack: true } },
  });
  for (const host of good) {
    await net.lose(host, 2);
    await startReceiver(net, host, generation, server, { pages: PAGES });
  }
  // Together: else a push could be over before the second one comes.
  await Promise.all(good.map((host) => subscribe(host)));
  for (const host of good) await filled(host);
  await expectSame(source, ...good);
  const stats = await serverStats(source);
  expect(stats.packedPages).toBeGreaterThanOrEqual(packs[1]);
  expect(stats.packedPages).toBeLessThan(2 * packs[1]);
  for (const host of good) {
    const { packedPages, badPackets } = await clientStats(host);
    expect(packedPages).toBeGreaterThan(packs[1] / 2);
    expect(badPackets).toBe(0);
  }
});

test('pages are not packed unless that is set', async () => {
  const generation = newGeneration();
  const [source, host] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64, packs: [0, 64] });
  await startReceiver(net, host, generation, server, { pages: 64 });
  await host.call('fetchAll', { name: 'client', count: 64 });
  await expectSame(source, host);
  expect((await serverStats(source)).packedPages).toBe(0);
});

test('a packed page that unpacks to no page is dropped, and had otherwise', async () => {
  const generation = newGeneration();
  const [source, bad, host] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 64 });
  await startReceiver(net, host, generation, server, { pages: 64 });
  const liar = new Liar(bad, generation, server);
  const pages = 64n;
  await liar.announce({ address: bad.address, port: 9, held: 0n, pages });
  await host.call('reached', { name: 'client', counter: 'serversKnown', least: 2 });
  const packet = seal(Buffer.from(generation.keyHex, 'hex'), {
    ...{ type: TYPE.packed, generation: Buffer.from(generation.generation, 'hex') },
    ...{ boot: liar.boot, counter: 100n, page: 7n, body: randomBytes(300) },
  });
  const { group: address, groupPort: port } = generation;
  const hex = packet.toString('hex');
  await bad.call('send', { address, port, interfaceAddress: bad.address, hex });
  await host.call('reached', { name: 'client', counter: 'badPackets', least: 1 });
  await host.call('fetchAll', { name: 'client', count: 64 });
  await expectSame(source, host);
});

import { randomBytes } from 'node:crypto';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { McdistClientStats, McdistServerStats } from '../../src/mcdist/mcdist.js';
import { type Host, Net, newGeneration, startReceiver, startSource } from './net.js';
import { announceBody, readRequest, requestBody, seal, TYPE, unseal } from './wire.js';

let net: Net;
beforeEach(async () => {
  net = await Net.make();
});
afterEach(async () => {
  await net.close();
});

const serverStats = (host: Host) => host.call<McdistServerStats>('stats', { name: 'server' });
const clientStats = (host: Host) => host.call<McdistClientStats>('stats', { name: 'client' });

/** Sends packets to a group from a host that is no member. */
async function toGroup(
  host: Host,
  { group, groupPort }: { group: string; groupPort: number },
  packets: Buffer[],
): Promise<void> {
  for (const packet of packets) {
    const hex = packet.toString('hex');
    await host.call('send', {
      address: group,
      port: groupPort,
      interfaceAddress: host.address,
      hex,
    });
  }
}

/** The boot id under which a server sends: its welcome tells it to any member. */
async function bootOf(
  host: Host,
  generation: ReturnType<typeof newGeneration>,
  server: { address: string; port: number },
): Promise<Buffer> {
  const greeting = seal(Buffer.from(generation.keyHex, 'hex'), {
    type: TYPE.request,
    generation: Buffer.from(generation.generation, 'hex'),
    boot: randomBytes(16),
    counter: 1n,
    body: requestBody(0n, []),
  });
  const args = { ...server, hex: greeting.toString('hex'), ms: 5000 };
  return Buffer.from(await host.call<string>('ask', args), 'hex').subarray(24, 40);
}

/** The packets of all pages of a small generation, as they went over the wire. */
async function recordPages(
  net: Net,
  source: Host,
  sniffer: Host,
  generation: ReturnType<typeof newGeneration>,
  server: { address: string; port: number },
  pages: number,
): Promise<Buffer[]> {
  await sniffer.call('sniff', {
    name: 'sniffer',
    group: generation.group,
    port: generation.groupPort,
    interfaceAddress: sniffer.address,
  });
  const asker = await net.host();
  await startReceiver(net, asker, generation, server, { pages });
  await asker.call('fetchAll', { name: 'client', count: pages });
  for (;;) {
    const heard = await sniffer.call<string[]>('packets', { name: 'sniffer' });
    const packets = heard.filter((packet) => packet.startsWith('5f24'));
    if (packets.length >= 3 * pages) {
      await source.call('call', {
        name: 'server',
        method: 'unserve',
        args: [generation.generation],
      });
      return packets.map((packet) => Buffer.from(packet, 'hex'));
    }
  }
}

test('altered, cut, foreign and forged packets are counted and change nothing', async () => {
  const generation = newGeneration();
  const pages = 16;
  const [source, attacker, victim] = [await net.host(), await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages });
  const boot = await bootOf(attacker, generation, server);
  const recorded = await recordPages(net, source, attacker, generation, server, pages);
  await startReceiver(net, victim, generation, server, { pages });
  const reached = (counter: string, least: number) =>
    victim.call('reached', { name: 'client', counter, least });

  const seed = randomBytes(4).readUInt32LE();
  console.log(`seed ${seed}`);
  const flip = (packet: Buffer, at: number) => {
    const out = Buffer.from(packet);
    out[at] = (out[at] ?? 0) ^ (1 << ((seed >>> (at % 24)) % 8));
    return out;
  };
  const sample = recorded[seed % recorded.length];
  if (sample === undefined) throw new Error('nothing recorded');
  // Bit flips in each part of a packet: counter, body, tag. And another page's number.
  const altered = [12, 17, 24, 700, sample.length - 1].map((at) => flip(sample, at));
  const otherPage = Buffer.from(sample);
  otherPage.writeUInt8((otherPage[22] ?? 0) ^ 1, 22);
  altered.push(otherPage);
  const foreign = [flip(sample, 4), flip(sample, 7)];
  const strangers: Buffer[] = [flip(sample, 8), flip(sample, 11)];
  const key = Buffer.from(generation.keyHex, 'hex');
  const id = Buffer.from(generation.generation, 'hex');
  const malformed: Buffer[] = [
    Buffer.alloc(0),
    sample.subarray(0, 39),
    sample.subarray(0, sample.length - 1),
    Buffer.concat([sample, Buffer.from([0])]),
    flip(sample, 0),
    randomBytes(1400),
    // Of version 1, of no type, fragment 3 of 3, 15 fragments, an unknown flag, a cursor though not
    // pushed.
    ...[
      [1, 0x14],
      [1, 0x29],
      [2, 0x33],
      [2, 0x0f],
      [3, 0x02],
      [23, 0x01],
    ].map(([at = 0, value = 0]) => {
      const out = Buffer.from(sample);
      out[at] = value;
      return out;
    }),
    // A client's packet, for the server, sent to the group.
    seal(key, {
      type: TYPE.request,
      generation: id,
      boot: randomBytes(16),
      counter: 1n,
      body: requestBody(0n, []),
    }),
  ];
  // A page beyond the end is malformed as well, whoever sealed it.
  const beyond = Buffer.from(sample);
  beyond.writeUIntBE(0xffffff, 18, 5);
  malformed.push(beyond);
  // Right in all but the key: an announce of a server that is none, and its page.
  const forger = { generation: id, boot: randomBytes(16), counter: 1n };
  const forgedAnnounce = seal(randomBytes(32), {
    ...forger,
    type: TYPE.announce,
    body: Buffer.alloc(32),
  });
  strangers.push(
    seal(randomBytes(32), {
      ...forger,
      type: TYPE.page,
      fragments: 3,
      page: 1n,
      body: Buffer.alloc(1366),
    }),
  );
  // It makes the recorded packets' sender known to the victim, whose server is gone.
  const announce = seal(key, {
    ...{ type: TYPE.announce, generation: id, boot, counter: 1n << 40n },
    body: announceBody({ ...server, complete: true, held: BigInt(pages), pages: BigInt(pages) }),
  });
  await toGroup(attacker, generation, [announce]);
  await reached('announces', 1);
  const packets = [...altered, forgedAnnounce, ...foreign, ...strangers, ...malformed];
  await toGroup(attacker, generation, packets);
  await reached('badPackets', malformed.length);
  await reached('wrongGeneration', foreign.length);
  await reached('unknownSender', strangers.length);
  await reached('authFailures', altered.length + 1);
  expect(await victim.call('replicaStats', { name: 'replica' })).toMatchObject({ present: 0 });

  // The recorded packets as they were: late, from a stranger, and still the right bytes.
  await toGroup(attacker, generation, recorded);
  await reached('pagesFilled', pages);
  expect(await victim.call('digest', { name: 'replica' })).toBe(
    await source.call('digest', { name: 'source' }),
  );
  expect((await clientStats(victim)).pagesFilled).toBe(pages);
});

test('recorded requests move no page: not again, not at a restarted server', async () => {
  const generation = newGeneration();
  const pages = 16;
  const [source, attacker, member] = [await net.host(), await net.host(), await net.host()];
  let server = await startSource(net, source, generation, { pages });
  const relayPort = await attacker.call<number>('relay', {
    name: 'relay',
    interfaceAddress: attacker.address,
    server,
  });
  const relay = { address: attacker.address, port: relayPort };
  await startReceiver(net, member, generation, relay, { pages });
  await member.call('fetchAll', { name: 'client', count: pages });
  await member.call('close', { name: 'client' });
  const recorded = await attacker.call<string[]>('packets', { name: 'relay' });
  expect(recorded.length).toBeGreaterThan(1);

  const before = await serverStats(source);
  for (const hex of recorded) await attacker.call('send', { ...server, hex });
  // All but the greetings, which had no cookie yet, are known as replays.
  const [key, id] = [generation.keyHex, generation.generation].map((hex) =>
    Buffer.from(hex, 'hex'),
  );
  if (key === undefined || id === undefined) throw new Error('no key');
  const greetings = recorded.filter(
    (hex) => readRequest(unseal(key, id, Buffer.from(hex, 'hex'))).cookie === 0n,
  ).length;
  const least = before.replays + recorded.length - greetings;
  await source.call('reached', { name: 'server', counter: 'replays', least });
  const after = await serverStats(source);
  expect(after.welcomes - before.welcomes).toBeLessThanOrEqual(greetings);
  // Besides the welcomes, announces: some are sent for seconds after anybody was heard.
  const others = (of: McdistServerStats) => of.packetsSent - of.welcomes - of.announces;
  expect(others(after)).toBe(others(before));
  expect(after.pagesServed).toBe(before.pagesServed);

  await source.kill();
  const restarted = await net.restart(source.namespace, source.address);
  server = await startSource(net, restarted, generation, {
    pages,
    port: server.port,
    fresh: false,
  });
  for (const hex of recorded) {
    const reply = await attacker.call<string | null>('ask', { ...server, hex, ms: 5000 });
    // A welcome at most, and no longer than what provoked it.
    expect(reply?.length).toBeLessThanOrEqual(hex.length);
  }
  const stats = await serverStats(restarted);
  expect(stats.pagesServed).toBe(0);
  expect(others(stats)).toBe(0);
});

test('noise at the server is counted, never answered', async () => {
  const generation = newGeneration();
  const [source, attacker] = [await net.host(), await net.host()];
  const server = await startSource(net, source, generation, { pages: 16 });
  const request = seal(Buffer.from(generation.keyHex, 'hex'), {
    type: TYPE.request,
    generation: Buffer.from(generation.generation, 'hex'),
    boot: randomBytes(16),
    counter: 1n,
    body: requestBody(0n, []),
  });
  const stranger = Buffer.from(request);
  stranger.writeUInt8((stranger[60] ?? 0) ^ 1, 60);
  const otherGeneration = Buffer.from(request);
  otherGeneration.writeUInt8((otherGeneration[5] ?? 0) ^ 1, 5);
  for (const packet of [stranger, otherGeneration, randomBytes(300), request.subarray(0, 80)]) {
    await attacker.call('send', { ...server, hex: packet.toString('hex') });
  }
  const reached = (counter: string, least: number) =>
    source.call('reached', { name: 'server', counter, least });
  await reached('authFailures', 2); // one altered, one cut short behind its header
  await reached('wrongGeneration', 1);
  await reached('strayPackets', 1);
  expect((await serverStats(source)).packetsSent).toBe(0);
});

test('a member that asks for a million pages has a bounded share, others are served', async () => {
  const generation = newGeneration();
  const pages = 1 << 20;
  const [source, hog, member] = [await net.host(), await net.host(), await net.host()];
  const slow = { startRateBytesPerS: 1e5, minRateBytesPerS: 1e5, maxRateBytesPerS: 1e7 };
  const server = await startSource(net, source, generation, { pages, held: 64, policy: slow });
  const key = Buffer.from(generation.keyHex, 'hex');
  const boot = randomBytes(16);
  let counter = 0n;
  const packet = (cookie: bigint, runs: Parameters<typeof requestBody>[1]) =>
    seal(key, {
      type: TYPE.request,
      generation: Buffer.from(generation.generation, 'hex'),
      boot,
      counter: ++counter,
      body: requestBody(cookie, runs),
    }).toString('hex');
  const welcome = await hog.call<string>('ask', { ...server, hex: packet(0n, []), ms: 5000 });
  const id = Buffer.from(generation.generation, 'hex');
  const cookie = unseal(key, id, Buffer.from(welcome, 'hex')).readBigUInt64BE(0);
  const everything = Array.from({ length: 160 }, (_, i) => ({
    first: BigInt(i * 4096),
    count: 4096n,
    urgent: i % 2 === 0,
  }));
  for (let i = 0; i < 20; i++) {
    await hog.call('send', { ...server, hex: packet(cookie, everything) });
  }
  await source.call('reached', { name: 'server', counter: 'requests', least: 20 });
  const stats = await serverStats(source);
  expect(stats.pagesRequested).toBe(20 * 160 * 4096);
  expect(stats.queuedPages).toBeLessThanOrEqual(2 * 2048);
  expect(stats.queueDropped).toBeGreaterThan(0);
  // Runs that end beyond the generation, and a count that does not fit the packet.
  await hog.call('send', { ...server, hex: packet(cookie, [{ first: BigInt(pages), count: 1n }]) });
  const lying = requestBody(cookie, [{ first: 0n, count: 1n }]);
  lying.writeUInt16BE(60000, 14);
  const body = seal(key, {
    type: TYPE.request,
    generation: Buffer.from(generation.generation, 'hex'),
    boot,
    counter: ++counter,
    body: lying,
  });
  await hog.call('send', { ...server, hex: body.toString('hex') });
  await source.call('reached', { name: 'server', counter: 'badPackets', least: 2 });

  await startReceiver(net, member, generation, server, { pages });
  await member.call('fetch', { name: 'client', pages: [63] });
  expect((await clientStats(member)).pagesFailed).toBe(0);
});

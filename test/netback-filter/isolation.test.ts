/**
 * Frames that must not pass. Each test sends them and then, on the same way, one that may pass: when
 * that has arrived, the others would have, and the counters say why they did not. A tap's frames wait
 * at the processor that wrote them, so that a later one may overtake: only when the counters have all
 * of them is it said what arrived.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { GATEWAY, GUEST_MAC, VMID_GATEWAY, wireMac } from '../../src/network/addresses.js';
import { arp, BROADCAST_MAC, ethernet, type Ip, ipv4, udp } from './frames.js';
import { type Guest, gained, type Host, Lab } from './lab.js';

const FAMILY = 7;
const OTHER = 8;
let lab: Lab;
let mine: Guest; // family 7, host 1
let sibling: Guest; // family 7, host 1
let remote: Guest; // family 7, host 2
let foreign: Guest; // family 8, host 1
let foreignRemote: Guest; // family 8, host 2
let all: Guest[];
let serial = 0;
/** From and to ::, no payload. */
const IPV6 = Buffer.concat([Buffer.from([0x60, 0, 0, 0, 0, 0, 59, 64]), Buffer.alloc(32)]);

beforeAll(async () => {
  lab = await Lab.create(2);
  mine = lab.host(0).guest(FAMILY, 0);
  sibling = lab.host(0).guest(FAMILY, 1);
  remote = lab.host(1).guest(FAMILY, 2);
  foreign = lab.host(0).guest(OTHER, 1);
  foreignRemote = lab.host(1).guest(OTHER, 2);
  all = [mine, sibling, remote, foreign, foreignRemote];
});
afterAll(() => lab?.destroy());

function forget(): void {
  for (const wire of [...all, lab.stranger]) wire.frames.length = 0;
}

/** Sends the frames from a guest; nothing of them arrives anywhere, the counter rises by each. */
async function dropsFromGuest(sender: Guest, reason: string, ...frames: Buffer[]): Promise<void> {
  forget();
  const before = sender.host.stats();
  sender.send(...frames);
  const peers = all.filter((it) => it !== sender && it.identity.family === sender.identity.family);
  const marker = `allowed ${++serial}`;
  for (const peer of peers) {
    sender.send(sender.frameTo(peer, marker));
    await peer.receive((it) => it.includes(marker));
  }
  const counted = () => gained(before, sender.host.stats());
  await expect.poll(counted, { timeout: 10_000 }).toMatchObject({ [reason]: frames.length });
  for (const guest of all) {
    expect(guest.frames.filter((it) => !it.includes('allowed'))).toEqual([]);
  }
  // The hosts themselves may speak (IGMP); their addresses begin with 02, which no guest uses here.
  const seen = lab.stranger.frames.filter((it) => it[6] !== 0x02 && !it.includes('allowed'));
  expect(seen).toEqual([]);
  const after = counted();
  const local = peers.filter((it) => it.host === sender.host).length;
  const passed = { guest_to_local: local, guest_to_wire: peers.length - local };
  for (const [name, count] of Object.entries(passed)) expect(after[name] ?? 0).toBe(count);
}

/** The same for frames that a machine on the wire sends to host 1. */
async function dropsFromWire(reason: string, ...frames: Buffer[]): Promise<void> {
  const host: Host = lab.host(0);
  forget();
  const before = host.stats();
  lab.stranger.send(...frames);
  const marker = `allowed ${++serial}`;
  lab.stranger.send(
    ipv4({
      to: mine.wireMac,
      from: remote.wireMac,
      sourceIp: remote.ip,
      destinationIp: mine.ip,
      payload: Buffer.from(marker),
    }),
  );
  await mine.receive((it) => it.includes(marker));
  const counted = () => gained(before, host.stats());
  await expect
    .poll(counted, { timeout: 10_000 })
    .toMatchObject({ [reason]: frames.length, wire_to_guest: 1 });
  for (const guest of all) {
    expect(guest.frames.filter((it) => !it.includes('allowed'))).toEqual([]);
  }
}

const toSibling = (change: Partial<Ip>): Buffer =>
  ipv4({ to: sibling.wireMac, sourceIp: mine.ip, destinationIp: sibling.ip, ...change });

test('families cannot exchange a frame, on one host or over the wire, in either direction', async () => {
  for (const [from, to] of [
    [mine, foreign],
    [foreign, mine],
    [mine, foreignRemote],
    [foreignRemote, mine],
  ] as const) {
    await dropsFromGuest(from, 'guest_foreign_family', from.frameTo(to));
  }
});

test('a forged source address does not open another family', async () => {
  const forged = { to: mine.wireMac, sourceIp: sibling.ip, destinationIp: mine.ip };
  await dropsFromGuest(
    foreign,
    'guest_source_mac',
    ipv4({ ...forged, from: sibling.wireMac }),
    ipv4({ ...forged, from: remote.wireMac }),
    ipv4({ ...forged, from: foreign.wireMac }),
  );
  await dropsFromGuest(foreign, 'guest_foreign_family', ipv4(forged));
});

test("frames with another's IPv4 address are dropped", async () => {
  await dropsFromGuest(
    mine,
    'guest_source_ip',
    toSibling({ sourceIp: remote.ip }),
    toSibling({ sourceIp: GATEWAY }),
    toSibling({ sourceIp: '0.0.0.0' }),
    toSibling({ sourceIp: '192.168.77.1' }),
  );
});

test('the IPv4 destination must be that of the destination MAC address', async () => {
  await dropsFromGuest(
    mine,
    'guest_destination_ip',
    toSibling({ destinationIp: remote.ip }),
    toSibling({ destinationIp: '255.255.255.255' }),
    toSibling({ destinationIp: '10.86.255.255' }),
    toSibling({ destinationIp: '224.0.0.1' }),
    toSibling({ destinationIp: '192.168.77.2' }),
  );
});

test('broadcast, multicast, strangers, hosts and the gateway are out of reach', async () => {
  await dropsFromGuest(mine, 'guest_broadcast', toSibling({ to: BROADCAST_MAC }));
  await dropsFromGuest(
    mine,
    'guest_multicast',
    toSibling({ to: '01:00:5e:00:00:fb' }),
    toSibling({ to: '5f:00:00:07:00:01' }),
  );
  await dropsFromGuest(
    mine,
    'guest_not_wire_mac',
    toSibling({ to: '02:00:00:00:01:01', destinationIp: '192.168.77.1' }),
    toSibling({ to: '02:00:00:00:01:02', destinationIp: '192.168.77.2' }),
    toSibling({ to: GUEST_MAC }),
  );
  await dropsFromGuest(
    mine,
    'guest_to_gateway',
    toSibling({
      to: wireMac({ family: FAMILY, vmid: VMID_GATEWAY }),
      destinationIp: '192.0.2.1',
    }),
  );
  await dropsFromGuest(
    mine,
    'guest_no_such_vm',
    toSibling({ to: '5e:00:00:07:ff:fe' }),
    toSibling({ to: mine.wireMac, destinationIp: mine.ip }),
  );
});

test('IPv6, VLAN tags and other EtherTypes are dropped', async () => {
  const ip = toSibling({}).subarray(14);
  const tagged = Buffer.concat([Buffer.from([0, 5, 8, 0]), ip]);
  const frame = (type: number, payload: Buffer) =>
    ethernet(sibling.wireMac, GUEST_MAC, type, payload);
  await dropsFromGuest(mine, 'guest_ipv6', frame(0x86dd, IPV6));
  await dropsFromGuest(mine, 'guest_vlan', frame(0x8100, tagged), frame(0x88a8, tagged));
  await dropsFromGuest(
    mine,
    'guest_ethertype',
    ...[0x0000, 0x002e, 0x0842, 0x8847, 0x8863, 0x88cc, 0x8906, 0x9100, 0xffff].map((type) =>
      frame(type, ip),
    ),
  );
});

test('IPv4 headers that lie are dropped', async () => {
  const ip = toSibling({});
  await dropsFromGuest(
    mine,
    'guest_malformed_ip',
    ip.subarray(0, 14),
    ip.subarray(0, 33),
    toSibling({ versionAndLength: 0x44 }),
    toSibling({ versionAndLength: 0x65 }),
    toSibling({ versionAndLength: 0x4f }),
    toSibling({ totalBytes: 19 }),
    toSibling({ totalBytes: 26 }),
    toSibling({ totalBytes: 0 }),
    toSibling({ protocol: 17, payload: Buffer.alloc(7) }),
  );
});

test('no guest is a DHCP server, and DHCP requests go to the host only', async () => {
  const datagram = (from: number, to: number) => udp(from, to, Buffer.alloc(240));
  await dropsFromGuest(
    mine,
    'guest_dhcp_server',
    toSibling({ protocol: 17, payload: datagram(67, 68) }),
    toSibling({ protocol: 17, payload: datagram(67, 9), fragment: 0x2000 }),
    toSibling({ protocol: 17, payload: datagram(1000, 68) }),
    toSibling({ protocol: 17, payload: datagram(67, 68), to: BROADCAST_MAC }),
  );
  await dropsFromGuest(
    mine,
    'dhcp_to_host',
    toSibling({ protocol: 17, payload: datagram(68, 67) }),
    ipv4({
      to: BROADCAST_MAC,
      sourceIp: '0.0.0.0',
      destinationIp: '255.255.255.255',
      protocol: 17,
      payload: datagram(68, 67),
    }),
  );
});

test('ARP that is forged, unasked or not for the family is dropped', async () => {
  const senderIp = mine.ip;
  const targetIp = sibling.ip;
  await dropsFromGuest(
    mine,
    'arp_source',
    arp({ senderIp: sibling.ip, targetIp: remote.ip }),
    arp({ senderIp, targetIp, senderMac: sibling.wireMac }),
    arp({ senderIp: sibling.ip, targetIp: sibling.ip }),
    arp({ senderIp: GATEWAY, targetIp: GATEWAY }),
  );
  await dropsFromGuest(
    mine,
    'guest_source_mac',
    arp({ senderIp, targetIp, from: sibling.wireMac, senderMac: sibling.wireMac }),
  );
  await dropsFromGuest(
    mine,
    'arp_reply',
    arp({ senderIp, targetIp, operation: 2, to: sibling.wireMac }),
    arp({ senderIp, targetIp: senderIp, operation: 2 }),
  );
  await dropsFromGuest(
    mine,
    'arp_outside',
    arp({ senderIp, targetIp: '192.168.77.1' }),
    arp({ senderIp, targetIp: '10.86.0.0' }),
    arp({ senderIp, targetIp: '10.86.255.255' }),
    arp({ senderIp, targetIp: '10.87.0.3' }),
    arp({ senderIp, targetIp, to: foreign.wireMac }),
    arp({ senderIp, targetIp, to: '02:00:00:00:01:02' }),
  );
  await dropsFromGuest(
    mine,
    'arp_malformed',
    arp({ senderIp, targetIp, operation: 3 }),
    arp({ senderIp, targetIp, hardware: 6 }),
    arp({ senderIp, targetIp }).subarray(0, 41),
  );
});

const fromWire = (change: Partial<Ip>): Buffer =>
  ipv4({
    to: mine.wireMac,
    from: remote.wireMac,
    sourceIp: remote.ip,
    destinationIp: mine.ip,
    ...change,
  });

test('from the wire only the own family gets in, with its own addresses', async () => {
  await dropsFromWire(
    'wire_foreign_source',
    fromWire({ from: foreignRemote.wireMac }),
    fromWire({ from: '02:00:00:00:01:02', sourceIp: '192.168.77.2' }),
    fromWire({ from: GUEST_MAC }),
    fromWire({ to: foreign.wireMac }),
  );
  await dropsFromWire(
    'wire_impossible_source',
    fromWire({ from: sibling.wireMac, sourceIp: sibling.ip }),
    fromWire({ from: mine.wireMac, sourceIp: mine.ip }),
    fromWire({ from: wireMac({ family: FAMILY, vmid: VMID_GATEWAY }), sourceIp: GATEWAY }),
  );
  await dropsFromWire(
    'wire_source_ip',
    fromWire({ sourceIp: sibling.ip }),
    fromWire({ sourceIp: '192.168.77.2' }),
  );
  await dropsFromWire(
    'wire_destination_ip',
    fromWire({ destinationIp: sibling.ip }),
    fromWire({ destinationIp: '255.255.255.255' }),
  );
  await dropsFromWire(
    'wire_unknown_destination',
    fromWire({ to: '5e:00:00:07:00:63' }),
    fromWire({ to: '5e:12:34:56:00:00' }),
  );
});

test('from the wire come neither ARP nor IPv6 nor tags nor broken headers', async () => {
  const ip = fromWire({}).subarray(14);
  const frame = (type: number, payload: Buffer) =>
    ethernet(mine.wireMac, remote.wireMac, type, payload);
  await dropsFromWire(
    'wire_ethertype',
    arp({ to: mine.wireMac, from: remote.wireMac, senderIp: remote.ip, targetIp: mine.ip }),
    frame(0x86dd, IPV6),
    frame(0x88cc, ip),
  );
  await dropsFromWire('wire_vlan', frame(0x8100, Buffer.concat([Buffer.from([0, 5, 8, 0]), ip])));
  await dropsFromWire(
    'wire_malformed_ip',
    fromWire({ totalBytes: 26 }),
    frame(0x0800, ip).subarray(0, 30),
  );
  await dropsFromWire(
    'wire_stray_source',
    fromWire({ to: BROADCAST_MAC }),
    fromWire({ to: '02:00:00:00:01:01', destinationIp: '192.168.77.1' }),
    arp({ from: remote.wireMac, senderIp: remote.ip, targetIp: '192.168.77.1' }),
  );
});

test('the host cannot send into a guest, and a guest without identity cannot send at all', async () => {
  const host = lab.host(0);
  const before = host.stats();
  host.netns.exec('ip', 'address', 'add', '10.99.0.1/24', 'dev', mine.tap);
  host.netns.exec(
    'busybox',
    'arping',
    '-q',
    '-c',
    '1',
    '-w',
    '1',
    '-U',
    '-I',
    mine.tap,
    '10.99.0.1',
  );
  await dropsFromWire('wire_unknown_destination', fromWire({ to: '5e:00:00:07:00:63' }));
  host.netns.exec('ip', 'address', 'del', '10.99.0.1/24', 'dev', mine.tap);
  await expect.poll(() => gained(before, host.stats()).host_into_tap ?? 0).toBeGreaterThan(0);

  const leaving = host.guest(FAMILY, 50);
  host.netns.do(() => host.attached.removeVm(leaving.tap));
  expect(() => leaving.send(leaving.frameTo(mine))).toThrow(/Input\/output error/);
  leaving.close();
});

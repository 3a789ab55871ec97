import { afterAll, beforeAll, expect, test } from 'vitest';
import { GATEWAY, GUEST_MAC, VMID_GATEWAY, wireMac } from '../../src/network/addresses.js';
import { arp, checksum, ipv4 } from './frames.js';
import { type Guest, gained, Lab } from './lab.js';

const FAMILY = 0x0a0b0c;
let lab: Lab;
let parent: Guest; // host 1
let sibling: Guest; // host 1
let remote: Guest; // host 2

beforeAll(async () => {
  lab = await Lab.create(2);
  parent = lab.host(0).guest(FAMILY, 0);
  sibling = lab.host(0).guest(FAMILY, 1);
  remote = lab.host(1).guest(FAMILY, 2);
});
afterAll(() => lab?.destroy());

test('a frame reaches a VM of the same host without touching the wire', async () => {
  const before = lab.host(0).stats();
  parent.send(parent.frameTo(sibling, 'same host'));
  const frame = await sibling.receive((it) => it.includes('same host'));
  expect(frame).toEqual(parent.arrivingAt(sibling, 'same host'));
  expect(gained(before, lab.host(0).stats())).toEqual({ guest_to_local: 1 });
  expect(lab.stranger.frames.some((it) => it.includes('same host'))).toBe(false);
});

test('a frame crosses the wire with wire addresses only and arrives with the guest address', async () => {
  const before = [lab.host(0).stats(), lab.host(1).stats()] as const;
  parent.send(parent.frameTo(remote, 'other host'));
  const frame = await remote.receive((it) => it.includes('other host'));
  expect(frame).toEqual(parent.arrivingAt(remote, 'other host'));
  expect(gained(before[0], lab.host(0).stats())).toEqual({ guest_to_wire: 1 });
  expect(gained(before[1], lab.host(1).stats())).toEqual({ wire_to_guest: 1 });
  // The bridge has not learnt the receiver's address yet and floods.
  const seen = await lab.stranger.receive((it) => it.includes('other host'));
  expect(seen).toEqual(
    ipv4({
      to: wireMac({ family: FAMILY, vmid: 2 }),
      from: wireMac({ family: FAMILY, vmid: 0 }),
      sourceIp: parent.ip,
      destinationIp: remote.ip,
      payload: Buffer.from('other host'),
    }),
  );
});

test.each([
  ['of the same host', () => sibling.ip, () => sibling.wireMac],
  ['of another host', () => remote.ip, () => remote.wireMac],
  ['that does not run', () => '10.86.200.7', () => wireMac({ family: FAMILY, vmid: 51_205 })],
  ['the gateway', () => GATEWAY, () => wireMac({ family: FAMILY, vmid: VMID_GATEWAY })],
])('ARP for a family address is answered: VM %s', async (_name, targetIp, answer) => {
  const before = lab.host(0).stats();
  parent.frames.length = 0;
  parent.send(arp({ senderIp: parent.ip, targetIp: targetIp() }));
  expect(await parent.receive()).toEqual(
    arp({
      to: GUEST_MAC,
      from: answer(),
      operation: 2,
      senderMac: answer(),
      senderIp: targetIp(),
      targetMac: GUEST_MAC,
      targetIp: parent.ip,
    }),
  );
  expect(gained(before, lab.host(0).stats())).toEqual({ arp_answered: 1 });
});

test('an ARP request by unicast to a known neighbour is answered', async () => {
  parent.frames.length = 0;
  parent.send(arp({ to: remote.wireMac, senderIp: parent.ip, targetIp: remote.ip }));
  expect((await parent.receive()).subarray(22, 28).toString('hex')).toBe(
    remote.wireMac.replaceAll(':', ''),
  );
});

test('ARP for the own address is met with silence: probes and announcements', async () => {
  const before = lab.host(0).stats();
  sibling.frames.length = 0;
  sibling.send(
    arp({ senderIp: '0.0.0.0', targetIp: sibling.ip }), // RFC 5227 probe
    arp({ senderIp: sibling.ip, targetIp: sibling.ip }), // announcement
  );
  parent.send(parent.frameTo(sibling, 'after the probes'));
  await sibling.receive((it) => it.includes('after the probes'));
  await expect
    .poll(() => gained(before, lab.host(0).stats()), { timeout: 10_000 })
    .toEqual({ arp_own_address: 2, guest_to_local: 1 });
  expect(sibling.frames).toHaveLength(1);
});

test('fragments pass, also those without ports', async () => {
  for (const [fragment, text] of [
    [0x2000, 'first piece.....'],
    [0x0002, 'last piece'],
  ] as const) {
    parent.send(
      ipv4({
        to: sibling.wireMac,
        sourceIp: parent.ip,
        destinationIp: sibling.ip,
        protocol: 17,
        fragment,
        payload: Buffer.from(text),
      }),
    );
    await sibling.receive((it) => it.includes(text));
  }
});

/** A TCP segment longer than the MTU, as a guest with offloads hands it over. */
function bigSegment(from: Guest, to: Guest, bytes: number): Buffer {
  const tcp = Buffer.alloc(20 + bytes, 0x61);
  tcp.fill(0, 0, 20);
  tcp.writeUInt16BE(1000, 0);
  tcp.writeUInt16BE(2000, 2);
  tcp[12] = 0x50;
  tcp[13] = 0x10;
  const frame = ipv4({
    to: to.wireMac,
    sourceIp: from.ip,
    destinationIp: to.ip,
    protocol: 6,
    payload: tcp,
  });
  // The checksum field holds the pseudo header's sum; the rest is left to the receiver of the header.
  const pseudo = [26, 28, 30, 32].reduce((sum, at) => sum + frame.readUInt16BE(at), 6 + tcp.length);
  frame.writeUInt16BE(~checksum(Buffer.alloc(0), pseudo) & 0xffff, 34 + 16);
  const header = Buffer.alloc(10);
  header[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
  header[1] = 1; // VIRTIO_NET_HDR_GSO_TCPV4
  header.writeUInt16LE(54, 2);
  header.writeUInt16LE(1460, 4);
  header.writeUInt16LE(34, 6);
  header.writeUInt16LE(16, 8);
  return Buffer.concat([header, frame]);
}

test.each([
  ['on the same host', () => sibling],
  ['across hosts', () => remote],
])('a segment with offloads arrives whole, cut to size, checksums right: %s', async (_name, to) => {
  const sender = lab.host(0).guest(FAMILY, 100, { vnetHdr: true });
  const receiver = to();
  const isTcp = (it: Buffer) => it[23] === 6;
  sender.send(bigSegment(sender, receiver, 4000));
  await receiver.receive((it) => isTcp(it) && it.length === 54 + 4000 - 2 * 1460);
  const segments = receiver.frames.filter(isTcp);
  expect(segments.map((it) => it.length)).toEqual([1514, 1514, 1134]);
  for (const segment of segments) {
    expect(segment.subarray(0, 12)).toEqual(sender.arrivingAt(receiver).subarray(0, 12));
    expect(checksum(segment.subarray(14, 34))).toBe(0);
    const pseudo = [26, 28, 30, 32].reduce((sum, at) => sum + segment.readUInt16BE(at), 6);
    expect(checksum(segment.subarray(34), pseudo + segment.length - 34)).toBe(0);
  }
  sender.host.netns.do(() => sender.host.attached.removeVm(sender.tap));
  sender.close();
});

/**
 * A guest may leave a checksum to whoever sends its frame on (virtio 1.2, 5.1.6.2): it names where
 * the sum begins and where it is to be written, anywhere in the frame, and the kernel writes it
 * after the filter has looked. These frames are right as the filter sees them and forged as they
 * would leave.
 */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { addressOfVmid, ipNumber } from '../../src/network/addresses.js';
import { checksum, ipv4, udp } from './frames.js';
import { type Guest, gained, Lab } from './lab.js';

const FAMILY = 7;
const VNET_BYTES = 10;
let lab: Lab;
let attacker: Guest; // host 1, with offloads
let sibling: Guest; // host 1
let remote: Guest; // host 2
let serial = 0;

beforeAll(async () => {
  lab = await Lab.create(2);
  attacker = lab.host(0).guest(FAMILY, 1, { vnetHdr: true });
  sibling = lab.host(0).guest(FAMILY, 2);
  remote = lab.host(1).guest(FAMILY, 3);
});
afterAll(() => lab?.destroy());

/** With a virtio_net_hdr that has the kernel write the sum of what is from `start` on. */
function offloaded(frame: Buffer, start: number, offset: number): Buffer {
  const header = Buffer.alloc(VNET_BYTES);
  header[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
  header.writeUInt16LE(start, 6);
  header.writeUInt16LE(offset, 8);
  return Buffer.concat([header, frame]);
}

/** The same frame, but the kernel's sum makes the two bytes at `at` `wanted`. */
function forging(frame: Buffer, at: number, wanted: number): Buffer {
  const out = Buffer.from(frame);
  const balance = out.length - 2;
  out.writeUInt16BE(0, balance);
  out.writeUInt16BE(checksum(out.subarray(at), wanted), balance);
  return offloaded(out, at, 0);
}

const marker = () => Buffer.from(`marker ${String(++serial).padStart(4, '0')}.`);

/** From the attacker to `to`, the IPv4 header's sum right for what it is to become. */
function claiming(to: Guest, sourceIp: string, payload: Buffer): Buffer {
  const frame = ipv4({
    to: to.wireMac,
    sourceIp,
    destinationIp: to.ip,
    protocol: 17,
    payload: udp(1000, 2000, Buffer.concat([payload, Buffer.alloc(2)])),
  });
  frame.writeUInt32BE(ipNumber(attacker.ip), 26);
  return frame;
}

async function isDropped(frame: Buffer, to: Guest, marking: Buffer): Promise<void> {
  const before = attacker.host.stats();
  attacker.send(frame);
  const last = marker();
  attacker.send(offloadedNothing(attacker.frameTo(to, String(last))));
  await to.receive((it) => it.includes(last));
  expect(to.frames.filter((it) => it.includes(marking)).map((it) => it.toString('hex'))).toEqual(
    [],
  );
  await expect
    .poll(() => gained(before, attacker.host.stats()))
    .toMatchObject({ guest_checksum: 1 });
}

const offloadedNothing = (frame: Buffer) => Buffer.concat([Buffer.alloc(VNET_BYTES), frame]);

test.each([
  ['on the same host', () => sibling],
  ['on another host', () => remote],
])("the sum does not become another's IPv4 address: %s", async (_name, to) => {
  const text = marker();
  const frame = claiming(to(), addressOfVmid(0x4321), text);
  await isDropped(forging(frame, 28, ipNumber(addressOfVmid(0x4321)) & 0xffff), to(), text);
});

test('a sum in its own place passes, and one inside of a tunnel', async () => {
  const before = attacker.host.stats();
  const inner = ipv4({
    to: sibling.wireMac,
    sourceIp: '192.0.2.1',
    destinationIp: '192.0.2.2',
    protocol: 17,
    payload: udp(1, 2, marker()),
  }).subarray(14);
  for (const [protocol, start] of [
    [17, 34],
    [4, 54], // IPv4 in IPv4
  ] as const) {
    const text = marker();
    const body = Buffer.concat([protocol === 17 ? udp(1000, 2000, text) : inner, text]);
    const path = { to: sibling.wireMac, sourceIp: attacker.ip, destinationIp: sibling.ip };
    attacker.send(offloaded(ipv4({ ...path, protocol, payload: body }), start, 6));
    const frame = await sibling.receive((it) => it.includes(text));
    expect(checksum(frame.subarray(start))).toBe(0);
  }
  expect(gained(before, attacker.host.stats())).toEqual({ guest_to_local: 2 });
});

test('the sum does not become the port of a DHCP server', async () => {
  const text = marker();
  const frame = claiming(sibling, attacker.ip, text);
  await isDropped(forging(frame, 34, 67), sibling, text);
});

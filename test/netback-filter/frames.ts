/** Frames as bytes, right unless told otherwise: the tests bend one field at a time. */
import { GUEST_MAC, ipNumber, macBytes } from '../../src/network/addresses.js';

export const BROADCAST_MAC = 'ff:ff:ff:ff:ff:ff';

function u16(value: number): Buffer {
  return Buffer.from([(value >> 8) & 0xff, value & 0xff]);
}
function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

export function ethernet(
  destination: string,
  source: string,
  type: number,
  payload: Uint8Array,
): Buffer {
  return Buffer.concat([macBytes(destination), macBytes(source), u16(type), payload]);
}

/** RFC 1071. */
export function checksum(bytes: Uint8Array, start = 0): number {
  let sum = start;
  for (let i = 0; i < bytes.length; i += 2) sum += ((bytes[i] ?? 0) << 8) | (bytes[i + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

export interface Ip {
  to: string;
  from?: string;
  sourceIp: string;
  destinationIp: string;
  protocol?: number;
  payload?: Uint8Array;
  /** The header's fragment field. */
  fragment?: number;
  versionAndLength?: number;
  totalBytes?: number;
}

export function ipv4(ip: Ip): Buffer {
  const payload = ip.payload ?? Buffer.from('hello');
  const header = Buffer.concat([
    Buffer.from([ip.versionAndLength ?? 0x45, 0]),
    u16(ip.totalBytes ?? 20 + payload.length),
    u16(1),
    u16(ip.fragment ?? 0),
    Buffer.from([64, ip.protocol ?? 253, 0, 0]),
    u32(ipNumber(ip.sourceIp)),
    u32(ipNumber(ip.destinationIp)),
  ]);
  header.writeUInt16BE(checksum(header), 10);
  return ethernet(ip.to, ip.from ?? GUEST_MAC, 0x0800, Buffer.concat([header, payload]));
}

export function udp(sourcePort: number, destinationPort: number, payload: Uint8Array): Buffer {
  return Buffer.concat([
    u16(sourcePort),
    u16(destinationPort),
    u16(8 + payload.length),
    u16(0),
    payload,
  ]);
}

export interface Arp {
  to?: string;
  from?: string;
  operation?: number;
  senderMac?: string;
  senderIp: string;
  targetMac?: string;
  targetIp: string;
  hardware?: number;
}

export function arp(of: Arp): Buffer {
  return ethernet(
    of.to ?? BROADCAST_MAC,
    of.from ?? GUEST_MAC,
    0x0806,
    Buffer.concat([
      u16(of.hardware ?? 1),
      u16(0x0800),
      Buffer.from([6, 4]),
      u16(of.operation ?? 1),
      macBytes(of.senderMac ?? GUEST_MAC),
      u32(ipNumber(of.senderIp)),
      macBytes(of.targetMac ?? '00:00:00:00:00:00'),
      u32(ipNumber(of.targetIp)),
    ]),
  );
}

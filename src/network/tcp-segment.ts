/** TCP segments in Ethernet and IPv4 (RFC 9293): headers only. */
import { ipNumber, ipText, macBytes, macText } from './addresses.js';
import { checksum } from './checksum.js';

const ETHERNET_BYTES = 14;
const IP_BYTES = 20;
const TCP_BYTES = 20;
const TTL = 64;
const WINDOW_BYTES = 65_535;

export const FIN = 0x01;
export const SYN = 0x02;
export const RST = 0x04;
export const ACK = 0x10;

export interface Segment {
  sourceMac: string;
  destinationMac: string;
  /** IPv4 addresses in dotted form. */
  source: string;
  destination: string;
  sourcePort: number;
  destinationPort: number;
  sequence: number;
  acknowledgement: number;
  /** FIN, SYN, RST, ACK and others as in the header's low byte. */
  flags: number;
  /** Payload, not counting SYN and FIN. */
  bytes: number;
}

/** Undefined if it is none. The frame may be cut off behind the TCP header. */
export function parseSegment(frame: Buffer): Segment | undefined {
  if (frame.length < ETHERNET_BYTES + IP_BYTES + TCP_BYTES) return undefined;
  if (frame.readUInt16BE(12) !== 0x0800) return undefined;
  const headerBytes = (frame.readUInt8(ETHERNET_BYTES) & 0xf) * 4;
  const ipBytes = frame.readUInt16BE(ETHERNET_BYTES + 2);
  if (frame.readUInt8(ETHERNET_BYTES) >> 4 !== 4 || headerBytes < IP_BYTES) return undefined;
  if (frame.readUInt8(ETHERNET_BYTES + 9) !== 6) return undefined;
  const tcp = ETHERNET_BYTES + headerBytes;
  if (frame.length < tcp + TCP_BYTES) return undefined;
  const tcpHeaderBytes = (frame.readUInt8(tcp + 12) >> 4) * 4;
  const bytes = ipBytes - headerBytes - tcpHeaderBytes;
  if (tcpHeaderBytes < TCP_BYTES || bytes < 0) return undefined;
  return {
    destinationMac: macText(frame.readUIntBE(0, 6)),
    sourceMac: macText(frame.readUIntBE(6, 6)),
    source: ipText(frame.readUInt32BE(ETHERNET_BYTES + 12)),
    destination: ipText(frame.readUInt32BE(ETHERNET_BYTES + 16)),
    sourcePort: frame.readUInt16BE(tcp),
    destinationPort: frame.readUInt16BE(tcp + 2),
    sequence: frame.readUInt32BE(tcp + 4),
    acknowledgement: frame.readUInt32BE(tcp + 8),
    flags: frame.readUInt8(tcp + 13),
    bytes,
  };
}

/** A segment without payload and options. */
export function segmentFrame(segment: Omit<Segment, 'bytes'>): Buffer {
  const frame = Buffer.alloc(ETHERNET_BYTES + IP_BYTES + TCP_BYTES);
  frame.set(macBytes(segment.destinationMac), 0);
  frame.set(macBytes(segment.sourceMac), 6);
  frame.writeUInt16BE(0x0800, 12);
  const ip = ETHERNET_BYTES;
  frame.writeUInt8(0x45, ip);
  frame.writeUInt16BE(IP_BYTES + TCP_BYTES, ip + 2);
  frame.writeUInt16BE(0x4000, ip + 6); // not to be fragmented
  frame.writeUInt8(TTL, ip + 8);
  frame.writeUInt8(6, ip + 9);
  frame.writeUInt32BE(ipNumber(segment.source), ip + 12);
  frame.writeUInt32BE(ipNumber(segment.destination), ip + 16);
  frame.writeUInt16BE(checksum(frame.subarray(ip, ip + IP_BYTES)), ip + 10);
  const tcp = ip + IP_BYTES;
  frame.writeUInt16BE(segment.sourcePort, tcp);
  frame.writeUInt16BE(segment.destinationPort, tcp + 2);
  frame.writeUInt32BE(segment.sequence, tcp + 4);
  frame.writeUInt32BE(segment.acknowledgement, tcp + 8);
  frame.writeUInt8((TCP_BYTES / 4) << 4, tcp + 12);
  frame.writeUInt8(segment.flags, tcp + 13);
  frame.writeUInt16BE(segment.flags & RST ? 0 : WINDOW_BYTES, tcp + 14);
  const pseudo = [12, 14, 16, 18].reduce(
    (sum, at) => sum + frame.readUInt16BE(ip + at),
    6 + TCP_BYTES,
  );
  frame.writeUInt16BE(checksum(frame.subarray(tcp), pseudo), tcp + 16);
  return frame;
}

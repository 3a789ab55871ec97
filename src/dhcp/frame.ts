/**
 * DHCP packets in Ethernet, IPv4 and UDP: just what a server needs that talks to one guest on one
 * wire. The packet socket's filter has seen EtherType, protocol, ports and that it is no fragment;
 * the lengths are checked here.
 */
import { ipNumber } from '../network/addresses.js';
import { checksum } from '../network/checksum.js';

const ETHERNET_BYTES = 14;
const IP_BYTES = 20;
const UDP_BYTES = 8;
const TTL = 64;

export interface ClientDatagram {
  /** Six bytes. */
  sourceMac: Uint8Array;
  /** To an address rather than to 255.255.255.255. */
  unicast: boolean;
  payload: Uint8Array;
}

/**
 * Undefined if the lengths do not fit the frame. UDP checksums are not checked: a guest with
 * checksum offload leaves them to a network card that is not there (virtio 1.2, 5.1.6.2), and the
 * frame came over no wire.
 */
export function parseClientFrame(frame: Uint8Array): ClientDatagram | undefined {
  if (frame.length < ETHERNET_BYTES + IP_BYTES + UDP_BYTES) return undefined;
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength);
  const version = view.getUint8(ETHERNET_BYTES);
  const headerBytes = (version & 0xf) * 4;
  const ipBytes = view.getUint16(ETHERNET_BYTES + 2);
  if (version >> 4 !== 4 || headerBytes < IP_BYTES) return undefined;
  if (ETHERNET_BYTES + ipBytes > frame.length || ipBytes < headerBytes + UDP_BYTES) {
    return undefined;
  }
  const udp = ETHERNET_BYTES + headerBytes;
  const udpBytes = view.getUint16(udp + 4);
  if (udpBytes < UDP_BYTES || udpBytes > ipBytes - headerBytes) return undefined;
  return {
    sourceMac: frame.subarray(6, 12),
    unicast: view.getUint32(ETHERNET_BYTES + 16) !== 0xffff_ffff,
    payload: frame.subarray(udp + UDP_BYTES, udp + udpBytes),
  };
}

export interface ServerDatagram {
  /** Six bytes each. */
  sourceMac: Uint8Array;
  destinationMac: Uint8Array;
  source: string;
  destination: string;
  port: number;
  payload: Uint8Array;
}

/** UDP from port 67. */
export function serverFrame(datagram: ServerDatagram): Uint8Array {
  const { payload } = datagram;
  const udpBytes = UDP_BYTES + payload.length;
  const frame = new Uint8Array(ETHERNET_BYTES + IP_BYTES + udpBytes);
  const view = new DataView(frame.buffer);
  frame.set(datagram.destinationMac, 0);
  frame.set(datagram.sourceMac, 6);
  view.setUint16(12, 0x0800);

  const ip = ETHERNET_BYTES;
  view.setUint16(ip, 0x45c0); // version 4, 20 bytes, class CS6
  view.setUint16(ip + 2, IP_BYTES + udpBytes);
  view.setUint16(ip + 6, 0x4000); // not to be fragmented
  frame[ip + 8] = TTL;
  frame[ip + 9] = 17;
  view.setUint32(ip + 12, ipNumber(datagram.source));
  view.setUint32(ip + 16, ipNumber(datagram.destination));
  view.setUint16(ip + 10, checksum(frame.subarray(ip, ip + IP_BYTES)));

  const udp = ip + IP_BYTES;
  view.setUint16(udp, 67);
  view.setUint16(udp + 2, datagram.port);
  view.setUint16(udp + 4, udpBytes);
  frame.set(payload, udp + UDP_BYTES);
  // The pseudo header's addresses, protocol and length (RFC 768).
  let pseudo = 17 + udpBytes;
  for (let at = 12; at < IP_BYTES; at += 2) pseudo += view.getUint16(ip + at);
  view.setUint16(udp + 6, checksum(frame.subarray(udp), pseudo) || 0xffff);
  return frame;
}

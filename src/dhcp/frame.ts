/**
 * DHCP packets in Ethernet, IPv4 and UDP: just what a server needs that talks to one guest on one
 * wire. The packet socket's filter has seen EtherType, protocol, ports and that it is no fragment;
 * the lengths are checked here.
 */
import { ipNumber, macBytes, macText } from '../network/addresses.js';
import { checksum } from '../network/checksum.js';

const ETHERNET_BYTES = 14;
const IP_BYTES = 20;
const UDP_BYTES = 8;
const TTL = 64;

export interface ClientDatagram {
  sourceMac: string;
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
    sourceMac: macText(view.getUint16(6) * 2 ** 32 + view.getUint32(8)),
    unicast: view.getUint32(ETHERNET_BYTES + 16) !== 0xffff_ffff,
    payload: frame.subarray(udp + UDP_BYTES, udp + udpBytes),
  };
}

export interface ServerDatagram {
  sourceMac: string;
  destinationMac: string;
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
  frame.set(macBytes(datagram.destinationMac), 0);
  frame.set(macBytes(datagram.sourceMac), 6);
  view.setUint16(12, 0x0800);

  const ip = ETHERNET_BYTES;
  frame.set([0x45, 0xc0], ip);
  view.setUint16(ip + 2, IP_BYTES + udpBytes);
  view.setUint16(ip + 6, 0x4000); // not to be fragmented
  frame.set([TTL, 17], ip + 8);
  view.setUint32(ip + 12, ipNumber(datagram.source));
  view.setUint32(ip + 16, ipNumber(datagram.destination));
  view.setUint16(ip + 10, checksum(frame.subarray(ip, ip + IP_BYTES)));

  const udp = ip + IP_BYTES;
  view.setUint16(udp, 67);
  view.setUint16(udp + 2, datagram.port);
  view.setUint16(udp + 4, udpBytes);
  frame.set(payload, udp + UDP_BYTES);
  // The pseudo header's addresses, protocol and length (RFC 768).
  const pseudo = [12, 14, 16, 18].reduce((sum, at) => sum + view.getUint16(ip + at), 17 + udpBytes);
  view.setUint16(udp + 6, checksum(frame.subarray(udp), pseudo) || 0xffff);
  return frame;
}

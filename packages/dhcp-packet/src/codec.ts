/**
 * DHCPv4 packets as bytes and as objects: RFC 2131 (format), 2132 (options, overload), 3396 (long
 * options).
 *
 * Decoding is bounded by the packet: every option lies inside its field or the packet is refused
 * whole. Tolerated, because real clients do it and nothing is ambiguous: a missing END where a field
 * is full or the packet ends exactly behind an option, and bytes behind END. An overload option
 * inside an overloaded field is refused.
 */
import { DhcpPacketError } from './error.js';
import { addressNumber, addressText, Option, type Options, u32 } from './options.js';

export interface DhcpPacket {
  /** 1: client to server; 2: server to client. */
  op: 1 | 2;
  hardwareType: number;
  hops: number;
  /** Transaction id, 32 bits. */
  xid: number;
  secs: number;
  flags: number;
  /** Addresses in dotted form; 0.0.0.0: none. */
  ciaddr: string;
  yiaddr: string;
  siaddr: string;
  giaddr: string;
  /** As many bytes as the packet says, at most 16. */
  hardwareAddress: Uint8Array;
  /** By code; options that came in parts are joined (RFC 3396). */
  options: Options;
}

/** In `flags`: the client cannot receive unicast yet. */
export const FLAG_BROADCAST = 0x8000;
/** What an unfragmented datagram on a 1500-byte link holds. */
export const MAX_PACKET_BYTES = 1472;

const FIXED_BYTES = 236;
const SNAME = { at: 44, bytes: 64 };
const FILE = { at: 108, bytes: 128 };
const COOKIE = 0x63825363;
const OPTIONS_AT = FIXED_BYTES + 4;
/** RFC 1542, 2.1: some clients and relays refuse less. */
const MIN_ENCODED_BYTES = 300;
const OVERLOAD_FILE = 1;
const OVERLOAD_SNAME = 2;

function readOptions(field: Uint8Array, into: Map<number, Uint8Array>): void {
  let at = 0;
  while (at < field.length) {
    const code = field[at++];
    if (code === undefined || code === Option.END) return;
    if (code === Option.PAD) continue;
    const length = field[at++];
    if (length === undefined || at + length > field.length) {
      throw new DhcpPacketError('option-length', `option ${code} goes beyond its field`);
    }
    const part = field.slice(at, at + length);
    at += length;
    const before = into.get(code);
    into.set(code, before === undefined ? part : Buffer.concat([before, part]));
  }
}

function takeOverload(options: Map<number, Uint8Array>): number {
  const overload = options.get(Option.OVERLOAD);
  if (overload === undefined) return 0;
  options.delete(Option.OVERLOAD);
  const value = overload[0] ?? 0;
  if (overload.length !== 1 || value < OVERLOAD_FILE || value > (OVERLOAD_FILE | OVERLOAD_SNAME)) {
    throw new DhcpPacketError('overload', 'option 52 is not 1, 2 or 3');
  }
  return value;
}

/** DhcpPacketError if the bytes are no DHCP packet. The result shares no memory with `bytes`. */
export function decode(bytes: Uint8Array): DhcpPacket {
  if (bytes.length < OPTIONS_AT) {
    throw new DhcpPacketError('short', `${bytes.length} bytes are no DHCP packet`);
  }
  if (bytes.length > MAX_PACKET_BYTES) {
    throw new DhcpPacketError('long', `${bytes.length} bytes are no DHCP packet`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const op = view.getUint8(0);
  if (op !== 1 && op !== 2) throw new DhcpPacketError('op', `op ${op} is neither 1 nor 2`);
  const hardwareBytes = view.getUint8(2);
  if (hardwareBytes > 16) {
    throw new DhcpPacketError('hardware-length', `hardware address of ${hardwareBytes} bytes`);
  }
  if (view.getUint32(FIXED_BYTES) !== COOKIE) {
    throw new DhcpPacketError('cookie', 'no DHCP options');
  }
  const options = new Map<number, Uint8Array>();
  readOptions(bytes.subarray(OPTIONS_AT), options);
  const overload = takeOverload(options);
  for (const [bit, field] of [
    [OVERLOAD_FILE, FILE],
    [OVERLOAD_SNAME, SNAME],
  ] as const) {
    if ((overload & bit) === 0) continue;
    readOptions(bytes.subarray(field.at, field.at + field.bytes), options);
    if (options.has(Option.OVERLOAD)) {
      throw new DhcpPacketError('overload', 'option 52 inside an overloaded field');
    }
  }
  return {
    op,
    hardwareType: view.getUint8(1),
    hops: view.getUint8(3),
    xid: view.getUint32(4),
    secs: view.getUint16(8),
    flags: view.getUint16(10),
    ciaddr: addressText(view.getUint32(12)),
    yiaddr: addressText(view.getUint32(16)),
    siaddr: addressText(view.getUint32(20)),
    giaddr: addressText(view.getUint32(24)),
    hardwareAddress: bytes.slice(28, 28 + hardwareBytes),
    options,
  };
}

/**
 * The packet as bytes, options in ascending order but the message type first and relay agent
 * information last (RFC 3046, 2.1), padded to 300 bytes.
 * Values longer than 255 bytes go in parts. DhcpPacketError `long` beyond `maxBytes`.
 */
export function encode(packet: DhcpPacket, maxBytes = MAX_PACKET_BYTES): Uint8Array {
  if (packet.hardwareAddress.length > 16) {
    throw new DhcpPacketError('hardware-length', 'hardware address longer than 16 bytes');
  }
  const fixed = new Uint8Array(OPTIONS_AT);
  const view = new DataView(fixed.buffer);
  fixed.set([packet.op, packet.hardwareType, packet.hardwareAddress.length, packet.hops]);
  view.setUint32(4, packet.xid);
  view.setUint16(8, packet.secs);
  view.setUint16(10, packet.flags);
  [packet.ciaddr, packet.yiaddr, packet.siaddr, packet.giaddr].forEach((address, i) => {
    fixed.set(u32(addressNumber(address)), 12 + 4 * i);
  });
  fixed.set(packet.hardwareAddress, 28);
  view.setUint32(FIXED_BYTES, COOKIE);

  const place = (code: number) =>
    code === Option.MESSAGE_TYPE ? -1 : code === Option.RELAY_AGENT ? Option.END : code;
  const parts: Uint8Array[] = [fixed];
  for (const [code, value] of [...packet.options].sort(([a], [b]) => place(a) - place(b))) {
    if (code <= Option.PAD || code >= Option.END || code === Option.OVERLOAD) {
      throw new DhcpPacketError('option-value', `option ${code} cannot be set`);
    }
    let at = 0;
    do {
      const part = value.subarray(at, at + 255);
      parts.push(Uint8Array.of(code, part.length), part);
      at += part.length;
    } while (at < value.length);
  }
  parts.push(Uint8Array.of(Option.END));
  const bytes = parts.reduce((sum, part) => sum + part.length, 0);
  if (bytes > maxBytes) {
    throw new DhcpPacketError('long', `the packet has ${bytes} bytes, ${maxBytes} are allowed`);
  }
  const out = new Uint8Array(Math.max(bytes, MIN_ENCODED_BYTES));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

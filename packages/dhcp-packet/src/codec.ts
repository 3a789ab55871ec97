/**
 * DHCPv4 packets as bytes and as objects: RFC 2131 (format), 2132 (options, overload), 3396 (long
 * options).
 *
 * Decoding is bounded by the packet: every option lies inside its field or the packet is refused
 * whole. Tolerated, because real clients do it and nothing is ambiguous: a missing END where a field
 * is full or the packet ends exactly behind an option, and bytes behind END. An overload option
 * inside an overloaded field is refused.
 *
 * Encoding: options in the order of the map. What does not fit the options field goes to `file` and
 * then `sname` (overload), whole if it can and in parts if not; parts are in the order in which
 * readers join them. Left out on purpose: server name and boot file in these two fields.
 */
import { DhcpPacketError } from './error.js';
import { addressNumber, addressText, Option, type Options, u8 } from './options.js';

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

interface Field {
  readonly parts: Uint8Array[];
  /** Left for options; its END is counted already. */
  room: number;
}

const field = (bytes: number): Field => ({ parts: [], room: bytes - 1 });

function put(into: Field, code: number, value: Uint8Array): void {
  into.parts.push(Uint8Array.of(code, value.length), value);
  into.room -= 2 + value.length;
}

/** Puts an option into the first field that takes it whole, or in parts where there is room. */
function place(fields: readonly Field[], code: number, value: Uint8Array): boolean {
  const whole =
    value.length <= 255 ? fields.find(({ room }) => room >= 2 + value.length) : undefined;
  if (whole !== undefined) {
    put(whole, code, value);
    return true;
  }
  // Looked at first: a value that is there in half is worse than one that is not.
  const capacity = fields.reduce((sum, { room }) => {
    const parts = Math.ceil(room / 257);
    return sum + Math.max(0, room - 2 * parts);
  }, 0);
  if (capacity < value.length) return false;
  let at = 0;
  for (const into of fields) {
    while (at < value.length && into.room > 2) {
      const part = value.subarray(at, at + Math.min(255, into.room - 2));
      put(into, code, part);
      at += part.length;
    }
  }
  return at === value.length;
}

/** Undefined: they do not fit. `fields` are, in this order, options, file, sname. */
function placeAll(options: Options, fields: readonly [Field, ...Field[]]): boolean {
  const [main] = fields;
  const type = options.get(Option.MESSAGE_TYPE);
  if (type !== undefined && !place([main], Option.MESSAGE_TYPE, type)) return false;
  if (fields.length > 1 && !place([main], Option.OVERLOAD, u8(fields.length === 2 ? 1 : 3))) {
    return false;
  }
  // Relay agents look for theirs at the end of the options field (RFC 3046, 2.1).
  const last = field(main.room + 1);
  const relay = options.get(Option.RELAY_AGENT);
  if (relay !== undefined && !place([last], Option.RELAY_AGENT, relay)) return false;
  main.room = last.room;
  for (const [code, value] of options) {
    if (code === Option.MESSAGE_TYPE || code === Option.RELAY_AGENT) continue;
    if (!place(fields, code, value)) return false;
  }
  main.parts.push(...last.parts);
  return true;
}

function checkOptions(options: Options): void {
  for (const code of options.keys()) {
    if (!(code > Option.PAD && code < Option.END) || code === Option.OVERLOAD) {
      throw new DhcpPacketError('option-value', `option ${code} cannot be set`);
    }
  }
}

function write(out: Uint8Array, start: number, { parts }: Field): number {
  let at = start;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  out[at] = Option.END;
  return at + 1;
}

/**
 * The packet as bytes, padded to 300; options in the map's order, but the message type first and
 * relay agent information last. Values longer than 255 bytes go in parts (RFC 3396); what
 * does not fit `maxBytes` goes to `file` and `sname` (overload).
 * DhcpPacketError `long` if that is not enough, `option-value` for a code out of 1..254 or 52.
 */
export function encode(packet: DhcpPacket, maxBytes = MAX_PACKET_BYTES): Uint8Array {
  if (packet.hardwareAddress.length > 16) {
    throw new DhcpPacketError('hardware-length', 'hardware address longer than 16 bytes');
  }
  checkOptions(packet.options);
  let fields: [Field, ...Field[]] | undefined;
  for (const more of [[], [FILE], [FILE, SNAME]]) {
    const tried: [Field, ...Field[]] = [
      field(maxBytes - OPTIONS_AT),
      ...more.map(({ bytes }) => field(bytes)),
    ];
    if (!placeAll(packet.options, tried)) continue;
    fields = tried;
    break;
  }
  if (fields === undefined) {
    throw new DhcpPacketError('long', `the options do not fit a packet of ${maxBytes} bytes`);
  }
  const [main, file, sname] = fields;
  const bytes = OPTIONS_AT + 1 + main.parts.reduce((sum, part) => sum + part.length, 0);
  const out = new Uint8Array(Math.max(bytes, MIN_ENCODED_BYTES));
  const view = new DataView(out.buffer);
  out[0] = packet.op;
  out[1] = packet.hardwareType;
  out[2] = packet.hardwareAddress.length;
  out[3] = packet.hops;
  view.setUint32(4, packet.xid);
  view.setUint16(8, packet.secs);
  view.setUint16(10, packet.flags);
  view.setUint32(12, addressNumber(packet.ciaddr));
  view.setUint32(16, addressNumber(packet.yiaddr));
  view.setUint32(20, addressNumber(packet.siaddr));
  view.setUint32(24, addressNumber(packet.giaddr));
  out.set(packet.hardwareAddress, 28);
  view.setUint32(FIXED_BYTES, COOKIE);
  write(out, OPTIONS_AT, main);
  if (file !== undefined) write(out, FILE.at, file);
  if (sname !== undefined) write(out, SNAME.at, sname);
  return out;
}

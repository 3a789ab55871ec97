/**
 * Option codes and their plain values: RFC 2132 (most), 3046 (82), 3397 (119), 3442 (121). All
 * numbers are big-endian. Options with a structure of their own: routes.ts, search.ts, relay.ts.
 */
import { DhcpPacketError } from './error.js';

export const Option = {
  PAD: 0,
  SUBNET_MASK: 1,
  ROUTER: 3,
  DNS: 6,
  HOST_NAME: 12,
  DOMAIN_NAME: 15,
  INTERFACE_MTU: 26,
  BROADCAST_ADDRESS: 28,
  NTP: 42,
  REQUESTED_ADDRESS: 50,
  LEASE_SECONDS: 51,
  OVERLOAD: 52,
  MESSAGE_TYPE: 53,
  SERVER_ID: 54,
  PARAMETER_LIST: 55,
  MESSAGE: 56,
  MAX_MESSAGE_BYTES: 57,
  RENEWAL_SECONDS: 58,
  REBINDING_SECONDS: 59,
  CLIENT_ID: 61,
  RELAY_AGENT: 82,
  DOMAIN_SEARCH: 119,
  CLASSLESS_ROUTES: 121,
  END: 255,
} as const;

export const MessageType = {
  DISCOVER: 1,
  OFFER: 2,
  REQUEST: 3,
  DECLINE: 4,
  ACK: 5,
  NAK: 6,
  RELEASE: 7,
  INFORM: 8,
} as const;

export type Options = ReadonlyMap<number, Uint8Array>;

function number(options: Options, code: number, bytes: 1 | 2 | 4): number | undefined {
  const value = options.get(code);
  if (value === undefined) return undefined;
  if (value.length !== bytes) {
    throw new DhcpPacketError('option-value', `option ${code} has ${value.length} bytes`);
  }
  let sum = 0;
  for (let i = 0; i < bytes; i++) sum = sum * 256 + (value[i] ?? 0);
  return sum;
}

/** Undefined if absent. DhcpPacketError `option-value` if of another length. */
export const readU8 = (options: Options, code: number) => number(options, code, 1);
export const readU16 = (options: Options, code: number) => number(options, code, 2);
export const readU32 = (options: Options, code: number) => number(options, code, 4);

/** An IPv4 address in dotted form. */
export function readAddress(options: Options, code: number): string | undefined {
  const value = readU32(options, code);
  return value === undefined ? undefined : addressText(value);
}

export function u8(value: number): Uint8Array {
  return Uint8Array.of(value & 0xff);
}
export function u16(value: number): Uint8Array {
  return Uint8Array.of((value >>> 8) & 0xff, value & 0xff);
}
export function u32(value: number): Uint8Array {
  return Uint8Array.of(value >>> 24, (value >>> 16) & 0xff, (value >>> 8) & 0xff, value & 0xff);
}

/** Undefined if absent. DhcpPacketError `option-value` if not a positive multiple of 4 bytes. */
export function readAddresses(options: Options, code: number): string[] | undefined {
  const value = options.get(code);
  if (value === undefined) return undefined;
  if (value.length === 0 || value.length % 4 !== 0) {
    throw new DhcpPacketError('option-value', `option ${code} has ${value.length} bytes`);
  }
  const view = new DataView(value.buffer, value.byteOffset, value.byteLength);
  return Array.from({ length: value.length / 4 }, (_, i) => addressText(view.getUint32(4 * i)));
}

/**
 * UTF-8 without the NULs at the end that some senders add (RFC 2132, 2). DhcpPacketError
 * `option-value` if it is no UTF-8 or holds control characters.
 */
export function readText(options: Options, code: number): string | undefined {
  const value = options.get(code);
  if (value === undefined) return undefined;
  let end = value.length;
  while (end > 0 && value[end - 1] === 0) end--;
  try {
    const found = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(
      value.subarray(0, end),
    );
    if (!/\p{Cc}/u.test(found)) return found;
  } catch {
    // Refused below like text with control characters.
  }
  throw new DhcpPacketError('option-value', `option ${code} is no text`);
}

/** One or more addresses in dotted form. */
export function addresses(...list: string[]): Uint8Array {
  const bytes = new Uint8Array(4 * list.length);
  const view = new DataView(bytes.buffer);
  for (const [i, address] of list.entries()) view.setUint32(4 * i, addressNumber(address));
  return bytes;
}

export function text(value: string): Uint8Array {
  return new TextEncoder().encode(value);
}

export function addressText(address: number): string {
  return `${address >>> 24}.${(address >>> 16) & 0xff}.${(address >>> 8) & 0xff}.${address & 0xff}`;
}

export function addressNumber(address: string): number {
  const parts = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(address);
  const [a, b, c, d] = [
    Number(parts?.[1]),
    Number(parts?.[2]),
    Number(parts?.[3]),
    Number(parts?.[4]),
  ];
  if (!(a <= 255 && b <= 255 && c <= 255 && d <= 255)) {
    throw new DhcpPacketError('address', `${address} is no IPv4 address`);
  }
  return ((a * 256 + b) * 256 + c) * 256 + d;
}

/**
 * The address scheme (docs/network.md): everything about a VM's addresses follows from its family
 * id and its vmid, and back. kernel/netback/netback.h says the same to the filter.
 */
import { SnowflockError } from '../common/errors.js';

/** What every guest sees as its own MAC address; clones keep it. Six bytes with colons. */
export const GUEST_MAC = '52:54:00:53:46:01';
/** First byte of every wire MAC; no host's uplink may have an address that begins so. */
export const WIRE_PREFIX = 0x5e;
export const FAMILY_MAX = 0xff_ffff;
/** The last vmid whose address is not the broadcast address: 10.86.255.254. */
export const VMID_MAX = 0xfffc;
/** The vmid in the wire MAC that stands for the gateway. No VM has it. */
export const VMID_GATEWAY = 0xffff;
export const NETWORK = '10.86.0.0';
export const PREFIX_BITS = 16;
export const NETMASK = '255.255.0.0';
export const BROADCAST = '10.86.255.255';
export const GATEWAY = '10.86.0.1';
export const MTU = 1500;

const NETWORK_NUMBER = 0x0a56_0000;
const FIRST_HOST = 2;

/** A VM's place: the family (24 bits) and the number in it (0: the root parent). */
export interface Place {
  family: number;
  vmid: number;
}

function check(name: string, value: number, max: number): void {
  if (!Number.isInteger(value) || value < 0 || value > max) {
    throw new SnowflockError('E_ARGUMENT', `${name} ${value} is not in 0..${max}`);
  }
}

/** `5e:FF:FF:FF:VV:VV`. E_ARGUMENT for ids out of range; VMID_GATEWAY is accepted. */
export function wireMac({ family, vmid }: Place): string {
  check('family', family, FAMILY_MAX);
  if (vmid !== VMID_GATEWAY) check('vmid', vmid, VMID_MAX);
  return macText((WIRE_PREFIX * 2 ** 24 + family) * 2 ** 16 + vmid);
}

/** Undefined if it is no VM's wire MAC (another prefix, the gateway, a vmid without an address). */
export function placeOfWireMac(mac: string): Place | undefined {
  const number = macNumber(mac);
  const vmid = number % 2 ** 16;
  const family = Math.floor(number / 2 ** 16) % 2 ** 24;
  return Math.floor(number / 2 ** 40) === WIRE_PREFIX && vmid <= VMID_MAX
    ? { family, vmid }
    : undefined;
}

/** The IPv4 address of a VM in its family's network. E_ARGUMENT. */
export function addressOfVmid(vmid: number): string {
  check('vmid', vmid, VMID_MAX);
  return ipText(NETWORK_NUMBER + FIRST_HOST + vmid);
}

/** Undefined for the network's, the gateway's and the broadcast address and all outside. */
export function vmidOfAddress(address: string): number | undefined {
  const vmid = ipNumber(address) - NETWORK_NUMBER - FIRST_HOST;
  return vmid >= 0 && vmid <= VMID_MAX ? vmid : undefined;
}

/** A MAC address as a number, first byte highest. E_ARGUMENT unless six hex pairs with colons. */
export function macNumber(mac: string): number {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(mac)) {
    throw new SnowflockError('E_ARGUMENT', `${mac} is no MAC address`);
  }
  return Number.parseInt(mac.replaceAll(':', ''), 16);
}

const HEX = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, '0'));

export function macText(mac: number): string {
  const high = Math.floor(mac / 2 ** 24);
  const pair = (of: number, shift: number) => HEX[(of >>> shift) & 0xff];
  const top = `${pair(high, 16)}:${pair(high, 8)}:${pair(high, 0)}`;
  return `${top}:${pair(mac, 16)}:${pair(mac, 8)}:${pair(mac, 0)}`;
}

export function macBytes(mac: string): Uint8Array {
  const number = macNumber(mac);
  const bytes = new Uint8Array(6);
  const view = new DataView(bytes.buffer);
  view.setUint16(0, Math.floor(number / 2 ** 32));
  view.setUint32(2, number % 2 ** 32);
  return bytes;
}

/** An IPv4 address as a number. E_ARGUMENT unless four decimal bytes with dots. */
export function ipNumber(address: string): number {
  const parts = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(address);
  const [a, b, c, d] = [
    Number(parts?.[1]),
    Number(parts?.[2]),
    Number(parts?.[3]),
    Number(parts?.[4]),
  ];
  if (!(a <= 255 && b <= 255 && c <= 255 && d <= 255)) {
    throw new SnowflockError('E_ARGUMENT', `${address} is no IPv4 address`);
  }
  return ((a * 256 + b) * 256 + c) * 256 + d;
}

export function ipText(address: number): string {
  return `${address >>> 24}.${(address >>> 16) & 0xff}.${(address >>> 8) & 0xff}.${address & 0xff}`;
}

/** The `netback` addon as TypeScript sees it: native/netback. All names are namespace-local. */
import { asSnowflockError, type SnowflockError } from '../common/errors.js';
import { loadAddon } from '../common/native.js';

/** MAC addresses and IPv4 addresses are numbers, first byte highest. */
export interface NativeVm {
  tap: string;
  wireMac: number;
  guestMac: number;
  ip: number;
  /** The wire MAC that the interface has now and this one takes the place of. */
  replaces?: number;
}

export interface NativeRun {
  /** TC_ACT_*: 0 OK, 2 SHOT, 7 REDIRECT, 0xffffffff UNSPEC. */
  verdict: number;
  meanNs: number;
  /** As the last repetition left it. */
  frame: Buffer;
}

export interface NativeFilter {
  addVm(vm: NativeVm): void;
  removeVm(tap: string): void;
  vms(): NativeVm[];
  /** Bits of NETBACK_GATEWAY_MODE (kernel/netback/netback.h). */
  setGatewayMode(mode: number): void;
  gatewayMode(): number;
  /** By reason number. */
  stats(): number[];
  detach(): void;
  close(): void;
  putIdentity(ifindex: number, vm: NativeVm): void;
  run(
    program: 'from_guest' | 'from_wire' | 'to_guest',
    frame: Uint8Array,
    ifindex: number,
    mark: number,
    repeat: number,
  ): NativeRun;
  /**
   * Each of many frames once. They lie one behind the other, `lengths` and `ifindexes` have a number
   * a frame; the results take their places. The verdicts.
   */
  runMany(
    program: 'from_guest' | 'from_wire' | 'to_guest',
    frames: Uint8Array,
    lengths: Uint32Array,
    ifindexes: Uint32Array,
    mark: number,
  ): Uint32Array;
}

export interface NativeFramePort {
  send(frame: Uint8Array): boolean;
  lost(): number;
  close(): void;
}

interface FramePortOptions {
  maxFrameBytes: number;
  framesPerSecond: number;
  burst: number;
}

interface NetbackAddon {
  /** `existing`: the filter that is there, or E_NOT_FOUND; nothing is attached. */
  attach(objectPath: string, uplink: string, existing?: boolean): Promise<NativeFilter>;
  openTap(name: string, vnetHdr: boolean, mtu: number): number;
  /** `relay`: packets from port 67 too. `receiveBytes`: of the kernel's buffer. */
  openDhcpSocket(name: string, relay: boolean, receiveBytes: number): number;
  /** Headers of segments that open or end connections, or have another source than `address`; ARP replies. */
  openTcpSocket(name: string, address: number): number;
  inNetns<T>(path: string, work: () => T): T;
  reasonNames: readonly string[];
  FramePort: new (
    fd: number,
    options: FramePortOptions,
    onFrame: (frame: Buffer) => void,
    onEnd: (error: Error) => void,
  ) => NativeFramePort;
}

let loaded: NetbackAddon | undefined;

export function netback(): NetbackAddon {
  loaded ??= loadAddon<NetbackAddon>('netback');
  return loaded;
}

/** Native errors as SnowflockError. */
export function native<T>(work: () => T): T {
  try {
    return work();
  } catch (error) {
    throw asSnowflockError(error, 'E_NETWORK');
  }
}

export function nativeError(error: unknown): SnowflockError {
  return asSnowflockError(error, 'E_NETWORK');
}

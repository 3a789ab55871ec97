import { SnowflockError } from '../common/errors.js';
import { nativePath } from '../common/native.js';
import {
  addressOfVmid,
  GATEWAY,
  GUEST_MAC,
  ipNumber,
  ipText,
  macNumber,
  macText,
  type Place,
  placeOfWireMac,
  VMID_GATEWAY,
  WIRE_PREFIX,
  wireMac,
} from '../network/addresses.js';
import {
  type NativeFilter,
  type NativeVm,
  native,
  nativeError,
  netback,
} from '../network/native.js';
import type { GatewayMode } from './policy.js';
import { REASONS } from './reasons.js';

/** A VM as the filter knows it. */
export interface FilteredVm {
  /** Name of the VM's tap (or other interface on whose other end the guest is). */
  tap: string;
  /** 24 bits. */
  family: number;
  /** 0 to 65532. */
  vmid: number;
  /** What the guest believes to have: no group address, not 5e:... Default GUEST_MAC. */
  guestMac?: string;
  /** Default, and only accepted value: the scheme's for this vmid. */
  ip?: string;
}

/** NETBACK_GATEWAY_* of kernel/netback/netback.h. */
export const GATEWAY_MODES: Readonly<Record<GatewayMode, number>> = {
  own: 0,
  elsewhere: 4,
  shared: 8,
};

const isGatewayMac = (mac: number) => mac % 2 ** 16 === VMID_GATEWAY;

/** To a group address every guest would listen; 5e:.. tells the filter's own addresses apart. */
function guestMacNumber(mac: string): number {
  const number = macNumber(mac);
  const first = Math.floor(number / 2 ** 40);
  if (number === 0 || first % 2 === 1 || first === WIRE_PREFIX) {
    const what =
      first === WIRE_PREFIX ? 'begins with 5e, as the addresses on the wire do' : 'is none';
    throw new SnowflockError('E_ARGUMENT', `a guest's own MAC address: ${mac} ${what}`);
  }
  return number;
}

function toNative(vm: FilteredVm): NativeVm {
  const ip = addressOfVmid(vm.vmid);
  if (vm.ip !== undefined && vm.ip !== ip) {
    throw new SnowflockError('E_ARGUMENT', `vmid ${vm.vmid} has address ${ip}, not ${vm.ip}`);
  }
  return {
    tap: vm.tap,
    wireMac: macNumber(wireMac(vm)),
    guestMac: guestMacNumber(vm.guestMac ?? GUEST_MAC),
    ip: ipNumber(ip),
  };
}

/**
 * The netback filter of one host (paper, section 3.7), in this process's network namespace. It lives
 * in the kernel: a process may die and the next one goes on with `attach`. Policy and states:
 * kernel/netback/netback.bpf.c.
 */
export class NetbackFilter {
  readonly #filter: NativeFilter;

  private constructor(
    filter: NativeFilter,
    /** Its interface. */
    readonly uplink: string,
  ) {
    this.#filter = filter;
  }

  /**
   * Loads the filter on the uplink, or takes over the one that is there, with all its VMs whose
   * interfaces still exist.
   * E_NOT_FOUND (no such interface), E_NETWORK (its MAC address begins with 5e), E_IN_USE (another
   * tc filter in its place), E_BPF.
   */
  static async attach(options: { uplink: string }): Promise<NetbackFilter> {
    try {
      const object = nativePath('netback.bpf.o');
      const filter = await netback().attach(object, options.uplink);
      return new NetbackFilter(filter, options.uplink);
    } catch (error) {
      throw nativeError(error);
    }
  }

  /**
   * The filter that is on the uplink, as it is: nothing is loaded anew or repaired.
   * E_NOT_FOUND (no such interface, or no filter there), E_BPF.
   */
  static async open(options: { uplink: string }): Promise<NetbackFilter> {
    try {
      const object = nativePath('netback.bpf.o');
      const filter = await netback().attach(object, options.uplink, true);
      return new NetbackFilter(filter, options.uplink);
    } catch (error) {
      throw nativeError(error);
    }
  }

  /**
   * From here on the interface, which is set up, can send and receive as this VM and nothing else.
   * Again for the same VM: only its guest's MAC may change. Any number of processes may try at once;
   * one of them gets an identity, and one an interface.
   * @param replaces the VM that the interface is now and is no longer then
   * E_NOT_FOUND (interface), E_EXISTS (another interface has this identity, or this interface has
   * another identity or the filter of another uplink that is there), E_IN_USE, E_ARGUMENT, E_BPF.
   */
  addVm(vm: FilteredVm, replaces?: Place): void {
    const identity = toNative(vm);
    if (replaces !== undefined) identity.replaces = macNumber(wireMac(replaces));
    native(() => this.#filter.addVm(identity));
  }

  /**
   * Takes identity and programs away and sets the interface down, for without them its guest would
   * reach the host's stack. Works by name also when the tap has gone. E_NOT_FOUND.
   */
  removeVm(tap: string): void {
    native(() => this.#filter.removeVm(tap));
  }

  /**
   * From here on what the interface sends and receives is the family's gateway on this host
   * (docs/network.md, NAT gateway). Its far end has the gateway's wire MAC. Errors: as `addVm`.
   */
  addGateway(gateway: { port: string; family: number }): void {
    const mac = macNumber(wireMac({ family: gateway.family, vmid: VMID_GATEWAY }));
    const identity = { tap: gateway.port, wireMac: mac, guestMac: mac, ip: ipNumber(GATEWAY) };
    native(() => this.#filter.addVm(identity));
  }

  /** The gateways of this host; `removeVm` takes one away by its port. */
  gateways(): { port: string; family: number }[] {
    return native(() => this.#filter.vms())
      .filter((vm) => isGatewayMac(vm.wireMac))
      .map((vm) => ({ port: vm.tap, family: Math.floor(vm.wireMac / 2 ** 16) % 2 ** 24 }));
  }

  /**
   * Says where gateways are (docs/network.md, one router for all). Kept in the kernel, until
   * `detach`. E_BPF.
   */
  setGatewayMode(mode: GatewayMode): void {
    native(() => this.#filter.setGatewayMode(GATEWAY_MODES[mode]));
  }

  gatewayMode(): GatewayMode {
    const bits = native(() => this.#filter.gatewayMode());
    const all = Object.keys(GATEWAY_MODES) as GatewayMode[];
    return all.find((mode) => GATEWAY_MODES[mode] === bits) ?? 'own';
  }

  vms(): Required<FilteredVm>[] {
    const all = native(() => this.#filter.vms()).filter((vm) => !isGatewayMac(vm.wireMac));
    return all.map((vm) => {
      const place = placeOfWireMac(macText(vm.wireMac));
      if (place === undefined) {
        throw new SnowflockError('E_INTERNAL', `${vm.tap} has no VM's wire MAC in the filter`);
      }
      return { tap: vm.tap, ...place, guestMac: macText(vm.guestMac), ip: ipText(vm.ip) };
    });
  }

  /** Frames by reason since the filter was first attached; names as in reasons.ts. */
  stats(): Record<string, number> {
    const counts = native(() => this.#filter.stats());
    return Object.fromEntries(REASONS.map((reason, number) => [reason.name, counts[number] ?? 0]));
  }

  /** As `removeVm` for all VMs, then off the uplink. The object is closed then. */
  detach(): void {
    native(() => this.#filter.detach());
  }

  /** Lets go of the filter and leaves it working. */
  close(): void {
    this.#filter.close();
  }
}

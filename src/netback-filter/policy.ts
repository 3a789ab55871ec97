/**
 * The filter's policy in plain TypeScript (paper, section 3.7): what becomes of one frame, and why.
 * kernel/netback does the same in the kernel; test/netback-filter/policy.test.ts runs generated
 * frames through both and finds no difference. Read this to know the rules; change both together.
 *
 * States: none. A decision follows from the frame, where it came by and the table of this host's VMs.
 * Rules, in the order in which they are asked:
 *  - a guest sends from its own MAC address, untagged, IPv4 or ARP and nothing else;
 *  - ARP requests are answered from the address scheme, never for the guest's own address; replies
 *    are nobody's business;
 *  - a sum that a guest leaves to the kernel is written behind addresses and ports;
 *  - no guest acts as a DHCP server; its requests to one end at the host;
 *  - IPv4 leaves with the guest's own address, to the wire MAC of a VM of its family that has the
 *    packet's destination address; it leaves with the sender's wire MAC;
 *  - a family's gateway is one more port: guests reach through it what is outside their network, it
 *    sends with addresses from there (or its own), and only to guests of this host;
 *  - unless one host is the router for all: it shares its gateways with the guests of other hosts,
 *    for which they are elsewhere; only between these two do frames of gateways cross the wire;
 *  - from the wire comes IPv4 of the own family alone, from a VM that is not on this host, to a VM;
 *  - into a tap goes only what the filter sent there.
 *
 * Left out on purpose: what the kernel's helpers may fail at (`helper_failed`), and segmentation.
 */
import { REASONS } from './reasons.js';

/** One VM of this host. MAC and IPv4 addresses are numbers, first byte highest. */
export interface PolicyVm {
  readonly ifindex: number;
  readonly wireMac: number;
  readonly guestMac: number;
  readonly ip: number;
}

/**
 * Where gateways are: each host has its `own`; on another host, over the wire (`elsewhere`); here,
 * `shared` with the guests of all hosts.
 */
export type GatewayMode = 'own' | 'elsewhere' | 'shared';

/** The VMs of one host, as the filter's maps hold them. */
export class PolicyTable {
  readonly #byInterface = new Map<number, PolicyVm>();
  readonly #byWireMac = new Map<number, PolicyVm>();

  constructor(
    vms: Iterable<PolicyVm>,
    readonly gateways: GatewayMode = 'own',
  ) {
    for (const vm of vms) {
      this.#byInterface.set(vm.ifindex, vm);
      this.#byWireMac.set(vm.wireMac, vm);
    }
  }

  ofInterface(ifindex: number): PolicyVm | undefined {
    return this.#byInterface.get(ifindex);
  }

  ofWireMac(mac: number): PolicyVm | undefined {
    return this.#byWireMac.get(mac);
  }
}

/** Where a frame is seen: tc ingress of a tap, tc ingress of the uplink, tc egress of a tap. */
export type Hook = 'from_guest' | 'from_wire' | 'to_guest';

export interface Arrival {
  readonly hook: Hook;
  /** Of the interface it is seen at. */
  readonly ifindex: number;
  readonly frame: Uint8Array;
  /** The kernel took a VLAN tag off before the filter saw the frame. */
  readonly tagged?: boolean;
  /**
   * A sum is left to the kernel, which writes it here (two bytes, from the start of the frame) when
   * the filter has seen the frame.
   */
  readonly checksumAt?: number;
  /** The mark the filter itself puts on what it sends to a tap. */
  readonly marked?: boolean;
}

export interface Decision {
  /**
   * - `redirect`: sent out of `to`, as `frame`
   * - `drop`
   * - `pass`: into the guest
   * - `unspec`: not the filter's; the host's stack and other filters see it
   */
  readonly verdict: 'redirect' | 'drop' | 'pass' | 'unspec';
  /** A name of {@link REASONS}; absent for what is not counted. */
  readonly reason?: string;
  /** An interface, or the uplink. */
  readonly to?: number | 'uplink';
  /** As it leaves; the input itself where nothing was rewritten. */
  readonly frame: Uint8Array;
}

const ETHERNET_BYTES = 14;
const ARP_BYTES = ETHERNET_BYTES + 28;
const IPV4_BYTES = 20;
const BROADCAST = 0xffff_ffff_ffff;
const WIRE_PREFIX = 0x5e;
const NETWORK = 0x0a56_0000;
const HOST_BITS = 2 ** 16;
const FIRST_HOST = 2;
const VMID_LAST = 0xfffc;
const VMID_GATEWAY = 0xffff;
const GATEWAY_ADDRESS = NETWORK + 1;
const TYPE_IPV4 = 0x0800;
const TYPE_ARP = 0x0806;
const TYPE_IPV6 = 0x86dd;
const TYPES_VLAN = [0x8100, 0x88a8];
const TCP = 6;
const UDP = 17;
const TCP_CHECKSUM_AT = 16;
const UDP_CHECKSUM_AT = 6;
const FRAGMENT_OFFSET = 0x1fff;
const PORT_DHCP_SERVER = 67;
const PORT_DHCP_CLIENT = 68;
const ARP_REQUEST = 1;
const ARP_REPLY = 2;

const isWire = (mac: number) => Math.floor(mac / 2 ** 40) === WIRE_PREFIX;
const isMulticast = (mac: number) => Math.floor(mac / 2 ** 40) % 2 === 1;
const sameFamily = (a: number, b: number) => Math.floor(a / 2 ** 16) === Math.floor(b / 2 ** 16);
const vmidOf = (wireMac: number) => wireMac % 2 ** 16;
const addressOf = (vmid: number) => NETWORK + FIRST_HOST + vmid;
const isGateway = (wireMac: number) => vmidOf(wireMac) === VMID_GATEWAY;
/** A unicast address that is not the family's. */
const isOutside = (address: number) => {
  const top = Math.floor(address / 2 ** 24);
  const inFamily = address >= NETWORK && address < NETWORK + HOST_BITS;
  return !inFamily && top !== 0 && top !== 127 && top < 224;
};

interface Ipv4 {
  source: number;
  destination: number;
  headerBytes: number;
  payloadBytes: number;
  protocol: number;
  fragmentOffset: number;
}

/** Undefined: no whole header, or its lengths do not fit the frame. */
function parseIpv4(frame: Buffer): Ipv4 | undefined {
  if (frame.length < ETHERNET_BYTES + IPV4_BYTES) return undefined;
  const ip = frame.subarray(ETHERNET_BYTES);
  const headerBytes = (ip.readUInt8(0) & 0xf) * 4;
  const totalBytes = ip.readUInt16BE(2);
  if (ip.readUInt8(0) >> 4 !== 4 || headerBytes < IPV4_BYTES) return undefined;
  if (totalBytes < headerBytes || totalBytes > ip.length) return undefined;
  return {
    source: ip.readUInt32BE(12),
    destination: ip.readUInt32BE(16),
    headerBytes,
    payloadBytes: totalBytes - headerBytes,
    protocol: ip.readUInt8(9),
    fragmentOffset: ip.readUInt16BE(6) & FRAGMENT_OFFSET,
  };
}

function readdressed(frame: Buffer, destination: number, source: number): Buffer {
  const out = Buffer.from(frame);
  out.writeUIntBE(destination, 0, 6);
  out.writeUIntBE(source, 6, 6);
  return out;
}

function arpFromGuest(frame: Buffer, vm: PolicyVm): Decision {
  const drop = (reason: string): Decision => ({ verdict: 'drop', reason, frame });
  if (frame.length < ARP_BYTES) return drop('arp_malformed');
  const ethernetIpv4 = '0001080006' + '04';
  if (frame.toString('hex', 14, 20) !== ethernetIpv4) return drop('arp_malformed');
  const operation = frame.readUInt16BE(20);
  if (operation === ARP_REPLY) return drop('arp_reply');
  if (operation !== ARP_REQUEST) return drop('arp_malformed');
  const sender = frame.readUInt32BE(28);
  const target = frame.readUInt32BE(38);
  if (frame.readUIntBE(22, 6) !== vm.guestMac) return drop('arp_source');
  if (sender !== 0 && sender !== vm.ip) return drop('arp_source');
  // Silence about its own address is what duplicate address detection wants to hear.
  if (target === vm.ip) return drop('arp_own_address');
  const to = frame.readUIntBE(0, 6);
  if (to !== BROADCAST && !(isWire(to) && sameFamily(to, vm.wireMac))) return drop('arp_outside');
  const host = target - NETWORK;
  if (host <= 0 || host >= HOST_BITS - 1) return drop('arp_outside');

  const vmid = (host - FIRST_HOST + HOST_BITS) % HOST_BITS;
  const answer = vm.wireMac - vmidOf(vm.wireMac) + vmid;
  const out = readdressed(frame, vm.guestMac, answer);
  out.writeUInt16BE(ARP_REPLY, 20);
  out.writeUIntBE(answer, 22, 6);
  out.writeUInt32BE(target, 28);
  out.writeUIntBE(vm.guestMac, 32, 6);
  out.writeUInt32BE(sender, 38);
  return { verdict: 'redirect', reason: 'arp_answered', to: vm.ifindex, frame: out };
}

function ipv4FromGuest(
  frame: Buffer,
  vm: PolicyVm,
  table: PolicyTable,
  checksumAt: number | undefined,
): Decision {
  const drop = (reason: string): Decision => ({ verdict: 'drop', reason, frame });
  const ip = parseIpv4(frame);
  if (ip === undefined) return drop('guest_malformed_ip');
  // It must not become an address or a port. Further behind are sums inside of tunnels.
  const ownChecksum = ip.protocol === TCP ? TCP_CHECKSUM_AT : UDP_CHECKSUM_AT;
  if (checksumAt !== undefined && checksumAt < ETHERNET_BYTES + ip.headerBytes + ownChecksum) {
    return drop('guest_checksum');
  }
  // Of a fragmented datagram the first fragment has the ports; without it none is rebuilt.
  if (ip.protocol === UDP && ip.fragmentOffset === 0) {
    if (ip.payloadBytes < 8) return drop('guest_malformed_ip');
    const at = ETHERNET_BYTES + ip.headerBytes;
    const [from, to] = [frame.readUInt16BE(at), frame.readUInt16BE(at + 2)];
    if (from === PORT_DHCP_SERVER || to === PORT_DHCP_CLIENT) return drop('guest_dhcp_server');
    // The DHCP service saw it on its packet socket, which comes before the filter.
    if (to === PORT_DHCP_SERVER) return drop('dhcp_to_host');
  }
  const fromGateway = isGateway(vm.wireMac);
  if (ip.source !== vm.ip && !(fromGateway && isOutside(ip.source))) return drop('guest_source_ip');
  const to = frame.readUIntBE(0, 6);
  if (to === BROADCAST) return drop('guest_broadcast');
  if (isMulticast(to)) return drop('guest_multicast');
  if (!isWire(to)) return drop('guest_not_wire_mac');
  if (!sameFamily(to, vm.wireMac)) return drop('guest_foreign_family');
  const vmid = vmidOf(to);
  if (to === vm.wireMac) return drop('guest_no_such_vm');
  const local = table.ofWireMac(to);
  const deliver = (reason: string, port: PolicyVm): Decision => ({
    verdict: 'redirect',
    reason,
    to: port.ifindex,
    frame: readdressed(frame, port.guestMac, vm.wireMac),
  });
  const onWire = (reason: string): Decision => ({
    verdict: 'redirect',
    reason,
    to: 'uplink',
    frame: readdressed(frame, to, vm.wireMac),
  });
  if (vmid === VMID_GATEWAY) {
    if (local === undefined && table.gateways !== 'elsewhere') return drop('guest_to_gateway');
    if (ip.destination !== GATEWAY_ADDRESS && !isOutside(ip.destination)) {
      return drop('guest_destination_ip');
    }
    return local === undefined
      ? onWire('guest_to_wire_gateway')
      : deliver('gateway_from_guest', local);
  }
  if (vmid > VMID_LAST) return drop('guest_no_such_vm');
  // Keeps broadcast and multicast IP out of unicast frames too.
  if (ip.destination !== addressOf(vmid)) return drop('guest_destination_ip');

  if (local !== undefined) {
    return deliver(fromGateway ? 'gateway_to_guest' : 'guest_to_local', local);
  }
  if (!fromGateway) return onWire('guest_to_wire');
  return table.gateways === 'shared' ? onWire('gateway_to_wire') : drop('gateway_no_such_vm');
}

function fromGuest(arrival: Arrival, frame: Buffer, table: PolicyTable): Decision {
  const drop = (reason: string): Decision => ({ verdict: 'drop', reason, frame });
  const vm = table.ofInterface(arrival.ifindex);
  if (vm === undefined) return drop('guest_no_identity');
  if (frame.length < ETHERNET_BYTES) return drop('guest_runt');
  if (frame.readUIntBE(6, 6) !== vm.guestMac) return drop('guest_source_mac');
  const type = frame.readUInt16BE(12);
  if (arrival.tagged === true || TYPES_VLAN.includes(type)) return drop('guest_vlan');
  if (type === TYPE_IPV4) return ipv4FromGuest(frame, vm, table, arrival.checksumAt);
  if (type === TYPE_ARP) return arpFromGuest(frame, vm);
  return drop(type === TYPE_IPV6 ? 'guest_ipv6' : 'guest_ethertype');
}

function fromWire(arrival: Arrival, frame: Buffer, table: PolicyTable): Decision {
  const drop = (reason: string): Decision => ({ verdict: 'drop', reason, frame });
  if (frame.length < ETHERNET_BYTES) return { verdict: 'unspec', frame };
  const [to, from] = [frame.readUIntBE(0, 6), frame.readUIntBE(6, 6)];
  if (!isWire(to)) {
    return isWire(from) ? drop('wire_stray_source') : { verdict: 'unspec', frame };
  }
  if (arrival.tagged === true) return drop('wire_vlan');
  const vm = table.ofWireMac(to);
  const toGateway = isGateway(to);
  if (vm === undefined || (toGateway && table.gateways !== 'shared')) {
    return drop('wire_unknown_destination');
  }
  if (!sameFamily(from, to)) return drop('wire_foreign_source');
  const fromGateway = isGateway(from);
  const maySend = fromGateway
    ? !toGateway && table.gateways === 'elsewhere'
    : vmidOf(from) <= VMID_LAST;
  if (!maySend || table.ofWireMac(from) !== undefined) return drop('wire_impossible_source');
  if (frame.readUInt16BE(12) !== TYPE_IPV4) return drop('wire_ethertype');
  const ip = parseIpv4(frame);
  if (ip === undefined) return drop('wire_malformed_ip');
  const rightSource = fromGateway
    ? ip.source === GATEWAY_ADDRESS || isOutside(ip.source)
    : ip.source === addressOf(vmidOf(from));
  if (!rightSource) return drop('wire_source_ip');
  if (ip.destination !== vm.ip && !(toGateway && isOutside(ip.destination))) {
    return drop('wire_destination_ip');
  }
  const passed = fromGateway ? 'gateway_from_wire' : 'wire_to_guest';
  return {
    verdict: 'redirect',
    reason: toGateway ? 'wire_to_gateway' : passed,
    to: vm.ifindex,
    frame: readdressed(frame, vm.guestMac, from),
  };
}

/** What the filter does with a frame. Pure; the frame given is not changed. */
export function decide(arrival: Arrival, table: PolicyTable): Decision {
  const frame = Buffer.from(
    arrival.frame.buffer,
    arrival.frame.byteOffset,
    arrival.frame.byteLength,
  );
  switch (arrival.hook) {
    case 'from_guest':
      return fromGuest(arrival, frame, table);
    case 'from_wire':
      return fromWire(arrival, frame, table);
    case 'to_guest':
      return arrival.marked === true
        ? { verdict: 'pass', frame }
        : { verdict: 'drop', reason: 'host_into_tap', frame };
  }
}

/** The counter of a reason. */
export function reasonNumber(name: string): number {
  return REASONS.findIndex((reason) => reason.name === name);
}

/**
 * The DHCP server of one VM (paper, section 3.7; RFC 2131): it has one address to give, the VM's,
 * and is the only server the VM can hear. No I/O and no clock of its own.
 *
 * States: idle, offered, bound (until the lease ends), released, declined. No state changes what is
 * answered, since there is nothing else to offer: they tell the operator what the guest did.
 *
 *   DISCOVER                          OFFER
 *   REQUEST, server id not ours       silence (the client chose another)
 *   REQUEST for the VM's address      ACK (selecting, init-reboot, renewing, rebinding alike)
 *   REQUEST for another address       NAK: what a clone gets that asks for its parent's
 *   INFORM from the VM's address      ACK without a lease
 *   DECLINE, RELEASE                  noted
 *
 * Options: the lease's own and the mask always; of the others those that the client lists (option 55),
 * in its order, or all if it lists none. What does not fit even with overload is left out, the least
 * wanted first; without a lease's own options there is no answer.
 *
 * Relayed packets (giaddr) are ignored but in the test mode `relay`: a real server's VM is on its own
 * wire, where no relay can be. Then answers go to the relay, with its option 82 as it came.
 *
 * Left out on purpose: BOOTP is ignored; there is no pool.
 */
import {
  addresses,
  type DhcpPacket,
  DhcpPacketError,
  encode,
  encodeRoutes,
  encodeSearch,
  FLAG_BROADCAST,
  MAX_PACKET_BYTES,
  MessageType,
  Option,
  type Route,
  readAddress,
  readU8,
  readU16,
  text,
  u8,
  u16,
  u32,
} from '../../packages/dhcp-packet/src/index.js';
import { BROADCAST, GATEWAY, MTU, macBytes, NETMASK } from '../network/addresses.js';
import type { DropReason } from './counters.js';

/** What the server tells its VM. */
export interface DhcpIdentity {
  address: string;
  guestMac: string;
  hostname?: string;
  domain?: string;
  /** Only if there is a gateway that forwards. */
  router?: string;
  dns?: readonly string[];
  /** Time servers (option 42). */
  ntp?: readonly string[];
  /** Option 119. */
  search?: readonly string[];
  /** Option 121. Clients that take it ignore `router`: name the default route here too. */
  routes?: readonly Route[];
  /** Default 3600. */
  leaseSeconds?: number;
  /** When clients ask this server for more time (T1), and when any (T2). Default 1/2 and 7/8. */
  renewSeconds?: number;
  rebindSeconds?: number;
}

export type DhcpState = 'idle' | 'offered' | 'bound' | 'released' | 'declined';

/** In which state a client sends this REQUEST (RFC 2131, 4.3.2). */
export type ClientState = 'selecting' | 'init-reboot' | 'renewing' | 'rebinding';

/** What became of a packet. `clientState` of a REQUEST that was answered. */
export type DhcpOutcome =
  | { kind: 'offer' | 'ack' | 'nak'; reply: DhcpReply; clientState?: ClientState }
  | { kind: 'released' | 'declined' }
  | { kind: 'ignored'; reason: DropReason };

export interface DhcpReply {
  bytes: Uint8Array;
  /** To the client's own addresses, or to all (it has none yet, or must give it up). */
  broadcast: boolean;
  /** Of the unicast IP packet. */
  address: string;
  /** 68, a client's; 67: to a relay. */
  port: 67 | 68;
  /** OFFER, ACK or NAK. */
  type: number;
  /** Options for which there was no room. */
  omitted: readonly number[];
}

export interface DhcpMachineOptions {
  /** Answer relayed packets. For tests. Default false. */
  relay?: boolean;
}

const NONE = '0.0.0.0';
const SERVER_ID = addresses(GATEWAY);
const MASK = addresses(NETMASK);
const LEASE_SECONDS = 3600;
const ETHERNET = 1;
const CLIENT_PORT = 68;
const RELAY_PORT = 67;
/** RFC 2132, 9.10. */
const MIN_MAX_MESSAGE_BYTES = 576;
const IP_AND_UDP_BYTES = 28;

const ignored = (reason: DropReason): DhcpOutcome => ({ kind: 'ignored', reason });

export class DhcpMachine {
  #identity: DhcpIdentity;
  #state: DhcpState = 'idle';
  #leaseEndMs = 0;
  readonly #relay: boolean;
  #parameters: ReadonlyMap<number, Uint8Array> | undefined;
  #guestMac: Uint8Array;

  constructor(identity: DhcpIdentity, options: DhcpMachineOptions = {}) {
    this.#identity = identity;
    this.#guestMac = macBytes(identity.guestMac);
    this.#relay = options.relay ?? false;
  }

  get identity(): DhcpIdentity {
    return this.#identity;
  }

  /** A bound lease that has run out counts as idle. */
  state(nowMs: number): DhcpState {
    return this.#state === 'bound' && nowMs >= this.#leaseEndMs ? 'idle' : this.#state;
  }

  /** From now on this address and no other: a client that renews the old one gets a NAK. */
  setIdentity(identity: DhcpIdentity): void {
    this.#identity = identity;
    this.#parameters = undefined;
    this.#guestMac = macBytes(identity.guestMac);
    this.#state = 'idle';
  }

  /**
   * `unicast`: the datagram was for the server alone, which tells renewing from rebinding.
   * DhcpPacketError if an option has an impossible value.
   */
  handle(packet: DhcpPacket, nowMs: number, unicast = false): DhcpOutcome {
    const { options } = packet;
    if (packet.giaddr !== NONE && !this.#relay) return ignored('relayed');
    if (
      packet.op !== 1 ||
      packet.hardwareType !== ETHERNET ||
      packet.hardwareAddress.length !== 6 ||
      !this.#isGuest(packet.hardwareAddress)
    ) {
      return ignored('not_guest');
    }
    const server = readAddress(options, Option.SERVER_ID);
    const requested = readAddress(options, Option.REQUESTED_ADDRESS);
    const { address } = this.#identity;
    switch (readU8(options, Option.MESSAGE_TYPE)) {
      case MessageType.DISCOVER:
        if (this.state(nowMs) !== 'bound') this.#state = 'offered';
        return { kind: 'offer', reply: this.#reply(packet, MessageType.OFFER) };
      case MessageType.REQUEST: {
        if (server !== undefined && server !== GATEWAY) return ignored('other_server');
        // Renewing and rebinding clients say in ciaddr what the others say in option 50.
        const wanted = requested ?? packet.ciaddr;
        if (wanted === NONE) return ignored('no_address');
        const clientState = clientStateOf(packet, unicast);
        if (wanted !== address || (packet.ciaddr !== NONE && packet.ciaddr !== address)) {
          return { kind: 'nak', reply: this.#nak(packet, wanted), clientState };
        }
        this.#state = 'bound';
        this.#leaseEndMs = nowMs + this.#leaseSeconds() * 1000;
        return { kind: 'ack', reply: this.#reply(packet, MessageType.ACK), clientState };
      }
      case MessageType.INFORM:
        if (packet.ciaddr !== address) return ignored('other_address');
        return { kind: 'ack', reply: this.#reply(packet, MessageType.ACK, false) };
      case MessageType.DECLINE:
        if (server !== GATEWAY) return ignored('other_server');
        if (requested !== address) return ignored('other_address');
        this.#state = 'declined';
        return { kind: 'declined' };
      case MessageType.RELEASE:
        if (server !== GATEWAY) return ignored('other_server');
        if (packet.ciaddr !== address) return ignored('other_address');
        this.#state = 'released';
        return { kind: 'released' };
      default:
        return ignored('no_type');
    }
  }

  #isGuest(hardwareAddress: Uint8Array): boolean {
    return hardwareAddress.every((byte, i) => byte === this.#guestMac[i]);
  }

  #leaseSeconds(): number {
    return this.#identity.leaseSeconds ?? LEASE_SECONDS;
  }

  /** What every answer has; `options` first, then what comes back as it came. */
  #header(packet: DhcpPacket, options: Map<number, Uint8Array>): DhcpPacket {
    // RFC 6842: the client's identifier comes back in every answer.
    const clientId = packet.options.get(Option.CLIENT_ID);
    if (clientId !== undefined) options.set(Option.CLIENT_ID, clientId);
    // RFC 3046, 2.2: as it came, behind all others. Without a relay it is the client's invention.
    const relay = packet.options.get(Option.RELAY_AGENT);
    if (relay !== undefined && packet.giaddr !== NONE) options.set(Option.RELAY_AGENT, relay);
    return {
      op: 2,
      hardwareType: packet.hardwareType,
      hops: 0,
      xid: packet.xid,
      secs: 0,
      flags: packet.flags,
      ciaddr: NONE,
      yiaddr: NONE,
      siaddr: NONE,
      giaddr: packet.giaddr,
      hardwareAddress: packet.hardwareAddress,
      options,
    };
  }

  /** What a client may ask for; made once for an identity. Ascending: the order without a list. */
  #offered(): ReadonlyMap<number, Uint8Array> {
    if (this.#parameters !== undefined) return this.#parameters;
    const { hostname, domain, router, dns, ntp, search, routes } = this.#identity;
    const made = new Map<number, Uint8Array>();
    if (router !== undefined) made.set(Option.ROUTER, addresses(router));
    if (dns !== undefined && dns.length > 0) made.set(Option.DNS, addresses(...dns));
    if (hostname !== undefined) made.set(Option.HOST_NAME, text(hostname));
    if (domain !== undefined) made.set(Option.DOMAIN_NAME, text(domain));
    made.set(Option.INTERFACE_MTU, u16(MTU));
    made.set(Option.BROADCAST_ADDRESS, addresses(BROADCAST));
    if (ntp !== undefined && ntp.length > 0) made.set(Option.NTP, addresses(...ntp));
    if (search !== undefined && search.length > 0) {
      made.set(Option.DOMAIN_SEARCH, encodeSearch(search));
    }
    if (routes !== undefined && routes.length > 0) {
      made.set(Option.CLASSLESS_ROUTES, encodeRoutes(routes));
    }
    this.#parameters = made;
    return made;
  }

  #reply(packet: DhcpPacket, type: number, lease = true): DhcpReply {
    const { address } = this.#identity;
    const options = new Map<number, Uint8Array>([
      [Option.MESSAGE_TYPE, u8(type)],
      [Option.SERVER_ID, SERVER_ID],
    ]);
    if (lease) {
      const seconds = this.#leaseSeconds();
      const rebind = this.#identity.rebindSeconds ?? Math.floor((seconds * 7) / 8);
      const renew = this.#identity.renewSeconds ?? Math.floor(seconds / 2);
      options.set(Option.LEASE_SECONDS, u32(seconds));
      options.set(Option.RENEWAL_SECONDS, u32(Math.min(renew, rebind)));
      options.set(Option.REBINDING_SECONDS, u32(rebind));
    }
    // Before the router, also where a client lists it behind (RFC 2132, 3.3).
    options.set(Option.SUBNET_MASK, MASK);
    const reply = this.#header(packet, options);
    const optional: number[] = [];
    const offered = this.#offered();
    for (const code of packet.options.get(Option.PARAMETER_LIST) ?? offered.keys()) {
      const value = offered.get(code);
      if (value === undefined || options.has(code)) continue;
      options.set(code, value);
      optional.push(code);
    }
    if (lease) reply.yiaddr = address;
    if (type === MessageType.ACK) reply.ciaddr = packet.ciaddr;
    const { bytes, omitted } = encodeWithout(reply, options, optional, maxBytes(packet));
    if (packet.giaddr !== NONE) return toRelay(bytes, packet, type, omitted);
    return {
      bytes,
      port: CLIENT_PORT,
      broadcast: packet.ciaddr === NONE && (packet.flags & FLAG_BROADCAST) !== 0,
      address: packet.ciaddr === NONE ? address : packet.ciaddr,
      type,
      omitted,
    };
  }

  #nak(packet: DhcpPacket, wanted: string): DhcpReply {
    const { address } = this.#identity;
    const reply = this.#header(
      packet,
      new Map([
        [Option.MESSAGE_TYPE, u8(MessageType.NAK)],
        [Option.SERVER_ID, addresses(GATEWAY)],
        [Option.MESSAGE, text(`this VM has ${address}, not ${wanted}`)],
      ]),
    );
    // RFC 2131, 4.3.2: the client must give the address up, so it is not spoken to there.
    // Through a relay that is the relay's part, which the flag tells it.
    if (packet.giaddr !== NONE) reply.flags |= FLAG_BROADCAST;
    const bytes = encode(reply, maxBytes(packet));
    if (packet.giaddr !== NONE) return toRelay(bytes, packet, MessageType.NAK, []);
    return {
      bytes,
      broadcast: true,
      address,
      port: CLIENT_PORT,
      type: MessageType.NAK,
      omitted: [],
    };
  }
}

/** The packet, without the last of `optional` as long as it does not fit. */
function encodeWithout(
  reply: DhcpPacket,
  options: Map<number, Uint8Array>,
  optional: number[],
  bytes: number,
): { bytes: Uint8Array; omitted: number[] } {
  const omitted: number[] = [];
  for (;;) {
    try {
      return { bytes: encode(reply, bytes), omitted };
    } catch (error) {
      if (!(error instanceof DhcpPacketError) || error.reason !== 'long') throw error;
      const least = optional.pop();
      if (least === undefined) throw error;
      options.delete(least);
      omitted.push(least);
    }
  }
}

/** RFC 2131, 4.1. */
function toRelay(
  bytes: Uint8Array,
  packet: DhcpPacket,
  type: number,
  omitted: readonly number[],
): DhcpReply {
  const { giaddr: address } = packet;
  return { bytes, broadcast: false, address, port: RELAY_PORT, type, omitted };
}

function clientStateOf(packet: DhcpPacket, unicast: boolean): ClientState {
  if (packet.ciaddr !== NONE) return unicast ? 'renewing' : 'rebinding';
  return packet.options.has(Option.SERVER_ID) ? 'selecting' : 'init-reboot';
}

function maxBytes(packet: DhcpPacket): number {
  const asked = readU16(packet.options, Option.MAX_MESSAGE_BYTES);
  const ip = Math.max(asked ?? MIN_MAX_MESSAGE_BYTES, MIN_MAX_MESSAGE_BYTES);
  return Math.min(ip - IP_AND_UDP_BYTES, MAX_PACKET_BYTES);
}

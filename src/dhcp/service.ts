import {
  type DhcpPacket,
  DhcpPacketError,
  decode,
  Option,
  readU8,
} from '../../packages/dhcp-packet/src/index.js';
import { SnowflockError } from '../common/errors.js';
import { GATEWAY, macBytes, VMID_GATEWAY, wireMac } from '../network/addresses.js';
import { FramePort } from '../network/frame-port.js';
import { native, netback } from '../network/native.js';
import {
  type DhcpCounters,
  type DropReason,
  newCounters,
  type ReceivedType,
  receivedType,
} from './counters.js';
import { parseClientFrame, serverFrame } from './frame.js';
import {
  type ClientState,
  type DhcpIdentity,
  DhcpMachine,
  type DhcpOutcome,
  type DhcpReply,
  type DhcpState,
} from './server.js';

const EVERYBODY = { mac: new Uint8Array(6).fill(0xff), address: '255.255.255.255' };
/** A client sends a handful of packets in a life; more than this is a flood and is not read. */
const FRAMES_PER_SECOND = 10;
const BURST = 20;
const RECEIVE_BYTES = 64 * 1024;

const keyOf = (hardwareAddress: Uint8Array) => String.fromCharCode(...hardwareAddress);

export type DhcpEvent = DhcpOutcome['kind'] | 'malformed' | 'lost';

/** What became of a packet, and what it was. */
interface Handled {
  event: DhcpEvent;
  clientState?: ClientState | undefined;
  type?: ReceivedType | undefined;
  dropped?: DropReason;
}

export interface DhcpServiceOptions {
  /** Name of the VM's interface, in this process's network namespace. */
  tap: string;
  /** For the gateway's MAC address, from which the server speaks. */
  family: number;
  identity: DhcpIdentity;
  /** Answer relayed packets, which come from the relay's MAC address. For tests. Default false. */
  relay?: boolean;
  /** Counted in as well, beside the service's own counters: those of all VMs of a host. */
  totals?: DhcpCounters;
  /** For benches: VMs that are asked for through relays, and as many packets as there are. */
  load?: { others: readonly DhcpIdentity[]; receiveBytes: number };
  /** After each packet (its answer is out): what became of it, and the state of a REQUEST. */
  onEvent?: (event: DhcpEvent, clientState?: ClientState) => void;
  /** The interface has gone; the service is stopped. */
  onEnd?: (error: SnowflockError) => void;
}

/**
 * Answers the DHCP client of one VM: a packet socket on its tap, which sees the client's packets
 * before the filter drops them, and a machine. Start it before the VM runs.
 */
export class DhcpService {
  readonly #machine: DhcpMachine;
  /** By hardware address; empty but under `load`. */
  readonly #others = new Map<string, DhcpMachine>();
  /** From which the server speaks. */
  readonly #mac: Uint8Array;
  #guestKey: string;
  readonly #port: FramePort;
  readonly #options: DhcpServiceOptions;
  readonly #counts = new Map<DhcpEvent, number>();
  readonly #counters: readonly DhcpCounters[];
  readonly #own = newCounters();
  readonly #requests = new Map<ClientState, number>();
  readonly #watchers = new Set<(event: DhcpEvent) => void>();

  /** E_NOT_FOUND (interface), E_NETWORK. */
  constructor(options: DhcpServiceOptions) {
    this.#options = options;
    const { onEnd, load, totals, relay = false } = options;
    this.#counters = totals === undefined ? [this.#own] : [this.#own, totals];
    this.#machine = new DhcpMachine(options.identity, { relay });
    this.#guestKey = keyOf(macBytes(options.identity.guestMac));
    this.#mac = macBytes(wireMac({ family: options.family, vmid: VMID_GATEWAY }));
    for (const other of load?.others ?? []) {
      this.#others.set(keyOf(macBytes(other.guestMac)), new DhcpMachine(other, { relay }));
    }
    const receiveBytes = load?.receiveBytes ?? RECEIVE_BYTES;
    this.#port = new FramePort(
      native(() => netback().openDhcpSocket(options.tap, relay, receiveBytes)),
      { onFrame: (frame) => this.#receive(frame), ...(onEnd === undefined ? {} : { onEnd }) },
      { maxFrameBytes: 1514, framesPerSecond: load ? 0 : FRAMES_PER_SECOND, burst: BURST },
    );
  }

  get state(): DhcpState {
    return this.#machine.state(Date.now());
  }

  get identity(): DhcpIdentity {
    return this.#machine.identity;
  }

  setIdentity(identity: DhcpIdentity): void {
    this.#machine.setIdentity(identity);
    this.#guestKey = keyOf(macBytes(identity.guestMac));
  }

  /** Packets by what became of them. */
  stats(): Partial<Record<DhcpEvent, number>> {
    return Object.fromEntries(this.#counts);
  }

  /** REQUESTs answered (ACK or NAK) by the state the client sent them in. */
  requestStats(): Partial<Record<ClientState, number>> {
    return Object.fromEntries(this.#requests);
  }

  /** Packets in and out by type, and those without effect by reason, so far. */
  counters(): DhcpCounters {
    this.#countFlood();
    return structuredClone(this.#own);
  }

  /** Calls back after each packet until the returned function is called. */
  watch(watcher: (event: DhcpEvent) => void): () => void {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  stop(): void {
    this.#countFlood();
    this.#port.close();
  }

  #countFlood(): void {
    const lost = this.#port.lost();
    for (const one of this.#counters) one.dropped.flood += lost;
  }

  #receive(frame: Buffer): void {
    const { event, clientState, type, dropped } = this.#handle(frame);
    this.#counts.set(event, (this.#counts.get(event) ?? 0) + 1);
    if (clientState !== undefined) {
      this.#requests.set(clientState, (this.#requests.get(clientState) ?? 0) + 1);
    }
    for (const one of this.#counters) {
      if (type !== undefined) one.received[type]++;
      if (dropped !== undefined) one.dropped[dropped]++;
      if (event === 'offer' || event === 'ack' || event === 'nak') one.sent[event]++;
    }
    this.#options.onEvent?.(event, clientState);
    for (const watcher of this.#watchers) watcher(event);
  }

  #handle(frame: Buffer): Handled {
    const datagram = parseClientFrame(frame);
    if (datagram === undefined) return { event: 'malformed', dropped: 'malformed' };
    const foreign = keyOf(datagram.sourceMac) !== this.#guestKey;
    if (foreign && this.#options.relay !== true) {
      return { event: 'ignored', dropped: 'foreign_mac' };
    }
    let packet: DhcpPacket;
    let type: ReceivedType | undefined;
    let outcome: DhcpOutcome;
    try {
      packet = decode(datagram.payload);
      type = receivedType(readU8(packet.options, Option.MESSAGE_TYPE));
      const machine =
        (this.#others.size > 0 ? this.#others.get(keyOf(packet.hardwareAddress)) : undefined) ??
        this.#machine;
      outcome = machine.handle(packet, Date.now(), datagram.unicast);
    } catch (error) {
      if (error instanceof DhcpPacketError) return { event: 'malformed', dropped: 'malformed' };
      throw error;
    }
    if (outcome.kind === 'ignored') return { event: 'ignored', type, dropped: outcome.reason };
    if (!('reply' in outcome)) return { event: outcome.kind, type };
    const sent = this.#send(outcome.reply, datagram.sourceMac);
    if (!sent) return { event: 'lost', type, dropped: 'not_sent' };
    return { event: outcome.kind, clientState: outcome.clientState, type };
  }

  #send(reply: DhcpReply, to: Uint8Array): boolean {
    const bytes = serverFrame({
      sourceMac: this.#mac,
      destinationMac: reply.broadcast ? EVERYBODY.mac : to,
      source: GATEWAY,
      destination: reply.broadcast ? EVERYBODY.address : reply.address,
      port: reply.port,
      payload: reply.bytes,
    });
    try {
      return this.#port.send(bytes);
    } catch (error) {
      // The interface is down or about to go: the client asks again, or the port ends.
      if (error instanceof SnowflockError && error.code === 'E_NETWORK') return false;
      throw error;
    }
  }
}

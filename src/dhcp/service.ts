import { DhcpPacketError, decode } from '../../packages/dhcp-packet/src/index.js';
import { SnowflockError } from '../common/errors.js';
import { GATEWAY, VMID_GATEWAY, wireMac } from '../network/addresses.js';
import { FramePort } from '../network/frame-port.js';
import { native, netback } from '../network/native.js';
import { parseClientFrame, serverFrame } from './frame.js';
import {
  type ClientState,
  type DhcpIdentity,
  DhcpMachine,
  type DhcpOutcome,
  type DhcpState,
} from './server.js';

const EVERYBODY = { mac: 'ff:ff:ff:ff:ff:ff', address: '255.255.255.255' };
/** A client sends a handful of packets in a life; more than this is a flood and is not read. */
const FRAMES_PER_SECOND = 10;
const BURST = 20;

export type DhcpEvent = DhcpOutcome['kind'] | 'malformed' | 'lost';

export interface DhcpServiceOptions {
  /** Name of the VM's interface, in this process's network namespace. */
  tap: string;
  /** For the gateway's MAC address, from which the server speaks. */
  family: number;
  identity: DhcpIdentity;
  /** Answer relayed packets, which come from the relay's MAC address. For tests. Default false. */
  relay?: boolean;
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
  readonly #port: FramePort;
  readonly #options: DhcpServiceOptions;
  readonly #counts = new Map<DhcpEvent, number>();
  readonly #requests = new Map<ClientState, number>();
  readonly #watchers = new Set<(event: DhcpEvent) => void>();

  /** E_NOT_FOUND (interface), E_NETWORK. */
  constructor(options: DhcpServiceOptions) {
    this.#options = options;
    this.#machine = new DhcpMachine(options.identity, { relay: options.relay ?? false });
    const onEnd = options.onEnd;
    this.#port = new FramePort(
      native(() => netback().openDhcpSocket(options.tap, options.relay ?? false)),
      { onFrame: (frame) => this.#receive(frame), ...(onEnd === undefined ? {} : { onEnd }) },
      { maxFrameBytes: 1514, framesPerSecond: FRAMES_PER_SECOND, burst: BURST },
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
  }

  /** Packets by what became of them. */
  stats(): Partial<Record<DhcpEvent, number>> {
    return Object.fromEntries(this.#counts);
  }

  /** REQUESTs answered (ACK or NAK) by the state the client sent them in. */
  requestStats(): Partial<Record<ClientState, number>> {
    return Object.fromEntries(this.#requests);
  }

  /** Calls back after each packet until the returned function is called. */
  watch(watcher: (event: DhcpEvent) => void): () => void {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  stop(): void {
    this.#port.close();
  }

  #receive(frame: Buffer): void {
    const [event, clientState] = this.#answer(frame);
    this.#counts.set(event, (this.#counts.get(event) ?? 0) + 1);
    if (clientState !== undefined) {
      this.#requests.set(clientState, (this.#requests.get(clientState) ?? 0) + 1);
    }
    this.#options.onEvent?.(event, clientState);
    for (const watcher of this.#watchers) watcher(event);
  }

  #answer(frame: Buffer): [event: DhcpEvent, clientState?: ClientState | undefined] {
    const { guestMac } = this.#machine.identity;
    const datagram = parseClientFrame(frame);
    if (datagram === undefined) return ['malformed'];
    if (datagram.sourceMac !== guestMac && this.#options.relay !== true) return ['ignored'];
    let outcome: DhcpOutcome;
    try {
      outcome = this.#machine.handle(decode(datagram.payload), Date.now(), datagram.unicast);
    } catch (error) {
      if (error instanceof DhcpPacketError) return ['malformed'];
      throw error;
    }
    if (!('reply' in outcome)) return [outcome.kind];
    const { reply } = outcome;
    const bytes = serverFrame({
      sourceMac: wireMac({ family: this.#options.family, vmid: VMID_GATEWAY }),
      destinationMac: reply.broadcast ? EVERYBODY.mac : datagram.sourceMac,
      source: GATEWAY,
      destination: reply.broadcast ? EVERYBODY.address : reply.address,
      port: reply.port,
      payload: reply.bytes,
    });
    try {
      return this.#port.send(bytes) ? [outcome.kind, outcome.clientState] : ['lost'];
    } catch (error) {
      // The interface is down or about to go: the client asks again, or the port ends.
      if (error instanceof SnowflockError && error.code === 'E_NETWORK') return ['lost'];
      throw error;
    }
  }
}

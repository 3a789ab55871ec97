/**
 * TCP connections of one VM whose guest takes its address from DHCP alone: which there are, and
 * their end in a clone (paper, section 3.7: a clone's connections are not its own).
 *
 * In a clone the guest goes on with its parent's connections under an address that it no longer has.
 * The filter drops what it sends on them. So that its programs learn it at once:
 *  - each segment with another source address than the VM's is answered with a reset, as if its peer
 *    had sent it (RFC 9293, 3.10.7.1);
 *  - `reset` looks for connections on which nothing is sent: a SYN from the peer, which the guest
 *    answers with a challenge ACK (RFC 5961, 4), which says the number that a reset must have. An ARP
 *    request from the peer goes before, so that the guest can send the answer: its own ARP would say
 *    the old address, which the filter does not answer.
 * The guest must still have the old address then: later its kernel takes nothing for it any more.
 *
 * Which connections there are is known from what the guest sends: SYN begins, FIN and RST end one.
 * Peers see nothing of all this: frames go to this VM's interface alone.
 *
 * Bounds: MAX_CONNECTIONS known, the oldest is forgotten for a new one; SEGMENTS_PER_SECOND reach
 * this code, the rest waits in a bounded kernel buffer or is lost. So of a guest that opens
 * connections faster than that some are not found, and end when it next sends something on them.
 * Left out on purpose: connections half closed by the guest, those open before this process began,
 * and UDP, which has nothing to end.
 */
import { randomBytes } from 'node:crypto';
import { GATEWAY, GUEST_MAC, ipNumber, VMID_GATEWAY, vmidOfAddress, wireMac } from './addresses.js';
import { arpRequest, isArpReply } from './arp.js';
import { FramePort } from './frame-port.js';
import { native, netback } from './native.js';
import { ACK, FIN, parseSegment, RST, type Segment, SYN, segmentFrame } from './tcp-segment.js';

export const MAX_CONNECTIONS = 4096;
const SEGMENTS_PER_SECOND = 2000;
const BURST = 4096;
/** Probes under way at a time: their answers fit the kernel's buffer. */
const BATCH = 128;

/** A connection as the guest sees it. */
export interface Connection {
  /** IPv4 in dotted form. */
  peer: string;
  peer_port: number;
  /** The guest's. */
  port: number;
}

/** What became of connections that were to be reset. */
export interface ResetReport {
  reset: number;
  /** The guest did not answer: it has no such connection, or was too slow. */
  unanswered: number;
}

export interface TcpGuardOptions {
  /** Name of the VM's interface, in this process's network namespace. */
  tap: string;
  family: number;
  /** The VM's own, IPv4 in dotted form. */
  address: string;
}

const keyOf = ({ peer, peer_port, port }: Connection) => `${peer}:${peer_port}-${port}`;

export class TcpGuard {
  readonly #options: TcpGuardOptions;
  readonly #port: FramePort;
  /** In the order in which they began. */
  readonly #connections = new Map<string, Connection>();
  #answered: (key: string) => void = () => {};
  #replied: () => void = () => {};
  #resets = 0;

  /** E_NOT_FOUND (interface), E_NETWORK. */
  constructor(options: TcpGuardOptions) {
    this.#options = options;
    this.#port = new FramePort(
      native(() => netback().openTcpSocket(options.tap, ipNumber(options.address))),
      { onFrame: (frame) => this.#receive(frame) },
      { maxFrameBytes: 256, framesPerSecond: SEGMENTS_PER_SECOND, burst: BURST },
    );
  }

  /** What the guest has open, the oldest first. */
  connections(): Connection[] {
    return [...this.#connections.values()];
  }

  /** Resets sent. */
  get resets(): number {
    return this.#resets;
  }

  /**
   * Ends connections that the guest inherited with the address `of`. Resolves when it has answered for
   * all, or after `limitMs`.
   */
  async reset(inherited: readonly Connection[], of: string, limitMs: number): Promise<ResetReport> {
    const open = new Map(inherited.map((one) => [keyOf(one), one]));
    const waiting = [...open];
    const before = open.size;
    if (before === 0) return { reset: 0, unanswered: 0 };
    let underWay = 0;
    await new Promise<void>((resolve) => {
      const limit = setTimeout(resolve, limitMs);
      const more = () => {
        while (underWay < BATCH) {
          const next = waiting.shift();
          if (next === undefined) break;
          underWay++;
          this.#probe(next[1], of);
        }
      };
      this.#answered = (key) => {
        if (!open.delete(key)) return;
        underWay--;
        if (open.size > 0) return more();
        clearTimeout(limit);
        resolve();
      };
      more();
    });
    this.#answered = () => {};
    return { reset: before - open.size, unanswered: open.size };
  }

  /**
   * Milliseconds until the guest answers ARP for the address `of`; undefined beyond `limitMs`. All
   * frames sent before have been taken then, unless probes are under way.
   */
  async ping(of: string, limitMs: number): Promise<number | undefined> {
    const began = performance.now();
    const answered = await new Promise<boolean>((resolve) => {
      const limit = setTimeout(() => resolve(false), limitMs);
      this.#replied = () => {
        clearTimeout(limit);
        resolve(true);
      };
      this.#arp(GATEWAY, of);
    });
    this.#replied = () => {};
    return answered ? performance.now() - began : undefined;
  }

  close(): void {
    this.#port.close();
  }

  #macOf(address: string): string {
    return wireMac({
      family: this.#options.family,
      vmid: vmidOfAddress(address) ?? VMID_GATEWAY,
    });
  }

  #arp(sender: string, target: string): void {
    const senderMac = this.#macOf(sender);
    this.#write(arpRequest({ destinationMac: GUEST_MAC, senderMac, sender, target }));
  }

  #probe(connection: Connection, of: string): void {
    // What is outside of the family's network is behind the gateway.
    this.#arp(vmidOfAddress(connection.peer) === undefined ? GATEWAY : connection.peer, of);
    this.#send({
      sourceMac: this.#macOf(connection.peer),
      destinationMac: GUEST_MAC,
      source: connection.peer,
      destination: of,
      sourcePort: connection.peer_port,
      destinationPort: connection.port,
      sequence: randomBytes(4).readUInt32BE(),
      acknowledgement: 0,
      flags: SYN,
    });
  }

  #receive(frame: Buffer): void {
    if (isArpReply(frame)) {
      this.#replied();
      return;
    }
    const segment = parseSegment(frame);
    if (segment === undefined || segment.sourceMac !== GUEST_MAC) return;
    const connection = {
      peer: segment.destination,
      peer_port: segment.destinationPort,
      port: segment.sourcePort,
    };
    const key = keyOf(connection);
    if (segment.source !== this.#options.address) {
      // It says itself that there is no such connection.
      if ((segment.flags & RST) === 0) this.#refuse(segment);
      this.#answered(key);
    } else if ((segment.flags & (FIN | RST)) !== 0) {
      this.#connections.delete(key);
    } else {
      this.#connections.delete(key);
      this.#connections.set(key, connection);
      if (this.#connections.size > MAX_CONNECTIONS) {
        for (const oldest of this.#connections.keys()) {
          this.#connections.delete(oldest);
          break;
        }
      }
    }
  }

  #refuse(segment: Segment): void {
    const spoken = (segment.flags & ACK) !== 0;
    const length = segment.bytes + (segment.flags & SYN ? 1 : 0) + (segment.flags & FIN ? 1 : 0);
    this.#resets++;
    this.#send({
      sourceMac: segment.destinationMac,
      destinationMac: GUEST_MAC,
      source: segment.destination,
      destination: segment.source,
      sourcePort: segment.destinationPort,
      destinationPort: segment.sourcePort,
      sequence: spoken ? segment.acknowledgement : 0,
      acknowledgement: spoken ? 0 : (segment.sequence + length) % 2 ** 32,
      flags: spoken ? RST : RST | ACK,
    });
  }

  #send(segment: Omit<Segment, 'bytes'>): void {
    this.#write(segmentFrame(segment));
  }

  /** A frame may always be lost: the guest sends again, and a probe stays unanswered. */
  #write(frame: Buffer): void {
    try {
      this.#port.send(frame);
    } catch (error) {
      const { code } = error as { code?: string };
      if (code !== 'E_NETWORK' && code !== 'E_CLOSED') throw error;
    }
  }
}

import { randomBytes } from 'node:crypto';
import { createSocket, type Socket } from 'node:dgram';

export interface Group {
  /** 239.195.0.0/16, administratively scoped (RFC 2365). */
  readonly group: string;
  /** 16384 to 32767, below the ephemeral ones. */
  readonly port: number;
}

/** Of 30 random bits. */
export function groupOf(random: Buffer): Group {
  return {
    group: `239.195.${random.readUInt8(0)}.${random.readUInt8(1)}`,
    port: 16384 + (random.readUInt16BE(2) & 0x3fff),
  };
}

/** Not listened to; see GroupReserve for generations that others share a network with. */
export function randomGroup(): Group {
  return groupOf(randomBytes(4));
}

interface Candidate extends Group {
  readonly socket: Socket;
  /** Of performance.now(). */
  listeningSince: number | null;
}

const nameOf = ({ group, port }: Group): string => `${group}:${port}`;

/**
 * Groups for the generations to come, listened to before they are used. A few candidates are
 * members all the time (so that switches with IGMP snooping pass their packets on to us); one on
 * which anything is heard is somebody else's and is replaced. So a fork takes a group that was
 * quiet since the fork before, and waits for nothing. Once taken it is not listened to any more: the
 * server would hear itself. Two that meet in a group later cost their clients the look at a packet's
 * header, never a byte: packets are told apart by generation and key.
 */
export class GroupReserve {
  readonly #candidates = new Set<Candidate>();
  readonly #used = new Set<string>();
  #busy = 0;
  #failures = 0;
  #closed = false;

  constructor(
    readonly options: {
      /** The IPv4 address of the interface that multicast leaves by. */
      readonly interfaceAddress: string;
      /** Candidates at a time; default 4, two forks' worth. */
      readonly size?: number;
      /** For tests: where candidates come from. */
      readonly candidate?: () => Group;
    },
  ) {
    this.#fill();
  }

  #random(): Group {
    let group = this.options.candidate?.() ?? randomGroup();
    // Of 2^30 hardly ever the first is taken; bounded, since one used twice is no harm.
    for (let tries = 0; tries < 64; tries++) {
      const name = nameOf(group);
      const known = [...this.#candidates].some((candidate) => nameOf(candidate) === name);
      if (!known && !this.#used.has(name)) break;
      group = this.options.candidate?.() ?? randomGroup();
    }
    return group;
  }

  #fill(): void {
    while (!this.#closed && this.#candidates.size < (this.options.size ?? 4)) {
      const socket = createSocket({ type: 'udp4', reuseAddr: true });
      const candidate: Candidate = { ...this.#random(), socket, listeningSince: null };
      this.#candidates.add(candidate);
      socket.unref();
      socket.once('message', () => {
        this.#busy++;
        this.#drop(candidate);
        this.#fill();
      });
      // The interface is gone, or there is no room for sockets: a group can be had all the same,
      // only not listened to. Tried again with the next group that is taken.
      socket.on('error', () => {
        this.#failures++;
        this.#drop(candidate);
      });
      socket.bind(candidate.port, candidate.group, () => {
        try {
          socket.addMembership(candidate.group, this.options.interfaceAddress);
          candidate.listeningSince = performance.now();
        } catch {
          this.#failures++;
          this.#drop(candidate);
        }
      });
    }
  }

  #drop(candidate: Candidate): void {
    if (!this.#candidates.delete(candidate)) return;
    candidate.socket.close();
  }

  /** A group nobody was heard on, and that nothing taken from here uses. */
  take(): Group {
    // The first is the one listened to longest.
    for (const candidate of this.#candidates) {
      if (candidate.listeningSince === null) continue;
      this.#drop(candidate);
      const { group, port } = candidate;
      this.#used.add(nameOf(candidate));
      this.#fill();
      return { group, port };
    }
    const fresh = this.#random();
    this.#used.add(nameOf(fresh));
    this.#fill();
    return fresh;
  }

  /** A group that was taken by an earlier process, for what is served again now. */
  adopt(group: Group): void {
    this.#used.add(nameOf(group));
    for (const candidate of this.#candidates) {
      if (nameOf(candidate) === nameOf(group)) this.#drop(candidate);
    }
    this.#fill();
  }

  /** The generation is served no more. */
  release(group: Group): void {
    this.#used.delete(nameOf(group));
  }

  /**
   * As `take()`, of a group that was listened to for `listenMs` at least. If none can be listened
   * to within a second, one that was not.
   */
  async takeQuiet(listenMs: number): Promise<Group> {
    const limit = performance.now() + 1000;
    const quiet = (): boolean => {
      for (const { listeningSince } of this.#candidates) {
        if (listeningSince !== null && performance.now() - listeningSince >= listenMs) return true;
      }
      return false;
    };
    while (!quiet() && performance.now() < limit) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return this.take();
  }

  /** `busy`: candidates given up since packets came; `failures`: that could not be listened to. */
  stats(): { listening: number; used: number; busy: number; failures: number } {
    const listening = [...this.#candidates].filter(
      ({ listeningSince }) => listeningSince !== null,
    ).length;
    return { listening, used: this.#used.size, busy: this.#busy, failures: this.#failures };
  }

  close(): void {
    this.#closed = true;
    for (const candidate of [...this.#candidates]) this.#drop(candidate);
  }
}

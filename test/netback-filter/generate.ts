/**
 * Frames for comparing the filter with its policy: mostly right, with one or more things wrong, since
 * frames that are random all through end at the first rule. One generator of numbers, a seed.
 */
import type { PolicyVm } from '../../src/netback-filter/policy.js';

/** xorshift32: the same frames for the same seed, anywhere. */
export class Random {
  #state: number;
  constructor(seed: number) {
    this.#state = seed >>> 0 || 1;
  }
  /** 0 to `below` - 1. */
  below(below: number): number {
    let x = this.#state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#state = x >>> 0;
    return this.#state % below;
  }
  chance(of: number): boolean {
    return this.below(of) === 0;
  }
  pick<T>(from: readonly T[]): T {
    const one = from[this.below(from.length)];
    if (one === undefined) throw new Error('nothing to pick from');
    return one;
  }
}

const BROADCAST = 0xffff_ffff_ffff;
const NETWORK = 0x0a56_0000;
const WIRE = 0x5e * 2 ** 40;
const GATEWAY = 0xffff;

export class FrameGenerator {
  readonly #random: Random;
  constructor(
    seed: number,
    readonly vms: readonly PolicyVm[],
    readonly payloads: readonly number[] = [0, 1, 7, 8, 9, 26, 64, 200, 1480, 3400],
  ) {
    this.#random = new Random(seed);
  }

  /** A MAC address that some rule looks for. */
  #mac(near: PolicyVm): number {
    const random = this.#random;
    const family = near.wireMac - (near.wireMac % 2 ** 16);
    switch (random.below(9)) {
      case 0:
        return BROADCAST;
      case 1:
        return 0x0100_5e00_0001; // multicast
      case 2:
        return near.guestMac;
      case 3:
        return near.wireMac;
      case 4:
        return family + random.pick([0, 1, 2, 3, 0x10, 0xfffc, 0xfffd, 0xfffe, 0xffff]);
      case 5:
        return WIRE + random.below(4) * 2 ** 16 + random.below(8);
      case 6:
        return random.below(2 ** 16) * 2 ** 32 + random.below(2 ** 31);
      default:
        return random.pick(this.vms).wireMac;
    }
  }

  #ip(near: PolicyVm): number {
    const random = this.#random;
    switch (random.below(7)) {
      case 0:
        return near.ip;
      case 1:
        return NETWORK + random.pick([0, 1, 2, 3, 0xfffd, 0xfffe, 0xffff]);
      case 2:
        return random.pick([0, 0xffff_ffff, 0xe000_0001, 0x7f00_0001, 0x0a57_0002]);
      case 3:
        return random.below(2 ** 31) * 2;
      default:
        return random.pick(this.vms).ip;
    }
  }

  /** From `near`'s guest, to another VM of its family, right. */
  #right(near: PolicyVm, outward: boolean): Buffer {
    const random = this.#random;
    const payloadBytes = random.pick(this.payloads);
    const vmid = random.pick([0, 1, 2, 3, 4, 5, 77, 0xfffc, GATEWAY]);
    const other = near.wireMac - (near.wireMac % 2 ** 16) + vmid;
    const beyond = () => random.pick([0x0808_0808, 0xc0a8_0101, 0x0a55_ffff, NETWORK + 1]);
    const otherIp = vmid === GATEWAY ? beyond() : NETWORK + 2 + vmid;
    const ownIp = near.wireMac % 2 ** 16 === GATEWAY ? beyond() : near.ip;
    const frame = Buffer.alloc(14 + 20 + payloadBytes);
    frame.writeUIntBE(outward ? other : near.wireMac, 0, 6);
    frame.writeUIntBE(outward ? near.guestMac : other, 6, 6);
    frame.writeUInt16BE(0x0800, 12);
    frame.writeUInt8(0x45, 14);
    frame.writeUInt16BE(20 + payloadBytes, 16);
    frame.writeUInt16BE(random.pick([0, 0, 0, 0x4000, 0x2000, 0x0001, 0x2005, 0x1fff]), 20);
    frame.writeUInt8(random.pick([1, 6, 6, 17, 17, 253]), 23);
    frame.writeUInt32BE(outward ? ownIp : otherIp, 26);
    frame.writeUInt32BE(outward ? otherIp : ownIp, 30);
    if (payloadBytes >= 4) {
      frame.writeUInt16BE(random.pick([67, 68, 53, 1024]), 34);
      frame.writeUInt16BE(random.pick([67, 68, 53, 1024]), 36);
    }
    return frame;
  }

  #arp(near: PolicyVm): Buffer {
    const random = this.#random;
    const frame = Buffer.alloc(random.pick([42, 42, 42, 60, 41, 28]));
    const put = Buffer.alloc(60);
    put.writeUIntBE(random.chance(3) ? this.#mac(near) : BROADCAST, 0, 6);
    put.writeUIntBE(near.guestMac, 6, 6);
    put.writeUInt16BE(0x0806, 12);
    put.set([0, 1, 8, 0, 6, 4], 14);
    put.writeUInt16BE(random.pick([1, 1, 1, 1, 2, 3, 0]), 20);
    put.writeUIntBE(random.chance(6) ? this.#mac(near) : near.guestMac, 22, 6);
    put.writeUInt32BE(random.pick([near.ip, near.ip, 0, this.#ip(near)]), 28);
    put.writeUIntBE(random.chance(2) ? 0 : this.#mac(near), 32, 6);
    put.writeUInt32BE(this.#ip(near), 38);
    put.copy(frame);
    return frame;
  }

  #spoil(frame: Buffer, near: PolicyVm): Buffer {
    const random = this.#random;
    switch (random.below(12)) {
      case 0:
        frame.writeUIntBE(this.#mac(near), 0, 6);
        break;
      case 1:
        frame.writeUIntBE(this.#mac(near), 6, 6);
        break;
      case 2:
        frame.writeUInt16BE(
          random.pick([0x86dd, 0x8100, 0x88a8, 0x8847, 0x0806, 0x88cc, 0x0000, 0x05dc]),
          12,
        );
        break;
      case 3:
        if (frame.length > 14) frame.writeUInt8(random.below(256), 14); // version and length
        break;
      case 4:
        if (frame.length >= 18) {
          frame.writeUInt16BE(random.pick([0, 19, 20, 27, 28, frame.length, 0xffff]), 16);
        }
        break;
      case 5:
        if (frame.length >= 30) frame.writeUInt32BE(this.#ip(near), 26);
        break;
      case 6:
        if (frame.length >= 34) frame.writeUInt32BE(this.#ip(near), 30);
        break;
      case 7:
        return frame.subarray(0, 14 + random.below(frame.length - 13));
      case 8: {
        // IPv4 options, the lengths kept right.
        if (frame.length < 34) break;
        const words = 1 + random.below(10);
        const options = Buffer.alloc(words * 4, 1);
        const out = Buffer.concat([frame.subarray(0, 34), options, frame.subarray(34)]);
        out.writeUInt8(0x45 + words, 14);
        out.writeUInt16BE(out.length - 14, 16);
        return out;
      }
      case 9: {
        // A tag in the frame, as the wire has it.
        const tag = Buffer.from([random.pick([0x81, 0x88]), 0, 0, random.below(256)]);
        if (tag[0] === 0x88) tag[1] = 0xa8;
        return Buffer.concat([frame.subarray(0, 12), tag, frame.subarray(12)]);
      }
      case 10: {
        const at = random.below(frame.length);
        frame.writeUInt8(random.below(256), at);
        break;
      }
      default:
        // Padding behind the packet, as short frames have it.
        return Buffer.concat([frame, Buffer.alloc(1 + random.below(60))]);
    }
    return frame;
  }

  /** BPF_PROG_TEST_RUN refuses IP frames that end within the header. */
  #runs(frame: Buffer): boolean {
    const type = frame.readUInt16BE(12);
    return type === 0x0800 ? frame.length >= 34 : type !== 0x86dd || frame.length >= 54;
  }

  next(outward: boolean): { ifindex: number; frame: Buffer } {
    for (;;) {
      const made = this.#make(outward);
      if (this.#runs(made.frame)) return made;
    }
  }

  #make(outward: boolean): { ifindex: number; frame: Buffer } {
    const random = this.#random;
    const near = random.pick(this.vms);
    let frame = outward && random.chance(4) ? this.#arp(near) : this.#right(near, outward);
    for (let faults = random.pick([0, 1, 1, 1, 2, 3]); faults > 0; faults--) {
      frame = this.#spoil(frame, near);
    }
    return { ifindex: near.ifindex, frame };
  }
}

/**
 * Nanoseconds per packet in the netback filter, by BPF_PROG_TEST_RUN, with few and with many VMs
 * known to the host. The kernel runs a program again and again on one frame, so the guests' MAC
 * addresses here are their wire MACs: rewriting, done in full, leaves the frame as it was.
 */
import { execFileSync } from 'node:child_process';
import { nativePath } from '../../src/common/native.js';
import {
  addressOfVmid,
  ipNumber,
  macBytes,
  macNumber,
  type Place,
  wireMac,
} from '../../src/network/addresses.js';
import { type NativeFilter, netback } from '../../src/network/native.js';
import { inNetns } from '../../src/network/tap.js';

export interface PacketTime {
  readonly path: string;
  /** VMs that the filter knows besides the sender. */
  readonly known: number;
  /** Median of the rounds, one CPU. */
  readonly packet_ns: number;
}

const REDIRECT = 7;
const SHOT = 2;
const UNSPEC = 0xffffffff;
const LOOPBACK = 1; // the interface test runs are on
const FAMILY = 1;
const TCP = 6;

function frame(from: string, to: string, source: string, destination: string): Uint8Array {
  const bytes = Buffer.alloc(1514);
  bytes.set(macBytes(to), 0);
  bytes.set(macBytes(from), 6);
  bytes.writeUInt16BE(0x0800, 12);
  bytes[14] = 0x45;
  bytes.writeUInt16BE(1500, 16);
  bytes[22] = 64;
  bytes[23] = TCP;
  bytes.writeUInt32BE(ipNumber(source), 26);
  bytes.writeUInt32BE(ipNumber(destination), 30);
  return bytes;
}

function between(from: Place, to: Place): Uint8Array {
  return frame(wireMac(from), wireMac(to), addressOfVmid(from.vmid), addressOfVmid(to.vmid));
}

function identity(place: Place) {
  const mac = macNumber(wireMac(place));
  return { tap: 'bench', wireMac: mac, guestMac: mac, ip: ipNumber(addressOfVmid(place.vmid)) };
}

/** Needs root. Makes and removes a namespace of its own. */
export async function packetTimes(options: {
  quick: boolean;
  known: readonly number[];
}): Promise<PacketTime[]> {
  const name = `sfbench${process.pid}`;
  const repeat = options.quick ? 100_000 : 1_000_000;
  const rounds = options.quick ? 3 : 9;
  execFileSync('ip', ['netns', 'add', name]);
  try {
    const link = 'link add eth0 address 02:00:00:00:00:01 type veth peer name peer';
    execFileSync('ip', ['-n', name, ...link.split(' ')]);
    const path = `/run/netns/${name}`;
    const filter = await inNetns(path, () => netback().attach(nativePath('netback.bpf.o'), 'eth0'));
    try {
      return inNetns(path, () => options.known.flatMap((known) => measure(filter, known)));
    } finally {
      filter.close();
    }
  } finally {
    execFileSync('ip', ['netns', 'del', name]);
  }

  function measure(filter: NativeFilter, known: number): PacketTime[] {
    // vmid 0 sends; vmids 1 to `known` are here too; the VM after them is on another host.
    const [self, local, remote] = [0, 1, known + 1].map((vmid) => ({ family: FAMILY, vmid }));
    if (self === undefined || local === undefined || remote === undefined) return [];
    filter.putIdentity(LOOPBACK, identity(self));
    for (let vmid = 1; vmid <= known; vmid++) {
      filter.putIdentity(1000 + vmid, identity({ family: FAMILY, vmid }));
    }
    const host = frame('02:00:00:00:00:02', '02:00:00:00:00:01', '192.0.2.2', '192.0.2.1');
    const cases = [
      ['guest to VM of this host', 'from_guest', between(self, local), REDIRECT],
      ['guest to VM elsewhere', 'from_guest', between(self, remote), REDIRECT],
      ['guest to other family, drop', 'from_guest', between(self, { family: 2, vmid: 1 }), SHOT],
      ['wire to guest', 'from_wire', between(remote, local), REDIRECT],
      ["wire, the host's own traffic", 'from_wire', host, UNSPEC],
    ] as const;
    return cases.map(([path, program, bytes, verdict]) => {
      const times = Array.from({ length: rounds }, () => {
        const run = filter.run(program, bytes, LOOPBACK, 0, repeat);
        if (run.verdict !== verdict) throw new Error(`${path}: verdict ${run.verdict}`);
        return run.meanNs;
      }).sort((a, b) => a - b);
      return { path, known, packet_ns: times[rounds >> 1] ?? Number.NaN };
    });
  }
}

/**
 * The filter in the kernel and its policy in TypeScript decide alike: verdict, reason, and every byte
 * of the frame as it leaves. FRAMES makes it longer, SEED repeats.
 */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { nativePath } from '../../src/common/native.js';
import { GATEWAY_MODES } from '../../src/netback-filter/filter.js';
import {
  decide,
  type GatewayMode,
  type Hook,
  PolicyTable,
  type PolicyVm,
} from '../../src/netback-filter/policy.js';
import { REASONS } from '../../src/netback-filter/reasons.js';
import {
  addressOfVmid,
  GATEWAY,
  GUEST_MAC,
  ipNumber,
  macNumber,
  VMID_GATEWAY,
  wireMac,
} from '../../src/network/addresses.js';
import { type NativeFilter, netback } from '../../src/network/native.js';
import { FrameGenerator } from './generate.js';
import { Namespace } from './lab.js';

const FRAMES = Number(process.env.FRAMES ?? 300_000);
const SEED = Number(process.env.SEED ?? randomBytes(4).readUInt32LE());
const BATCH = 2000;
const VERDICTS = new Map([
  [0, 'pass'],
  [2, 'drop'],
  [7, 'redirect'],
  [0xffff_ffff, 'unspec'],
]);
const MARK = 0x5346_4e42;

let netns: Namespace;
let filter: NativeFilter;
const vms: PolicyVm[] = [];

beforeAll(async () => {
  netns = new Namespace(`sfpol${process.pid}`);
  netns.exec(...'ip link add eth0 address 02:00:00:00:00:01 type veth peer name peer'.split(' '));
  filter = await netns.do(() => netback().attach(nativePath('netback.bpf.o'), 'eth0'));
  const places = [
    { family: 1, vmid: 0 },
    { family: 1, vmid: 1 },
    { family: 1, vmid: 2 },
    { family: 2, vmid: 0 },
    { family: 2, vmid: 1 },
    { family: 0xff_ffff, vmid: 0xfffc },
    { family: 1, vmid: VMID_GATEWAY },
  ];
  for (const [i, place] of places.entries()) {
    const link = `ip link add vm${i} address 02:00:00:00:01:0${i} type veth peer name g${i}`;
    netns.exec(...link.split(' '));
    const ifindex = Number(netns.exec('cat', `/sys/class/net/vm${i}/ifindex`));
    const vm = {
      ifindex,
      wireMac: macNumber(wireMac(place)),
      guestMac: macNumber(i === 4 ? '52:54:00:00:00:99' : GUEST_MAC),
      ip: ipNumber(place.vmid === VMID_GATEWAY ? GATEWAY : addressOfVmid(place.vmid)),
    };
    vms.push(vm);
    filter.putIdentity(ifindex, { tap: `vm${i}`, ...vm });
  }
});

afterAll(() => {
  filter?.close();
  netns?.exec('ip', 'netns', 'del', netns.name);
});

interface Outcome {
  verdict: string | undefined;
  frame: Buffer;
}

/** What the kernel does with the frames, and how its counters moved. */
function kernel(hook: Hook, arrivals: readonly { ifindex: number; frame: Buffer }[], mark: number) {
  const frames = Buffer.concat(arrivals.map((it) => it.frame));
  const lengths = Uint32Array.from(arrivals, (it) => it.frame.length);
  const before = filter.stats();
  const verdicts = netns.do(() =>
    filter.runMany(
      hook,
      frames,
      lengths,
      Uint32Array.from(arrivals, (it) => it.ifindex),
      mark,
    ),
  );
  const after = filter.stats();
  let at = 0;
  const outcomes: Outcome[] = arrivals.map(({ frame }, i) => {
    const out = Buffer.from(frames.subarray(at, at + (lengths[i] ?? 0)));
    at += frame.length;
    return { verdict: VERDICTS.get(verdicts[i] ?? -1), frame: out };
  });
  return { outcomes, counted: after.map((count, reason) => count - (before[reason] ?? 0)) };
}

function compare(
  hook: Hook,
  mode: GatewayMode,
  count: number,
  seed: number,
  seen: Map<string, number>,
): void {
  const generator = new FrameGenerator(seed, vms);
  const table = new PolicyTable(vms, mode);
  filter.setGatewayMode(GATEWAY_MODES[mode]);
  for (let done = 0; done < count; done += BATCH) {
    const arrivals = Array.from({ length: BATCH }, () => generator.next(hook === 'from_guest'));
    const { outcomes, counted } = kernel(hook, arrivals, 0);
    const expected = arrivals.map((it) => decide({ hook, ...it }, table));
    const reasons = REASONS.map(() => 0);
    expected.forEach((decision, i) => {
      const { verdict, frame } = outcomes[i] ?? { verdict: undefined, frame: Buffer.alloc(0) };
      if (verdict !== decision.verdict || !frame.equals(decision.frame)) {
        throw new Error(
          `SEED=${seed}, ${hook}, gateways ${mode}, interface ${arrivals[i]?.ifindex}\n` +
            `frame  ${arrivals[i]?.frame.toString('hex')}\n` +
            `policy ${decision.verdict} ${decision.reason} ${Buffer.from(decision.frame).toString('hex')}\n` +
            `kernel ${verdict} ${frame.toString('hex')}`,
        );
      }
      const number = REASONS.findIndex((reason) => reason.name === decision.reason);
      if (number >= 0) reasons[number] = (reasons[number] ?? 0) + 1;
      const name = decision.reason ?? decision.verdict;
      seen.set(name, (seen.get(name) ?? 0) + 1);
    });
    if (!reasons.every((value, number) => value === counted[number])) {
      // Which frame it is: one at a time.
      arrivals.forEach((arrival, i) => {
        const alone = kernel(hook, [arrival], 0);
        const reason = REASONS[alone.counted.findIndex((it) => it > 0)]?.name;
        expect(reason, `SEED=${seed}: ${arrival.frame.toString('hex')}`).toBe(expected[i]?.reason);
      });
      throw new Error(`SEED=${seed}: counters differ over a batch, and for no frame alone`);
    }
  }
}

test.each(['from_guest', 'from_wire'] as const)(
  '%s: generated frames, no difference between the kernel and the policy',
  (hook) => {
    console.log(`SEED=${SEED} FRAMES=${FRAMES}`);
    const seen = new Map<string, number>();
    for (const mode of ['own', 'elsewhere', 'shared'] as const) {
      compare(hook, mode, FRAMES / 3, SEED, seen);
    }
    // The generator reaches every rule that BPF_PROG_TEST_RUN can: it takes no runts, no tags that
    // the kernel has taken off, leaves no sums, and all interfaces here have an identity.
    const fromWire = (name: string) => /^wire_|_from_wire$/.test(name);
    const fromGuest = (name: string) => /^(guest|gateway|arp|dhcp)_/.test(name) && !fromWire(name);
    const reachable = hook === 'from_guest' ? fromGuest : fromWire;
    const unreachable = ['guest_no_identity', 'guest_runt', 'guest_checksum', 'wire_vlan'];
    for (const { name } of REASONS) {
      if (!reachable(name) || unreachable.includes(name)) continue;
      expect(seen.get(name) ?? 0, name).toBeGreaterThan(0);
    }
  },
  600_000,
);

test('into a tap goes only what carries the mark', () => {
  const table = new PolicyTable(vms);
  const generator = new FrameGenerator(SEED, vms);
  const arrivals = Array.from({ length: 100 }, () => generator.next(true));
  for (const marked of [true, false]) {
    const { outcomes, counted } = kernel('to_guest', arrivals, marked ? MARK : 0);
    for (const [i, arrival] of arrivals.entries()) {
      const decision = decide({ hook: 'to_guest', ...arrival, marked }, table);
      expect(outcomes[i]?.verdict).toBe(decision.verdict);
    }
    const dropped = REASONS.findIndex((reason) => reason.name === 'host_into_tap');
    expect(counted[dropped]).toBe(marked ? 0 : arrivals.length);
  }
});

test('without an identity, with a tag taken off, too short: the policy, as the kernel is seen to do', () => {
  // What a test run cannot make; isolation.test.ts sends such frames through real interfaces.
  const table = new PolicyTable(vms);
  const vm = vms[0];
  if (vm === undefined) throw new Error('no VM');
  const frame = Buffer.alloc(60);
  frame.writeUIntBE(vm.guestMac, 6, 6);
  const reason = (arrival: object) =>
    decide({ hook: 'from_guest', ifindex: vm.ifindex, frame, ...arrival }, table).reason;
  expect(reason({ ifindex: 9999 })).toBe('guest_no_identity');
  expect(reason({ tagged: true })).toBe('guest_vlan');
  expect(reason({ frame: frame.subarray(0, 13) })).toBe('guest_runt');
});

test('a sum left to the kernel: the policy, as the kernel is seen to do', () => {
  // What a test run cannot make either; checksum-offload.test.ts sends such frames.
  const [from, to] = vms;
  if (from === undefined || to === undefined) throw new Error('no VMs');
  const frame = Buffer.alloc(14 + 24 + 20); // with four bytes of IPv4 options
  frame.writeUIntBE(to.wireMac, 0, 6);
  frame.writeUIntBE(from.guestMac, 6, 6);
  frame.set([8, 0, 0x46, 0, 0, 44], 12);
  frame.writeUInt32BE(from.ip, 26);
  frame.writeUInt32BE(to.ip, 30);
  const table = new PolicyTable(vms);
  for (const [protocol, own] of [
    [6, 38 + 16],
    [17, 38 + 6],
    [132, 38 + 6],
  ] as const) {
    frame[23] = protocol;
    const reason = (checksumAt?: number) =>
      decide(
        { hook: 'from_guest', ifindex: from.ifindex, frame, ...(checksumAt && { checksumAt }) },
        table,
      ).reason;
    for (let at = 6; at < own; at++) expect(reason(at)).toBe('guest_checksum');
    expect([reason(), reason(own), reason(own + 1)]).toEqual(Array(3).fill('guest_to_local'));
  }
});

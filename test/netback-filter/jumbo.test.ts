/**
 * Links with an MTU of 9000. BPF_PROG_TEST_RUN takes no frame of that size, so what the policy says
 * of generated ones is compared here with what real interfaces deliver; the kernel has them in more
 * than one piece, which the shorter ones of policy.test.ts never are.
 */
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { decide, PolicyTable, type PolicyVm } from '../../src/netback-filter/policy.js';
import { addressOfVmid, GUEST_MAC, ipNumber, macNumber } from '../../src/network/addresses.js';
import { ipv4, udp } from './frames.js';
import { FrameGenerator } from './generate.js';
import { type Guest, gained, type Host, Lab, type Namespace, type Wire } from './lab.js';

const MTU = 9000;
const FAMILY = 7;
const BATCHES = 12;
const BATCH = 60; // fits a tap's queue with room
const SEED = Number(process.env.SEED ?? Math.floor(Math.random() * 2 ** 31));
const execute = promisify(execFile);

let lab: Lab;
let mine: Guest; // family 7, host 1
let sibling: Guest; // family 7, host 1
let foreign: Guest; // family 8, host 1
let remote: Guest; // family 7, host 2
let guests: Guest[];

beforeAll(async () => {
  lab = await Lab.create(2, { mtu: MTU });
  mine = lab.host(0).guest(FAMILY, 0);
  sibling = lab.host(0).guest(FAMILY, 1);
  foreign = lab.host(0).guest(FAMILY + 1, 1);
  remote = lab.host(1).guest(FAMILY, 2);
  guests = [mine, sibling, foreign, remote];
});
afterAll(() => lab?.destroy());

const noise = (bytes: number) => Buffer.from(Array.from({ length: bytes }, (_, at) => at * 7));

test.each([
  ['on the same host', () => sibling],
  ['across hosts', () => remote],
])('a frame of 9,014 bytes arrives whole: %s', async (_where, to) => {
  const sent = { sourceIp: mine.ip, destinationIp: to().ip, payload: noise(MTU - 20) };
  mine.send(ipv4({ to: to().wireMac, ...sent }));
  const frame = await to().receive((it) => it.length === MTU + 14);
  expect(frame).toEqual(ipv4({ to: GUEST_MAC, from: mine.wireMac, ...sent }));
});

test.each([
  ['on the same host', () => sibling],
  ['across hosts', () => remote],
])('a datagram of 60,000 bytes arrives in fragments of 9,000: %s', async (_where, to) => {
  const datagram = udp(4000, 5000, noise(60_000));
  const step = MTU - 20 - ((MTU - 20) % 8);
  const pieces: Buffer[] = [];
  for (let at = 0; at < datagram.length; at += step) {
    const more = at + step < datagram.length ? 0x2000 : 0;
    pieces.push(
      ipv4({
        to: to().wireMac,
        sourceIp: mine.ip,
        destinationIp: to().ip,
        protocol: 17,
        fragment: more | (at / 8),
        payload: datagram.subarray(at, at + step),
      }),
    );
  }
  to().frames.length = 0;
  mine.send(...pieces);
  await to().receive((it) => (it.readUInt16BE(20) & 0x2000) === 0);
  expect(Buffer.concat(to().frames.map((it) => it.subarray(34)))).toEqual(datagram);
});

/** One datagram between two stacks; `do`: the sender's kernel may not cut it. */
async function exchange(from: Namespace, to: Namespace, toIp: string, bytes: number, cut: boolean) {
  const receive = [
    'import socket,hashlib',
    `s=socket.socket(2,2); s.settimeout(10); s.bind(("${toIp}",9))`,
    'print("ready",flush=True); d=s.recv(70000); print(len(d),hashlib.sha256(d).hexdigest())',
  ].join('\n');
  const send = [
    'import socket,hashlib,os',
    // IP_MTU_DISCOVER: never cut, or let it be cut.
    `s=socket.socket(2,2); s.setsockopt(0,10,${cut ? 0 : 2}); d=os.urandom(${bytes})`,
    `s.sendto(d,("${toIp}",9)); print(len(d),hashlib.sha256(d).hexdigest())`,
  ].join('\n');
  const inside = (netns: Namespace, code: string) => [
    ...['netns', 'exec', netns.name, '/usr/bin/python3', '-c', code],
  ];
  const receiver = spawn('ip', inside(to, receive), { stdio: ['ignore', 'pipe', 'inherit'] });
  try {
    const ended = once(receiver, 'close');
    let said = '';
    receiver.stdout.on('data', (data) => {
      said += data;
    });
    await once(receiver.stdout, 'data');
    const { stdout } = await execute('ip', inside(from, send));
    await ended;
    expect(said).toBe(`ready\n${stdout}`);
  } finally {
    receiver.kill('SIGKILL');
  }
}

test('stacks exchange 8,972 bytes that must not be cut, and 30,000 that are', async () => {
  const stack = (host: Host, vmid: number) => {
    const { netns } = host.stackGuest(FAMILY, vmid);
    netns.exec('ip', 'address', 'add', `${addressOfVmid(vmid)}/16`, 'dev', 'eth0');
    return netns;
  };
  const one = stack(lab.host(0), 10);
  const near = stack(lab.host(0), 11);
  const far = stack(lab.host(1), 12);
  for (const [netns, vmid] of [
    [near, 11],
    [far, 12],
  ] as const) {
    await exchange(one, netns, addressOfVmid(vmid), MTU - 28, false);
    await exchange(one, netns, addressOfVmid(vmid), 30_000, true);
  }
  await exchange(near, one, addressOfVmid(10), 30_000, true);
  await exchange(far, one, addressOfVmid(10), 30_000, true);
});

const PAYLOADS = [0, 64, 3000, 4070, 6000, 8000, MTU - 20];

function vmOf(guest: Guest): PolicyVm {
  return {
    ifindex: Number(guest.host.netns.exec('cat', `/sys/class/net/${guest.tap}/ifindex`)),
    wireMac: macNumber(guest.wireMac),
    guestMac: macNumber(GUEST_MAC),
    ip: ipNumber(guest.ip),
  };
}

/** As the kernel shows a frame to the filter: a tag is off, and it remembers that there was one. */
function untagged(frame: Buffer): { frame: Buffer; tagged: boolean } {
  const tagged = frame.length >= 18 && [0x8100, 0x88a8].includes(frame.readUInt16BE(12));
  if (!tagged) return { frame, tagged };
  return { frame: Buffer.concat([frame.subarray(0, 12), frame.subarray(16)]), tagged };
}

/** The kernel takes tags off before the filter, and drops what ends within one. */
const endsInTag = (frame: Buffer) =>
  frame.length < 20 && [0x8100, 0x88a8].includes(frame.readUInt16BE(12));

class Expected {
  readonly frames = new Map<Wire, Buffer[]>();
  readonly reasons: Record<string, number> = {};

  arrives(at: Wire, frame: Uint8Array): void {
    this.frames.set(at, [...(this.frames.get(at) ?? []), Buffer.from(frame)]);
  }
  counts(reason: string | undefined): void {
    if (reason !== undefined) this.reasons[reason] = (this.reasons[reason] ?? 0) + 1;
  }
}

const hex = (frames: readonly Uint8Array[]) => frames.map((it) => Buffer.from(it).toString('hex'));

/** Honest frames behind all others: when they are there, the others would be. */
async function allArrived(marker: string): Promise<void> {
  for (const [from, to] of [
    [mine, sibling],
    [sibling, mine],
    [mine, remote],
  ] as const) {
    from.send(from.frameTo(to, marker));
    await to.receive((it) => it.includes(marker));
  }
  // Nobody of its family is there: it asks.
  foreign.send(foreign.frameTo({ wireMac: '5e:00:00:08:00:09', ip: addressOfVmid(9) }, marker));
  await lab.stranger.receive((it) => it.includes(marker) && it[3] === 8);
}

test('generated frames of up to 9,014 bytes from guests fare as the policy says', async () => {
  console.log(`SEED=${SEED}`);
  const here = new Map([mine, sibling, foreign].map((guest) => [vmOf(guest).ifindex, guest]));
  const vms = [mine, sibling, foreign].map(vmOf);
  const far = vmOf(remote);
  const table = new PolicyTable(vms);
  const tableThere = new PolicyTable([far]);
  const generator = new FrameGenerator(SEED, [...vms, ...vms, far], PAYLOADS);
  const seen = new Set<string>();
  let large = 0;
  for (let batch = 0; batch < BATCHES; batch++) {
    for (const wire of [...guests, lab.stranger]) wire.frames.length = 0;
    const expected = new Expected();
    const before = lab.host(0).stats();
    for (let sent = 0; sent < BATCH; ) {
      const { ifindex, frame } = generator.next(true);
      const sender = here.get(ifindex);
      if (sender === undefined || frame.length > MTU + 14 || endsInTag(frame)) continue;
      sent++;
      sender.send(frame);
      const decision = decide({ hook: 'from_guest', ifindex, ...untagged(frame) }, table);
      expected.counts(decision.reason);
      seen.add(decision.reason ?? decision.verdict);
      if (decision.verdict !== 'redirect') continue;
      if (frame.length > 4096) large++;
      if (decision.to !== 'uplink') {
        const at = here.get(decision.to ?? 0);
        if (at === undefined) throw new Error('redirected to nobody');
        expected.arrives(at, decision.frame);
        continue;
      }
      expected.arrives(lab.stranger, decision.frame);
      const there = decide({ hook: 'from_wire', ifindex: 0, frame: decision.frame }, tableThere);
      if (there.verdict === 'redirect') expected.arrives(remote, there.frame);
    }
    const counted = gained(before, lab.host(0).stats());
    expect(counted, `SEED=${SEED}`).toEqual(expected.reasons);
    const marker = `marker ${batch}.`;
    await allArrived(marker);
    for (const wire of [...guests, lab.stranger]) {
      // The hosts themselves may speak on the wire (IGMP).
      const got = wire.frames.filter((it) => !it.includes(marker) && it[6] !== 0x02);
      expect(hex(got), `SEED=${SEED}`).toEqual(hex(expected.frames.get(wire) ?? []));
    }
  }
  expect(large).toBeGreaterThan(10);
  for (const reason of ['guest_to_local', 'guest_to_wire', 'guest_source_ip', 'guest_source_mac']) {
    expect([...seen]).toContain(reason);
  }
}, 60_000);

test('generated frames of up to 9,014 bytes from the wire fare as the policy says', async () => {
  const vms = [mine, sibling, foreign].map(vmOf);
  const far = vmOf(remote);
  const places = [
    { table: new PolicyTable(vms), guests: [mine, sibling, foreign], vms },
    { table: new PolicyTable([far]), guests: [remote], vms: [far] },
  ];
  const generator = new FrameGenerator(SEED, [...vms, far], PAYLOADS);
  let delivered = 0;
  for (let batch = 0; batch < BATCHES; batch++) {
    for (const wire of guests) wire.frames.length = 0;
    const expected = new Expected();
    for (let sent = 0; sent < BATCH; ) {
      const { frame } = generator.next(false);
      // A switch passes on no frame with a source that is none.
      const source = frame.readUIntBE(6, 6);
      if (source === 0 || (frame[6] ?? 0) % 2 === 1) continue;
      if (frame.length > MTU + 14 || endsInTag(frame)) continue;
      sent++;
      lab.stranger.send(frame);
      for (const place of places) {
        const decision = decide({ hook: 'from_wire', ifindex: 0, ...untagged(frame) }, place.table);
        if (decision.verdict !== 'redirect') continue;
        const at = place.guests[place.vms.findIndex((vm) => vm.ifindex === decision.to)];
        if (at === undefined) throw new Error('redirected to nobody');
        expected.arrives(at, decision.frame);
        if (frame.length > 4096) delivered++;
      }
    }
    const marker = `marker ${batch}.`;
    for (const [to, vmid] of [
      [mine, 99],
      [sibling, 99],
      [remote, 99],
    ] as const) {
      const from = { from: `5e:00:00:07:00:${vmid.toString(16)}`, sourceIp: addressOfVmid(vmid) };
      const payload = Buffer.from(marker);
      lab.stranger.send(ipv4({ to: to.wireMac, ...from, destinationIp: to.ip, payload }));
      await to.receive((it) => it.includes(marker));
    }
    for (const wire of guests) {
      const got = wire.frames.filter((it) => !it.includes(marker));
      expect(hex(got), `SEED=${SEED}`).toEqual(hex(expected.frames.get(wire) ?? []));
    }
  }
  expect(delivered).toBeGreaterThan(10);
}, 60_000);

/**
 * Attacks by tools (scapy, attack.py) from inside a clone, from a VM of another family on the same
 * host and on another, and from a machine on the wire that is no host. All the while a TCP stream runs between the victim and its peer on the other host, and tcpdump listens at
 * every guest and on the wire for frames that must not be there. Each attack ends with a control: a
 * datagram to every listener that its filter takes, so that silence before it means something.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { REASONS } from '../../src/netback-filter/reasons.js';
import { addressOfVmid, GUEST_MAC, wireMac } from '../../src/network/addresses.js';
import { Capture } from './capture.js';
import { gained, type Host, Lab, type Namespace } from './lab.js';

const PORT = 7007;
const MARK = '0x5c'; // TOS of the attacks' IPv4 frames
const ARP_FRAME_BYTES = 42; // those of the attacks are longer
const FLOOD_FRAMES = 30_000;
const SEED = Number(process.env.SEED ?? Math.floor(Math.random() * 2 ** 31));
const folder = join(projectRoot, 'test/netback-filter');
const execute = promisify(execFile);

type Side = 'clone' | 'foreign' | 'foreign, other host' | 'wire';

interface Station {
  netns: Namespace;
  tap: string;
  host: Host;
  mac: string;
  ip: string;
}

let lab: Lab;
let victim: Station; // family 7, host 1
let attacker: Station; // family 7, host 1
let peer: Station; // family 7, host 2
let foreign: Station; // family 8, host 1
let foreignPeer: Station; // family 8, host 2
let strange: Namespace;
let stream: ChildProcess;
const captures: Capture[] = [];
const dropped: number[] = [];
let answer: string; // to the guest's own ARP requests
let genuine: string; // of the stream
let attackedFrom: Side | undefined;
const extra: Capture[] = []; // at those who attack in other turns
const children: ChildProcess[] = [];
let serial = 0;

function station(host: Host, family: number, vmid: number): Station {
  const { netns, tap } = host.stackGuest(family, vmid);
  const ip = addressOfVmid(vmid);
  netns.exec('ip', 'address', 'add', `${ip}/16`, 'dev', 'eth0');
  return { netns, tap, host, ip, mac: wireMac({ family, vmid }) };
}

function child(netns: Namespace, ...words: string[]): ChildProcess {
  const script = join(folder, 'tcp-stream.mjs');
  const started = spawn('ip', ['netns', 'exec', netns.name, process.execPath, script, ...words], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  children.push(started);
  return started;
}

/** What the process says next; its end is a failure. */
async function word(from: ChildProcess): Promise<string> {
  if (from.stdout === null || from.exitCode !== null) throw new Error('the stream has ended');
  const heard = new AbortController();
  try {
    const said = once(from.stdout, 'data', heard);
    const ended = once(from, 'exit', heard).then(([code]) => {
      throw new Error(`the stream ended with ${code}`);
    });
    const [bytes] = (await Promise.race([said, ended])) as [Buffer];
    return String(bytes).trim();
  } finally {
    heard.abort();
  }
}

/** More of the stream arrives, echoed and right. */
async function streamGoesOn(): Promise<number> {
  stream.stdin?.write('\n');
  return Number(await word(stream));
}

beforeAll(async () => {
  console.log(`SEED=${SEED}`);
  lab = await Lab.create(2, { mtu: 9000 });
  const [one, two] = [lab.host(0), lab.host(1)];
  victim = station(one, 7, 0);
  attacker = station(one, 7, 1);
  peer = station(two, 7, 2);
  foreign = station(one, 8, 1);
  foreignPeer = station(two, 8, 3);
  strange = lab.strangeMachine();
  // As a tap does, the attackers' interfaces take frames of any length.
  for (const { host, netns, tap } of [attacker, foreign, foreignPeer]) {
    host.netns.exec('ip', 'link', 'set', tap, 'mtu', '10000');
    netns.exec('ip', 'link', 'set', 'eth0', 'mtu', '10000');
  }

  const server = child(victim.netns, 'serve', victim.ip, String(PORT));
  expect(await word(server)).toBe('ready');
  stream = child(peer.netns, 'talk', peer.ip, victim.ip, String(PORT));
  await streamGoesOn();

  genuine = `tcp port ${PORT} and ip[1] != ${MARK}`;
  answer = `(ether dst ${GUEST_MAC} and arp[6:2] = 2 and len = ${ARP_FRAME_BYTES})`;
  const ofStream = (from: Station, to: Station) =>
    `(ether dst ${GUEST_MAC} and ether src ${from.mac} and src host ${from.ip} and dst host ${to.ip} and ${genuine})`;
  const listeners: [string, Namespace, string][] = [
    ['victim', victim.netns, `not ${answer} and not ${ofStream(peer, victim)}`],
    ['peer', peer.netns, `not ${answer} and not ${ofStream(victim, peer)}`],
  ];
  for (const listener of listeners) captures.push(await Capture.start(...listener));
});

afterAll(async () => {
  try {
    for (const capture of [...captures, ...extra]) dropped.push(await capture.stop());
  } finally {
    for (const started of children) started.kill('SIGKILL');
    lab?.destroy();
  }
  expect(dropped).toEqual(dropped.map(() => 0));
});

const passed = new Set(REASONS.filter((it) => it.passed).map((it) => it.name));
passed.delete('dhcp_to_host'); // it ends at the host, and only attacks ask here

function dropsSince(before: Record<string, number>, host: Host): Record<string, number> {
  const all = Object.entries(gained(before, host.stats()));
  return Object.fromEntries(all.filter(([reason]) => !passed.has(reason)));
}

async function datagram(from: Station, toIp: string, text: string): Promise<void> {
  const code =
    'import socket,sys; socket.socket(2, 2).sendto(sys.argv[2].encode(), (sys.argv[1], 9))';
  const words = ['netns', 'exec', from.netns.name, '/usr/bin/python3', '-c', code, toIp, text];
  await execute('ip', words);
}

/** Who attacks does not listen: its own flood would fill the capture's buffer. All others do. */
async function listenAgainst(side: Side): Promise<void> {
  if (attackedFrom === side) return;
  for (const idle of extra.splice(0)) dropped.push(await idle.stop());
  attackedFrom = side;
  // On the wire nothing of a guest is seen but the stream while the switch has not learnt yet.
  const guests = `(ether[6] = 0x5e or ether[6] = 0x52 or ip[1] = ${MARK})`;
  const known = `(host ${peer.ip} and host ${victim.ip} and ${genuine})`;
  const listeners: [Side, Namespace, string][] = [
    ['clone', attacker.netns, `not ${answer}`],
    ['foreign', foreign.netns, `not ${answer}`],
    ['foreign, other host', foreignPeer.netns, `not ${answer}`],
    ['wire', strange, `${guests} and not ${known}`],
  ];
  for (const listener of listeners) {
    if (listener[0] !== side) extra.push(await Capture.start(...listener));
  }
}

/** Every listener hears an honest datagram, and has heard nothing else. */
async function onlyControlIsHeard(): Promise<void> {
  const text = `control ${++serial}.`;
  await datagram(attacker, victim.ip, text);
  await datagram(attacker, peer.ip, text);
  await datagram(victim, attacker.ip, text);
  await datagram(foreign, foreignPeer.ip, text);
  await datagram(foreignPeer, foreign.ip, text);
  await datagram(attacker, addressOfVmid(9999), text); // nobody has it: flooded on the wire
  const all = [...captures, ...extra];
  for (const capture of all) await capture.seen(text);
  for (const capture of all) {
    // Answers that no such port is open hold what they answer.
    const forbidden = capture.frames.filter((it) => !it.includes('control '));
    expect({ at: capture.name, frames: forbidden.map((it) => it.toString('hex')) }).toEqual({
      at: capture.name,
      frames: [],
    });
    capture.frames.length = 0;
  }
}

async function attack(side: Side, name: string, count: number) {
  await listenAgainst(side);
  const senders: Record<Exclude<Side, 'wire'>, Station> = {
    clone: attacker,
    foreign,
    'foreign, other host': foreignPeer,
  };
  const from = side === 'wire' ? undefined : senders[side];
  const other = side === 'clone' || side === 'wire' ? foreign : victim;
  const targets = { self: from ?? attacker, victim, peer, foreign: other };
  const addresses = Object.fromEntries(
    Object.entries(targets).map(([role, { mac, ip }]) => [role, { mac, ip }]),
  );
  const netns = from?.netns ?? strange;
  const host = from?.host ?? lab.host(0);
  const before = host.stats();
  const kind = {
    clone: 'guest',
    foreign: 'foreign',
    'foreign, other host': 'foreign',
    wire: 'wire',
  };
  const ended = execute('ip', [
    ...['netns', 'exec', netns.name, '/usr/bin/python3', join(folder, 'attack.py')],
    ...[kind[side], name, JSON.stringify({ ...addresses, guest_mac: GUEST_MAC, port: PORT })],
    ...[String(count), String(SEED)],
  ]);
  // During the attack and after it.
  const [{ stdout }] = await Promise.all([ended, streamGoesOn()]);
  await streamGoesOn();
  const sent = JSON.parse(stdout) as Record<string, number>;
  expect(Object.keys(sent).length).toBeGreaterThan(0);
  await expect.poll(() => dropsSince(before, host), { timeout: 10_000 }).toEqual(sent);
  await onlyControlIsHeard();
}

const BY_GUESTS = [
  'spoofed_mac',
  'spoofed_ip',
  'arp_poisoning',
  'rogue_dhcp_server',
  'dhcp_starvation',
  'vlan_hopping',
  'multicast',
  'ipv6_router',
  'ethertypes',
  'runts',
  'giants',
  'fragments',
  'other_family',
];

describe('from a clone', () => {
  test.each(BY_GUESTS)('%s', async (name) => {
    await attack('clone', name, 100);
  });

  test('a flood of all kinds', async () => {
    await attack('clone', 'flood', FLOOD_FRAMES);
  });
});

describe.each(['foreign', 'foreign, other host'] as const)('from another family: %s', (side) => {
  test('all attacks', async () => {
    await attack(side, BY_GUESTS.join(','), 100);
  });

  test('a flood of all kinds', async () => {
    await attack(side, 'flood', FLOOD_FRAMES);
  });
});

describe('from a machine on the wire', () => {
  // Of another family than its own is all it sends.
  test.each(BY_GUESTS.filter((name) => name !== 'other_family'))('%s', async (name) => {
    await attack('wire', name, 100);
  });

  test('a flood of all kinds', async () => {
    await attack('wire', 'flood', FLOOD_FRAMES);
  });
});

test('ARP tables of victim and peer hold the true addresses after all of it', () => {
  const neighbour = (of: Station, ip: string) =>
    of.netns.exec('ip', 'neighbour', 'show', ip, 'dev', 'eth0');
  expect(neighbour(victim, peer.ip)).toContain(`lladdr ${peer.mac}`);
  expect(neighbour(peer, victim.ip)).toContain(`lladdr ${victim.mac}`);
});

/** One host as the way out for all: two hosts on a wire, the second one's guests through the first. */
import { afterEach, expect, test } from 'vitest';
import type { NatHost } from '../../src/nat/gateway.js';
import { type NatPolicy, parsePolicy } from '../../src/nat/policy.js';
import { gained } from '../netback-filter/lab.js';
import { type Guest, HOST, NatLab, SERVER } from './lab.js';

const SECOND = '192.168.77.2';
const FAMILIES = new Map([
  [7, 'web'],
  [8, undefined],
]);
let lab: NatLab;
let router: NatHost;
let second: NatHost;

afterEach(async () => {
  await lab?.destroy();
});

const WEB = {
  allow: [{ name: 'web', protocol: 'tcp', to: [SERVER], ports: [80] }],
};

async function apply(policy: object): Promise<void> {
  const parsed: NatPolicy = parsePolicy({ version: 1, ...policy }, 'test');
  await Promise.all([router.apply(parsed), second.apply(parsed)]);
}

async function start(): Promise<void> {
  lab = await NatLab.create(undefined, 2);
  await lab.serve(80, 81);
  router = lab.newNat(0, { hostName: 'h1', elsewhere: () => FAMILIES });
  second = lab.newNat(1, { hostName: 'h2' });
}

const connect = async (guest: Guest, port = 80, limits = {}) =>
  (await lab.peers.ask(guest.netns, 'tcp', { to: SERVER, port, ...limits })).outcome;

test('guests of all hosts go through the router and only there, each by its family', async () => {
  await start();
  const parent = lab.guest(7, 0, 1);
  const guests = [parent, lab.guest(7, 1, 0), lab.guest(7, 2, 1), lab.guest(8, 2, 1)];
  const inbound = [{ name: 'ssh', protocol: 'tcp', port: 2222, to_port: 22 }];
  await apply({ router: 'h1', default: WEB, families: { web: { ...WEB, inbound } } });
  expect((await second.view()).gateways).toEqual([]);
  expect((await router.view()).gateways.map((it) => it.family)).toEqual([7, 8]);

  const before = lab.lab.hosts.map((host) => host.stats());
  for (const guest of guests) {
    expect(await connect(guest)).toBe('ok');
    expect(await connect(guest, 81)).toBe('ECONNREFUSED');
    const ping = await lab.peers.ask(guest.netns, 'ping', { to: '10.86.0.1' });
    expect(ping.outcome).toBe('ok');
  }
  const [first, other] = lab.lab.hosts.map((host, i) => gained(before[i] ?? {}, host.stats()));
  expect(other?.guest_to_wire_gateway).toBeGreaterThan(12);
  expect(first?.wire_to_gateway).toBe(other?.guest_to_wire_gateway);
  expect(other?.gateway_from_wire).toBe(first?.gateway_to_wire);
  expect(other?.gateway_from_guest).toBeUndefined();
  const counted = await lab.counters(7);
  expect(counted['refused-outbound']).toEqual({ packets: 3, bytes: 3 * 60 });
  expect((await lab.counters(8))['refused-outbound']?.packets).toBe(1);

  // The router's port leads to the parent, wherever that is; the other host's leads nowhere.
  await lab.peers.ask(parent.netns, 'serve_tcp', { address: '0.0.0.0', port: 22 });
  const from = async (to: string) =>
    (await lab.peers.ask(lab.outside, 'tcp', { to, port: 2222 })).outcome;
  expect(await from(HOST)).toBe('ok');
  expect(await from(SECOND)).toBe('ECONNREFUSED');
});

test('limits of a family hold over all hosts; a policy without a router gives each its own', async () => {
  await start();
  const [here, there] = [lab.guest(7, 1, 0), lab.guest(7, 2, 1)];
  await apply({ router: 'h1', default: { ...WEB, per_family: { connections: 2 } } });
  const hold = async (guest: Guest, name: string) =>
    (await lab.peers.ask(guest.netns, 'hold', { name, to: SERVER, port: 80 })).outcome;
  expect([await hold(here, 'a'), await hold(there, 'b')]).toEqual(['ok', 'ok']);
  expect([await hold(here, 'c'), await hold(there, 'd')]).toEqual(['ECONNREFUSED', 'ECONNREFUSED']);
  expect((await lab.counters(7))['over-family-connections']?.packets).toBe(2);

  // A daemon that starts, and a command beside it, go on with the same part.
  await lab.newNat(0).sync();
  await lab.newNat(1).sync();
  for (const name of ['a', 'b']) {
    const guest = name === 'a' ? here : there;
    expect((await lab.peers.ask(guest.netns, 'say', { name })).outcome).toBe('ok');
  }
  expect(lab.lab.hosts.map((host) => host.attached.gatewayMode())).toEqual(['shared', 'elsewhere']);

  await apply({ default: WEB });
  const before = lab.lab.hosts.map((host) => host.stats());
  expect([await connect(here), await connect(there)]).toEqual(['ok', 'ok']);
  for (const [i, host] of lab.lab.hosts.entries()) {
    const counted = gained(before[i] ?? {}, host.stats());
    expect(counted.gateway_from_guest).toBeGreaterThan(3);
    expect(counted.guest_to_wire_gateway ?? counted.wire_to_gateway).toBeUndefined();
  }
  await second.remove();
  expect(await connect(there, 80, { limit_s: 1 })).not.toBe('ok');
  expect(lab.lab.host(1).attached.gatewayMode()).toBe('own');
});

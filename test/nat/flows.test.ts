/** Flows as they are outside of tests: long ones, errors about them, ways round, forged ones. */
import { afterEach, expect, test } from 'vitest';
import { gained } from '../netback-filter/lab.js';
import { HOST, NatLab, SERVER } from './lab.js';

/** Behind the machine outside, over a link of 1,300 bytes. */
const BEHIND = '198.18.5.5';
let lab: NatLab;

afterEach(async () => {
  await lab?.destroy();
});

const ALLOW = [{ name: 'web', protocol: 'tcp', to: [SERVER], ports: [80] }];

test('a stream runs through changes of the policy, of limits and of names without a pause', async () => {
  let address = SERVER;
  lab = await NatLab.create(() => Promise.resolve([address]));
  const { netns } = lab.guest(7, 1);
  await lab.serve(80);
  await lab.apply({ default: { allow: ALLOW } });
  const done = lab.peers.ask(netns, 'stream', { name: 's', to: SERVER, port: 80 });
  const passed = async () => (await lab.counters(7))['allow-web-out']?.packets ?? 0;
  const others = (i: number) =>
    Array.from({ length: i * 5 }, (_, n) => ({
      ...ALLOW[0],
      name: `r${n}`,
      to: [`192.0.2.${n}`],
    }));
  for (let i = 1; i <= 12; i++) {
    const before = await passed();
    address = i % 2 === 0 ? SERVER : '192.0.2.1';
    const named = { name: 'named', protocol: 'tcp', to: ['web.test'] };
    const limits = i % 2 === 0 ? {} : { per_clone: { bytes_per_s: 1e9, connections: 1000 + i } };
    const changed = { allow: [...others(i), ...ALLOW, named], ...limits };
    await lab.apply({ dns_private: true, default: changed });
    await lab.nat.refresh();
    // It goes on after each of them.
    const after = await passed();
    expect(after).toBeGreaterThanOrEqual(before);
    await expect.poll(passed, { timeout: 10_000 }).toBeGreaterThan(after);
  }
  await lab.peers.ask(netns, 'stop', { name: 's' });
  const { outcome, bytes } = await done;
  expect(outcome).toBe('ok');
  expect(bytes).toBeGreaterThan(100_000);
  expect((await lab.counters(7))['refused-outbound']).toEqual({ packets: 0, bytes: 0 });
});

test('errors about allowed flows come through: a guest learns the MTU of the path', async () => {
  lab = await NatLab.create();
  const { netns } = lab.guest(7, 1);
  lab.outside.exec('sysctl', '-qw', 'net.ipv4.ip_forward=1');
  const pair = 'ip link add narrow mtu 1300 type veth peer name far mtu 1300';
  lab.outside.exec(...pair.split(' '));
  for (const name of ['narrow', 'far']) lab.outside.exec('ip', 'link', 'set', name, 'up');
  lab.outside.exec(...'ip route add 198.18.0.0/16 dev narrow'.split(' '));
  const behind = { name: 'behind', protocol: 'udp', to: [BEHIND], ports: [9] };
  await lab.apply({ default: { allow: [behind] } });
  const { outcome, mtu } = await lab.peers.ask(netns, 'pmtu', { to: BEHIND, port: 9 });
  expect([outcome, mtu]).toEqual(['ok', 1300]);
  expect((await lab.counters(7)).related?.packets).toBeGreaterThan(0);
});

test("no way round: not by the host's ports, not by links of gateways, not by a forged address", async () => {
  lab = await NatLab.create();
  const parent = lab.guest(7, 0);
  const clone = lab.guest(7, 1);
  const other = lab.guest(8, 1);
  await lab.serve(123);
  await lab.peers.ask(parent.netns, 'serve_tcp', { address: '0.0.0.0', port: 22 });
  const all = { name: 'all', protocol: 'tcp', to: ['0.0.0.0/0'] };
  const time = { name: 'time', protocol: 'udp', to: [SERVER] };
  const inbound = [{ name: 'ssh', protocol: 'tcp', port: 2222, to_port: 22 }];
  await lab.apply({ default: { allow: [all, time] }, families: { 7: { allow: [all], inbound } } });
  const tcp = async (guest: typeof clone, to: string, port: number) =>
    (await lab.peers.ask(guest.netns, 'tcp', { to, port, limit_s: 2 })).outcome;
  expect((await lab.peers.ask(lab.outside, 'tcp', { to: HOST, port: 2222 })).outcome).toBe('ok');
  for (const guest of [parent, clone, other]) {
    expect(await tcp(guest, HOST, 2222)).toBe('ECONNREFUSED');
    for (const { address } of (await lab.nat.view()).gateways) {
      expect(await tcp(guest, address, 22)).toBe('ECONNREFUSED');
    }
    expect(await tcp(guest, '10.86.0.1', 22)).toBe('ECONNREFUSED');
  }
  const { host } = await lab.nat.view();
  expect(host['refused-host']).toEqual({ packets: 3, bytes: 180 });

  // An address of its family that is not its own, and one from outside.
  const before = [lab.host.stats(), await lab.counters(8)] as const;
  for (const source of ['10.86.0.77', '203.0.113.9']) {
    other.netns.exec('ip', 'address', 'add', `${source}/32`, 'dev', 'eth0');
    const request = { to: SERVER, port: 123, source, limit_s: 1 };
    expect((await lab.peers.ask(other.netns, 'udp', request)).outcome).toBe('timeout');
  }
  expect(gained(before[0], lab.host.stats()).guest_source_ip).toBe(2);
  expect(await lab.counters(8)).toEqual(before[1]);
  const own = { to: SERVER, port: 123, source: other.address };
  expect((await lab.peers.ask(other.netns, 'udp', own)).outcome).toBe('ok');
});

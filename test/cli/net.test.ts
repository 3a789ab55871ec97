import { afterEach, beforeEach, expect, test } from 'vitest';
import { GUEST_MAC } from '../../src/network/addresses.js';
import { Namespace, run } from '../netback-filter/lab.js';
import { snowflock } from './snowflock.js';

let host: Namespace;
const guests: Namespace[] = [];
let made = 0;

/** A guest is a namespace behind a veth pair, with its address set by hand. */
function guest(tap: string, address: string): Namespace {
  const netns = new Namespace(`sfcli${process.pid}g${++made}`);
  guests.push(netns);
  const link = `ip link add ${tap} address 02:00:00:00:01:0${made % 10} type veth peer name eth0`;
  host.exec(...link.split(' '), 'address', GUEST_MAC, 'netns', netns.name);
  netns.exec('sysctl', '-qw', 'net.ipv6.conf.eth0.disable_ipv6=1');
  netns.exec('ip', 'link', 'set', 'eth0', 'up');
  netns.exec('ip', 'address', 'add', `${address}/16`, 'dev', 'eth0');
  return netns;
}

const net = (...args: string[]) => snowflock(['net', ...args], { namespace: host.name });
const ping = (from: Namespace, address: string) => {
  try {
    return from.exec('busybox', 'ping', '-c', '1', '-W', '2', address);
  } catch {
    return undefined;
  }
};

beforeEach(() => {
  host = new Namespace(`sfcli${process.pid}h`);
  const link = 'ip link add eth0 address 02:00:00:00:00:01 type veth peer name wire';
  host.exec(...link.split(' '));
  host.exec('ip', 'link', 'set', 'eth0', 'up');
});
afterEach(() => {
  for (const netns of [...guests.splice(0), host]) run('ip', 'netns', 'del', netns.name);
});

test('VMs of one family reach each other, another family does not; stats say why', async () => {
  const [one, two, stranger] = [
    guest('vm1', '10.86.0.2'),
    guest('vm2', '10.86.0.3'),
    guest('vm3', '10.86.0.3'),
  ];
  expect((await net('attach', 'eth0')).status).toBe(0);
  for (const [tap, family, vmid] of [
    ['vm1', '7', '0'],
    ['vm2', '7', '1'],
    ['vm3', '0x8', '1'],
  ] as const) {
    const added = await net('add', 'eth0', tap, '--family', family, '--vmid', vmid);
    expect(added).toMatchObject({ status: 0, stdout: '' });
  }
  expect(ping(one, '10.86.0.3')).toContain('1 packets received');
  expect(ping(stranger, '10.86.0.2')).toBeUndefined();
  expect(ping(two, '10.86.0.2')).toContain('1 packets received');

  const listed = JSON.parse((await net('ls', 'eth0', '--json')).stdout) as { tap: string }[];
  expect(listed).toMatchObject([
    { tap: 'vm1', family: 7, vmid: 0, ip: '10.86.0.2', wireMac: '5e:00:00:07:00:00' },
    { tap: 'vm2', family: 7, vmid: 1, ip: '10.86.0.3', wireMac: '5e:00:00:07:00:01' },
    { tap: 'vm3', family: 8, vmid: 1, ip: '10.86.0.3', wireMac: '5e:00:00:08:00:01' },
  ]);
  const counts = JSON.parse((await net('stats', 'eth0', '--json')).stdout) as Record<
    string,
    number
  >;
  expect(counts.guest_to_local).toBe(4);
  expect(counts.guest_to_wire).toBeGreaterThan(0); // the stranger's: its family's 0 is not here
  const { stdout } = await net('stats', 'eth0');
  expect(stdout).toMatch(/^ 0\s+4\s+passed\s+guest_to_local/m);
  const metrics = (await net('stats', 'eth0', '--prometheus')).stdout;
  expect(metrics).toContain(
    'snowflock_net_frames_total{uplink="eth0",reason="guest_to_local"} 4\n',
  );
  expect(metrics).toContain('snowflock_net_vms{uplink="eth0"} 3\n');
});

test('rm cuts a VM off, also one whose interface has gone; detach asks and leaves nothing', async () => {
  const one = guest('vm1', '10.86.0.2');
  guest('vm2', '10.86.0.3');
  await net('attach', 'eth0');
  await net('add', 'eth0', 'vm1', '--family', '7', '--vmid', '0');
  await net('add', 'eth0', 'vm2', '--family', '7', '--vmid', '1');
  expect(ping(one, '10.86.0.3')).toContain('1 packets received');
  host.exec('ip', 'link', 'del', 'vm2');
  expect((await net('rm', 'eth0', 'vm2')).status).toBe(0);
  expect((await net('rm', 'eth0', 'vm1')).status).toBe(0);
  expect(ping(one, '10.86.0.3')).toBeUndefined();
  expect((await net('rm', 'eth0', 'vm1')).status).toBe(4);

  await net('add', 'eth0', 'vm1', '--family', '7', '--vmid', '0');
  const refused = await net('detach', 'eth0');
  expect(refused.status).toBe(2);
  expect(refused.stderr).toContain('--yes');
  expect((await net('ls', 'eth0', '--json')).stdout).toContain('vm1');
  expect((await net('detach', 'eth0', '--yes')).status).toBe(0);
  expect(host.exec('tc', 'qdisc', 'show', 'dev', 'eth0')).not.toContain('clsact');
  expect((await net('stats', 'eth0')).status).toBe(4);
});

test('what is wrong is said, with an exit status', async () => {
  guest('vm1', '10.86.0.2');
  const none = await net('ls', 'eth0');
  expect(none.status).toBe(4);
  expect(none.stderr).toContain('snowflock net attach eth0');
  expect(host.exec('tc', 'qdisc', 'show', 'dev', 'eth0')).not.toContain('clsact'); // looked only
  expect((await net('attach', 'nothere')).status).toBe(4);
  await net('attach', 'eth0');
  const add = (...args: string[]) => net('add', 'eth0', ...args);
  expect((await add('vm1', '--family', '7')).status).toBe(2);
  expect((await add('vm1', '--family', '16777216', '--vmid', '0')).status).toBe(2);
  expect((await add('vm1', '--family', '7', '--vmid', 'x')).status).toBe(2);
  expect((await add('eth0', '--family', '7', '--vmid', '0')).status).toBe(2);
  expect((await add('vm9', '--family', '7', '--vmid', '0')).status).toBe(4);
  expect((await add('vm1', '--family', '7', '--vmid', '0', '--guest-mac', 'zz')).status).toBe(2);
  expect((await add('vm1', '--family', '7', '--vmid', '0')).status).toBe(0);
  guest('vm2', '10.86.0.2');
  const twice = await add('vm2', '--family', '7', '--vmid', '0');
  expect(twice.status).toBe(5);
  expect(twice.stderr).toContain('vm1');
});

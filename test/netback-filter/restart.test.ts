import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { nativePath, projectRoot } from '../../src/common/native.js';
import { NetbackFilter } from '../../src/netback-filter/filter.js';
import {
  addressOfVmid,
  GUEST_MAC,
  ipNumber,
  macNumber,
  wireMac,
} from '../../src/network/addresses.js';
import { Guest, Lab } from './lab.js';

let lab: Lab;
afterEach(() => lab?.destroy());

/** Another process attaches the filter, adds two VMs and is killed. */
async function attachAndDie(netns: string, taps: string[], family: number): Promise<void> {
  const vms = taps.map((tap, vmid) => ({
    tap,
    wireMac: macNumber(wireMac({ family, vmid })),
    guestMac: macNumber(GUEST_MAC),
    ip: ipNumber(addressOfVmid(vmid)),
  }));
  const holder = spawn(
    'ip',
    [
      ...['netns', 'exec', netns, process.execPath],
      join(projectRoot, 'test/netback-filter/holder.mjs'),
      ...[nativePath('netback.node'), nativePath('netback.bpf.o'), JSON.stringify(vms)],
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const ended = once(holder, 'exit');
  holder.stdout.setEncoding('utf8');
  const [said] = (await Promise.race([once(holder.stdout, 'data'), ended])) as [string];
  holder.kill('SIGKILL');
  expect(said).toBe('ready\n');
  await ended;
}

test('the filter outlives its process; the next one finds it, its VMs and counters', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  host.netns.do(() => host.attached.detach());
  const [a, b] = [0, 1].map((vmid) => {
    const tap = lab.interfaceName();
    return new Guest(host, tap, { family: 9, vmid }, host.tap(tap));
  }) as [Guest, Guest];
  lab.onDestroy(() => a.close());
  lab.onDestroy(() => b.close());
  await attachAndDie(host.netns.name, [a.tap, b.tap], 9);

  a.send(a.frameTo(b, 'nobody holds the filter'));
  await b.receive((it) => it.includes('nobody holds'));

  const filter = await host.attach();
  expect(filter.stats()).toMatchObject({ guest_to_local: 1 });
  expect(filter.vms().sort((x, y) => x.vmid - y.vmid)).toEqual([
    { tap: a.tap, family: 9, vmid: 0, guestMac: GUEST_MAC, ip: '10.86.0.2' },
    { tap: b.tap, family: 9, vmid: 1, guestMac: GUEST_MAC, ip: '10.86.0.3' },
  ]);
  a.send(a.frameTo(b, 'taken over'));
  await b.receive((it) => it.includes('taken over'));
  const c = host.guest(9, 2);
  c.send(c.frameTo(b, 'from a new VM'));
  expect(await b.receive((it) => it.includes('new VM'))).toEqual(c.arrivingAt(b, 'from a new VM'));
});

test('a take-over forgets VMs whose interfaces have gone', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const [gone, stays] = [host.guest(9, 0), host.guest(9, 1)];
  host.attached.close();
  gone.close();
  const filter = await host.attach();
  expect(filter.vms().map((vm) => vm.tap)).toEqual([stays.tap]);
});

test('a new identity for a tap replaces the old one at once', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const peer = host.guest(9, 0);
  const before = host.guest(9, 1);
  const next = { tap: before.tap, family: 9, vmid: 5 };
  const refused = expect.objectContaining({ code: 'E_EXISTS' });
  host.netns.do(() => {
    expect(() => host.attached.addVm(next)).toThrow(refused);
    expect(() => host.attached.addVm(next, { family: 9, vmid: 2 })).toThrow(refused);
    host.attached.addVm(next, { family: 9, vmid: 1 });
  });
  before.send(before.frameTo(peer, 'old address'));
  const now = ['5e:00:00:09:00:05', '10.86.0.7'] as const;
  peer.send(
    peer.frameTo(before, 'to the old one'),
    peer.frameTo({ wireMac: now[0], ip: now[1] }, 'to the new one'),
  );
  await before.receive((it) => it.includes('to the new one'));
  await expect
    .poll(() => host.stats(), { timeout: 10_000 })
    .toMatchObject({ guest_source_ip: 1, guest_to_local: 1, guest_to_wire: 1 });
  expect(before.frames).toHaveLength(1);
  expect(
    host.attached
      .vms()
      .map((vm) => vm.vmid)
      .sort(),
  ).toEqual([0, 5]);
});

test('two interfaces cannot have one identity; a dead one gives it up', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const first = host.guest(9, 1);
  expect(() => host.guest(9, 1)).toThrow(expect.objectContaining({ code: 'E_EXISTS' }));
  first.close();
  const second = host.guest(9, 1);
  expect(host.attached.vms().map((vm) => vm.tap)).toEqual([second.tap]);
});

test('detach leaves nothing behind', async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const guest = host.guest(9, 0);
  // Wire MACs are none of the network card's own.
  expect(host.netns.exec('ip', 'link', 'show', 'dev', 'eth0')).toContain('PROMISC');
  host.netns.do(() => host.attached.detach());
  expect(host.netns.exec('ip', 'link', 'show', 'dev', 'eth0')).not.toContain('PROMISC');
  for (const name of ['eth0', guest.tap]) {
    expect(host.netns.exec('tc', 'qdisc', 'show', 'dev', name)).not.toContain('clsact');
  }
  expect(() => host.attached.stats()).toThrow(expect.objectContaining({ code: 'E_CLOSED' }));
});

test("another's clsact on the uplink and its filters stay when ours goes", async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  host.netns.do(() => host.attached.detach());
  host.netns.exec('tc', 'qdisc', 'add', 'dev', 'eth0', 'clsact');
  await host.attach();
  host.netns.do(() => host.attached.detach());
  expect(host.netns.exec('tc', 'qdisc', 'show', 'dev', 'eth0')).toContain('clsact');
  expect(host.netns.exec('tc', 'filter', 'show', 'dev', 'eth0', 'ingress')).toBe('');
});

test('an uplink that cannot be one is refused', async () => {
  lab = await Lab.create(1);
  const { netns } = lab.host(0);
  const attach = (uplink: string) => netns.do(() => NetbackFilter.attach({ uplink }));
  await expect(attach('eth7')).rejects.toMatchObject({ code: 'E_NOT_FOUND' });
  netns.exec(...'ip link add odd address 5e:01:02:03:04:05 type veth peer name even'.split(' '));
  await expect(attach('odd')).rejects.toMatchObject({ code: 'E_NETWORK' });
});

test("a guest's MAC address that cannot be one is refused", async () => {
  lab = await Lab.create(1);
  const host = lab.host(0);
  const tap = lab.interfaceName();
  const pair = `ip link add ${tap} address 02:00:00:00:05:01 type veth peer name p${tap}`;
  host.netns.exec(...pair.split(' '));
  const add = (guestMac: string) =>
    host.netns.do(() => host.attached.addVm({ tap, family: 9, vmid: 1, guestMac }));
  const none = ['ff:ff:ff:ff:ff:ff', '01:00:5e:00:00:01', '00:00:00:00:00:00', '5e:00:00:08:00:01'];
  for (const mac of [...none, 'vm1', '52:54:00:12:34']) {
    expect(() => add(mac)).toThrow(expect.objectContaining({ code: 'E_ARGUMENT' }));
  }
  expect(host.attached.vms()).toEqual([]);
  add('52:54:00:12:34:56');
  expect(host.attached.vms()).toMatchObject([{ tap, guestMac: '52:54:00:12:34:56' }]);
});

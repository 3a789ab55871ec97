/** Changes of the policy under traffic, a restart, DNS names, ports of the host, and the end of it all. */
import { afterEach, expect, test } from 'vitest';
import { HOST, NatLab, OTHERS, SERVER } from './lab.js';

let lab: NatLab;

afterEach(async () => {
  await lab?.destroy();
});

const rule = (name: string, to: string, ...ports: number[]) => ({
  name,
  protocol: 'tcp',
  to: [to],
  ports,
});

test('a change holds at once: flows still allowed go on, the others get a reset, counters stay', async () => {
  lab = await NatLab.create();
  const { netns } = lab.guest(7, 1);
  await lab.serve(80, 81);
  await lab.apply({ default: { allow: [rule('a', SERVER, 80), rule('b', SERVER, 81)] } });
  const say = (name: string) => lab.peers.ask(netns, 'say', { name });
  for (const [name, port] of Object.entries({ kept: 80, cut: 81 })) {
    const { outcome } = await lab.peers.ask(netns, 'hold', { name, to: SERVER, port });
    expect(outcome).toBe('ok');
  }
  const before = await lab.counters(7);
  expect(before['allow-a-out']?.packets).toBeGreaterThan(0);

  // The rule that stays has another place and more destinations now.
  const wider = { ...rule('a', SERVER, 80, 82), to: [OTHERS[0], SERVER] };
  await lab.apply({ default: { allow: [rule('c', SERVER, 99), wider] } });
  // Also what comes back: the guest of the flow that is cut has not said anything yet.
  const refused = async () => (await lab.counters(7))['refused-outbound']?.packets;
  expect(await refused()).toBe(0);
  const push = async () => (await lab.peers.ask(lab.outside, 'push', { port: 81 })).outcome;
  expect(await push()).toBe('ok');
  await expect.poll(push).not.toBe('ok'); // the server has its reset
  expect(await refused()).toBeGreaterThan(0);
  expect((await say('kept')).outcome).toBe('ok');
  expect((await say('cut')).outcome).toBe('ECONNRESET');
  const after = await lab.counters(7);
  expect(after['allow-a-out']?.packets).toBeGreaterThan(before['allow-a-out']?.packets ?? 0);
  expect(after['allow-b-out']).toBeUndefined();
  expect(after['refused-outbound']?.packets).toBeGreaterThan(0);

  // A policy that the kernel would refuse, or that is wrong, changes nothing.
  expect(() => lab.apply({ default: { allow: [{ ...rule('a', '10.0.0.1/8', 1) }] } })).toThrow(
    expect.objectContaining({ code: 'E_CONFIG' }),
  );
  expect((await say('kept')).outcome).toBe('ok');
});

test('what comes after a restart goes on with the gateways, flows and counters that are there', async () => {
  lab = await NatLab.create();
  const { netns } = lab.guest(7, 0);
  await lab.serve(80);
  await lab.apply({ default: { allow: [rule('a', SERVER, 80)] } });
  await lab.peers.ask(netns, 'hold', { name: 'flow', to: SERVER, port: 80 });
  const before = await lab.counters(7);

  lab.nat = lab.newNat();
  expect(await lab.nat.sync()).toEqual([7]);
  expect((await lab.peers.ask(netns, 'say', { name: 'flow' })).outcome).toBe('ok');
  const after = await lab.counters(7);
  expect(after['allow-a-out']?.packets).toBeGreaterThan(before['allow-a-out']?.packets ?? 0);

  // One that was killed while it made a gateway: the guests' side has gone.
  lab.host.netns.exec('ip', 'link', 'del', 'sfg000007');
  expect((await lab.peers.ask(netns, 'tcp', { to: SERVER, port: 80 })).outcome).not.toBe('ok');
  await lab.newNat().sync();
  expect((await lab.peers.ask(netns, 'tcp', { to: SERVER, port: 80 })).outcome).toBe('ok');
});

test('ports of the host lead to the parent, and to no clone', async () => {
  lab = await NatLab.create();
  const parent = lab.guest(7, 0);
  const clone = lab.guest(7, 1);
  lab.guest(8, 0);
  const other = lab.guest(9, 1);
  for (const { netns } of [parent, clone, other]) {
    await lab.peers.ask(netns, 'serve_tcp', { address: '0.0.0.0', port: 22 });
  }
  const inbound = (name: string, port: number, more = {}) => ({
    inbound: [{ name, protocol: 'tcp', port, to_port: 22, ...more }],
  });
  const families = {
    7: inbound('ssh', 2222),
    8: inbound('mine', 2223, { from: [OTHERS[0]] }),
    9: inbound('none', 2224),
  };
  await lab.apply({ families });
  const connect = async (port: number) =>
    (await lab.peers.ask(lab.outside, 'tcp', { to: HOST, port })).outcome;
  expect(await connect(2222)).toBe('ok');
  // To a family whose rule is for others; to one whose parent is elsewhere; to no rule.
  expect(await connect(2223)).toBe('ECONNREFUSED');
  expect(await connect(2224)).toBe('ECONNREFUSED');
  expect(await connect(22)).toBe('ECONNREFUSED');
  expect((await lab.counters(7))['inbound-ssh-in']?.packets).toBeGreaterThan(3);
  expect((await lab.counters(8))['refused-inbound']).toEqual({ packets: 1, bytes: 60 });

  // Straight to the gateways' addresses and to guests', by a machine that sets its routes so.
  lab.outside.exec('ip', 'route', 'add', '100.86.0.0/16', 'via', HOST);
  lab.outside.exec('ip', 'route', 'add', '10.86.0.0/16', 'via', HOST);
  const { gateways } = await lab.nat.view();
  const link = gateways.find(({ family }) => family === 7)?.address;
  const straight = (to: string | undefined) =>
    lab.peers.ask(lab.outside, 'tcp', { to, port: 22, limit_s: 1 });
  expect((await straight(link)).outcome).not.toBe('ok');
  expect((await straight(clone.address)).outcome).not.toBe('ok');

  // No longer allowed: the flow is cut.
  await lab.peers.ask(lab.outside, 'hold', { name: 'in', to: HOST, port: 2222 });
  await lab.apply({ families: { 7: {} } });
  expect((await lab.peers.ask(lab.outside, 'say', { name: 'in' })).outcome).toBe('ECONNRESET');
});

test('a DNS name allows what it resolves to, and for a while what it had', async () => {
  const names = new Map([['web.test', [SERVER]]]);
  lab = await NatLab.create((name) => {
    const addresses = names.get(name);
    return addresses === undefined
      ? Promise.reject(new Error('ENOTFOUND'))
      : Promise.resolve(addresses);
  });
  const { netns } = lab.guest(7, 1);
  await lab.serve(80);
  const to = ['WEB.test', 'gone.test'];
  const policy = {
    dns_private: true, // SERVER
    default: { allow: [{ name: 'web', protocol: 'tcp', to, ports: [80] }] },
  };
  const connect = async (address: string | undefined) =>
    (await lab.peers.ask(netns, 'tcp', { to: address, port: 80 })).outcome;
  expect(await lab.apply(policy)).toEqual({ families: [7], failed: { 'gone.test': 'ENOTFOUND' } });
  expect(await connect(SERVER)).toBe('ok');
  expect(await connect(OTHERS[0])).toBe('ECONNREFUSED');

  names.set('web.test', [OTHERS[0] ?? '']);
  await lab.nat.refresh();
  expect(await connect(OTHERS[0])).toBe('ok');
  expect(await connect(SERVER)).toBe('ok');
  names.delete('web.test'); // cannot be resolved for a moment: nothing is lost
  await lab.nat.refresh();
  expect(await connect(OTHERS[0])).toBe('ok');

  await lab.apply({ ...policy, dns_keep_s: 0 });
  names.set('web.test', [SERVER]);
  await lab.nat.refresh();
  expect(await connect(SERVER)).toBe('ok');
  expect(await connect(OTHERS[0])).toBe('ECONNREFUSED');
});

test('whoever owns an allowed name cannot open the private network to guests with it', async () => {
  const names = new Map([['web.test', [OTHERS[0] ?? '']]]);
  lab = await NatLab.create((name) => Promise.resolve(names.get(name) ?? []));
  const { netns } = lab.guest(7, 1);
  await lab.serve(80);
  const policy = {
    default: { allow: [{ name: 'web', protocol: 'tcp', to: ['web.test'], ports: [80] }] },
  };
  const connect = async (address = '') =>
    (await lab.peers.ask(netns, 'tcp', { to: address, port: 80 })).outcome;
  expect((await lab.apply(policy)).failed).toEqual({});
  expect(await connect(OTHERS[0])).toBe('ok');

  names.set('web.test', [SERVER, '169.254.169.254', OTHERS[1] ?? '']);
  const failed = await lab.nat.refresh();
  expect(failed['web.test']).toContain(`(dns_private would allow them) left out: ${SERVER}`);
  expect(failed['web.test']).toContain('no name may lead to left out: 169.254.169.254');
  expect(await connect(SERVER)).toBe('ECONNREFUSED');
  expect(await connect(OTHERS[1])).toBe('ok');

  // What was allowed before does not stay when it no longer is.
  expect((await lab.apply({ ...policy, dns_private: true })).failed['web.test']).not.toContain(
    SERVER,
  );
  expect(await connect(SERVER)).toBe('ok');
  await lab.apply(policy);
  expect(await connect(SERVER)).toBe('ECONNREFUSED');
});

test('a family without VMs here has no gateway; with the last one nothing is left', async () => {
  lab = await NatLab.create();
  const { netns } = lab.host;
  const look = () => ({
    links: netns.exec('ip', '-o', 'link').match(/\bsf[gn][\da-f]{6}@/g) ?? [],
    table: netns.exec('nft', 'list', 'ruleset', 'ip'),
    forwarding: netns.exec('cat', '/proc/sys/net/ipv4/ip_forward').trim(),
  });
  const before = look();
  const spaces = () => netns.exec('ip', 'netns', 'list').match(/^sfnat-\S+/gm) ?? [];
  const elsewhere = spaces();
  const [seven, eight] = [lab.guest(7, 3), lab.guest(8, 3)];
  await lab.serve(80);
  await lab.apply({ default: { allow: [rule('a', SERVER, 80)] } });
  expect(look().links.length).toBe(4);
  expect(spaces().length).toBe(elsewhere.length + 2);

  netns.do(() => lab.host.attached.removeVm(seven.tap));
  expect(await lab.nat.sync()).toEqual([8]);
  expect(spaces().length).toBe(elsewhere.length + 1);
  expect((await lab.peers.ask(eight.netns, 'tcp', { to: SERVER, port: 80 })).outcome).toBe('ok');
  netns.do(() => lab.host.attached.removeVm(eight.tap));
  expect(await lab.nat.sync()).toEqual([]);
  expect(look()).toEqual(before);
  expect(spaces()).toEqual(elsewhere);
  expect(lab.host.attached.gateways()).toEqual([]);
});

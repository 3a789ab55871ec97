/** Limits, with traffic that is over them. */
import { afterEach, expect, test } from 'vitest';
import { NatLab, type Outcome, SERVER } from './lab.js';

let lab: NatLab;

afterEach(async () => {
  await lab?.destroy();
});

const ALLOW = ['tcp', 'udp'].map((protocol) => ({ name: protocol, protocol, to: [SERVER] }));
const FLOOD = { to: SERVER, size: 972, seconds: 4, lead: 2 };

test('throttles hold within 10%: bytes and packets, of a clone and of a family', async () => {
  lab = await NatLab.create();
  const [one, two, other] = [lab.guest(7, 1), lab.guest(7, 2), lab.guest(8, 1)];
  const [nine, ten] = [lab.guest(9, 1), lab.guest(9, 2)];
  await lab.serve(1001, 1002, 1003, 1004, 1005);
  const limits = { bytes_per_s: 200_000 };
  await lab.apply({
    families: {
      7: { allow: ALLOW, per_clone: limits, per_family: { bytes_per_s: 300_000 } },
      8: { allow: ALLOW, per_clone: { packets_per_s: 300 } },
      9: { allow: ALLOW, per_family: { packets_per_s: 400 } },
    },
  });
  const flood = (guest: typeof one, port: number, rate: number): Promise<Outcome> =>
    lab.peers.ask(guest.netns, 'flood', { ...FLOOD, port, rate, at: `${SERVER}:${port}` });
  const near = (value: number | undefined, wanted: number) => {
    console.log(`limit ${wanted}: ${value?.toFixed(0)}`);
    expect(Math.abs((value ?? 0) / wanted - 1)).toBeLessThan(0.1);
  };
  // 1,000 bytes each with the headers of UDP and IPv4, which the server does not see.
  const withHeaders = (outcome: Outcome) => (outcome.packets_per_s ?? 0) * 1000;
  near(withHeaders(await flood(one, 1001, 600)), 200_000);
  const [a, b, c, d, e] = await Promise.all([
    flood(one, 1001, 600),
    flood(two, 1002, 600),
    flood(other, 1003, 900),
    flood(nine, 1004, 300),
    flood(ten, 1005, 300),
  ]);
  near(withHeaders(a) + withHeaders(b), 300_000);
  near(c.packets_per_s, 300);
  near((d.packets_per_s ?? 0) + (e.packets_per_s ?? 0), 400);

  // What was dropped and what was let through add up to what was sent.
  const seven = await lab.counters(7);
  const sent = [a, b].reduce((sum, it) => sum + (it.sent ?? 0), 0);
  const passed = seven['allow-udp-out']?.packets ?? 0;
  const dropped = ['clone', 'family'].reduce(
    (sum, who) => sum + (seven[`over-${who}-bytes`]?.packets ?? 0),
    0,
  );
  expect(passed + dropped).toBeGreaterThan(sent);
  const eight = await lab.counters(8);
  const counted = ['allow-udp-out', 'over-clone-packets'].map((name) => eight[name]?.packets ?? 0);
  expect((counted[0] ?? 0) + (counted[1] ?? 0)).toBe(c.sent);
});

test('limits of connections hold: so many at once, and one that ends makes room', async () => {
  lab = await NatLab.create();
  const [one, two] = [lab.guest(7, 1), lab.guest(7, 2)];
  await lab.serve(80);
  await lab.apply({
    default: { allow: ALLOW, per_clone: { connections: 3 }, per_family: { connections: 5 } },
  });
  const hold = async (guest: typeof one, name: string) =>
    (await lab.peers.ask(guest.netns, 'hold', { name, to: SERVER, port: 80 })).outcome;
  const ones = [await hold(one, 'a'), await hold(one, 'b'), await hold(one, 'c')];
  expect(ones).toEqual(['ok', 'ok', 'ok']);
  expect(await hold(one, 'd')).toBe('ECONNREFUSED');
  expect([await hold(two, 'e'), await hold(two, 'f')]).toEqual(['ok', 'ok']);
  expect(await hold(two, 'g')).toBe('ECONNREFUSED'); // the family's
  const counted = await lab.counters(7);
  expect(counted['over-clone-connections']?.packets).toBe(1);
  expect(counted['over-family-connections']?.packets).toBe(1);

  // The same limits again, and other rules: those that are open still count.
  await lab.apply({
    default: {
      allow: [...ALLOW, { name: 'more', protocol: 'icmp', to: [SERVER] }],
      per_clone: { connections: 3 },
      per_family: { connections: 5 },
    },
  });
  expect(await hold(one, 'h')).toBe('ECONNREFUSED');

  // Refused until the kernel has seen the end of one.
  await lab.peers.ask(one.netns, 'release', { name: 'a' });
  await expect.poll(() => hold(one, 'i'), { timeout: 20_000 }).toBe('ok');
  expect(await hold(one, 'j')).toBe('ECONNREFUSED');

  // Another limit, in one step.
  await lab.apply({ default: { allow: ALLOW, per_clone: { connections: 1 } } });
  expect([await hold(one, 'k'), await hold(one, 'l')]).toEqual(['ok', 'ECONNREFUSED']);
});

test("no family uses up the host's own table of connections, whatever its policy", async () => {
  lab = await NatLab.create();
  const [one, two, other] = [lab.guest(7, 1), lab.guest(7, 2), lab.guest(8, 1)];
  await lab.serve(80);
  const apply = (flowsMax?: number) => {
    lab.nat = lab.newNat(0, flowsMax === undefined ? {} : { flowsMax });
    return lab.apply({ default: { allow: ALLOW } });
  };
  await apply(3);
  const hold = async (guest: typeof one, name: string) =>
    (await lab.peers.ask(guest.netns, 'hold', { name, to: SERVER, port: 80 })).outcome;
  const held = [await hold(one, 'a'), await hold(two, 'b'), await hold(one, 'c')];
  expect(held).toEqual(['ok', 'ok', 'ok']);
  const over = async () => (await lab.nat.view()).host['over-flows']?.packets;
  expect(await over()).toBe(0);
  expect([await hold(one, 'd'), await hold(two, 'e')]).toEqual(['ECONNREFUSED', 'ECONNREFUSED']);
  expect(await over()).toBe(2);
  expect(await hold(other, 'f')).toBe('ok'); // each has its own share
  // Flows that there are go on, and count on when the rules are made again.
  expect((await lab.peers.ask(one.netns, 'say', { name: 'a' })).outcome).toBe('ok');
  await apply(3);
  expect(await hold(one, 'g')).toBe('ECONNREFUSED');

  // Without a word about it: a sixteenth of the table.
  await apply();
  expect(await hold(one, 'h')).toBe('ok');
  const { netns } = lab.host;
  const all = Number(netns.exec('cat', '/proc/sys/net/netfilter/nf_conntrack_max'));
  const rules = netns.exec('nft', 'list', 'table', 'ip', 'snowflock_nat');
  expect(rules).toContain(`ct count over ${Math.floor(all / 16)} `);
  expect(rules).not.toContain('ct count over 3 ');
});

test.each(['clone', 'family'])('new connections of a %s in a second are limited', async (who) => {
  lab = await NatLab.create();
  const guests = [lab.guest(7, 1), ...(who === 'family' ? [lab.guest(7, 2)] : [])];
  await lab.serve(80);
  const limits = { [`per_${who}`]: { new_connections_per_s: 10 } };
  await lab.apply({ default: { allow: ALLOW, ...limits } });
  const begin = Date.now();
  const outcomes = await Promise.all(
    Array.from({ length: 60 }, (_, i) => {
      const netns = guests[i % guests.length]?.netns ?? lab.outside;
      return lab.peers.ask(netns, 'tcp', { to: SERVER, port: 80 });
    }),
  );
  const seconds = (Date.now() - begin) / 1000;
  const passed = outcomes.filter(({ outcome }) => outcome === 'ok').length;
  const refused = outcomes.filter(({ outcome }) => outcome === 'ECONNREFUSED').length;
  expect(passed + refused).toBe(60);
  expect(passed).toBeGreaterThanOrEqual(10);
  expect(passed).toBeLessThanOrEqual(10 + Math.ceil(seconds * 10));
  expect((await lab.counters(7))[`over-${who}-new`]).toEqual({
    packets: refused,
    bytes: refused * 60,
  });
});

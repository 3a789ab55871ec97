/** `snowflock nat` as a person uses it, and the daemon's part. */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { NAT_RUN_DIR, type NatView } from '../../src/nat/gateway.js';
import { NatKeeper } from '../../src/sfld/nat.js';
import { NatLab, OTHERS, SERVER } from './lab.js';

let lab: NatLab;
let file: string;

const POLICY = {
  version: 1,
  dns_servers: ['192.0.2.53'],
  default: { allow: [{ name: 'web', protocol: 'tcp', to: [`${SERVER}/32`], ports: [80] }] },
};

beforeEach(async () => {
  lab = await NatLab.create();
  file = join(lab.runDir, 'policy.json');
  writeFileSync(file, JSON.stringify(POLICY));
});

afterEach(async () => {
  if (lab !== undefined) snowflock('nat', 'rm', '--yes'); // its policy is in /run/snowflock
  await lab?.destroy();
});

function snowflock(...args: string[]) {
  const main = join(projectRoot, 'dist/src/cli/main.js');
  const command = [`--net=${lab.host.netns.path}`, process.execPath, main, ...args];
  const { status, stdout, stderr } = spawnSync('nsenter', command, { encoding: 'utf8' });
  return { status, stdout, stderr };
}

test('apply, show, explain and rm, with figures as JSON and statuses that say what happened', async () => {
  const { netns } = lab.guest(7, 1);
  await lab.serve(80);
  expect(snowflock('nat', 'explain', '10.86.0.3', `${SERVER}:80`).status).toBe(5);
  const applied = snowflock('nat', 'apply', file, '--json');
  expect(applied.stderr).toBe('');
  expect(JSON.parse(applied.stdout)).toEqual({ families: [7], failed: {} });
  for (const to of [SERVER, OTHERS[0]]) await lab.peers.ask(netns, 'tcp', { to, port: 80 });

  const view = JSON.parse(snowflock('nat', 'show', '--json').stdout) as NatView;
  expect(view).toMatchObject({
    applied: true,
    gateways: [
      { family: 7, address: '100.86.0.1', counters: { 'refused-outbound': { packets: 1 } } },
    ],
  });
  expect(view.gateways[0]?.counters['allow-web-out']?.packets).toBeGreaterThan(3);
  expect(snowflock('nat', 'show').stdout).toMatch(/7 +refused-outbound +1 +60/);

  const allowed = snowflock('nat', 'explain', '10.86.0.3', `${SERVER}:80`);
  expect(allowed.status).toBe(0);
  expect(allowed.stdout).toBe(`allow: rule web allows tcp to ${SERVER}/32 (counter allow-web)\n`);
  const refused = snowflock('nat', 'explain', '10.86.0.3', `${SERVER}:81`, '--json');
  expect(refused.status).toBe(1);
  expect(JSON.parse(refused.stdout)).toMatchObject({
    family: 7,
    verdict: 'refuse',
    counter: 'refused-outbound',
  });
  expect(snowflock('nat', 'explain', '10.86.0.3', SERVER, '--protocol', 'icmp').status).toBe(1);
  expect(snowflock('nat', 'explain', '8.8.8.8', `${SERVER}:80`).status).toBe(2);

  writeFileSync(file, JSON.stringify({ ...POLICY, allow: [] }));
  const wrong = snowflock('nat', 'apply', file);
  expect(wrong.status).toBe(2);
  expect(wrong.stderr).toContain('/allow: unknown name');
  expect(snowflock('nat', 'show', '--uplink', 'lo').status).toBe(4);

  expect(snowflock('nat', 'rm', '--yes').status).toBe(0);
  expect(JSON.parse(snowflock('nat', 'show', '--json').stdout)).toEqual({
    applied: false,
    host_name: hostname(),
    router: null,
    gateways: [],
    host: {},
  });
});

test('net detach takes gateways with it: without the filter nothing else could', () => {
  const { netns } = lab.host;
  const look = () => ({
    links: netns.exec('ip', '-o', 'link').match(/\bsf[gn][\da-f]{6}@/g) ?? [],
    rules: netns.exec('nft', 'list', 'ruleset', 'ip'),
    forwarding: netns.exec('cat', '/proc/sys/net/ipv4/ip_forward').trim(),
    spaces: netns.exec('ip', 'netns', 'list').match(/^sfnat-\S+/gm) ?? [],
  });
  const before = look();
  lab.guest(7, 1);
  expect(snowflock('nat', 'apply', file).status).toBe(0);
  expect(look().links).toHaveLength(2);
  // Nobody is there to say yes.
  expect(snowflock('net', 'detach', 'eth0').stderr).toContain('1 NAT gateways');
  expect(look().links).toHaveLength(2);
  const done = snowflock('net', 'detach', 'eth0', '--yes', '--json');
  expect(JSON.parse(done.stdout)).toEqual({ uplink: 'eth0', vms: 1, gateways: 1 });
  expect(look()).toEqual(before);
});

test('the daemon: a gateway comes with the first VM of a family and goes with the last', async () => {
  await lab.serve(80);
  const { filter, ...inLab } = lab.place();
  const place = { ...inLab, runDir: NAT_RUN_DIR }; // where the command looks
  lab.nat = lab.newNat(0, place);
  const log = pino({ level: 'silent' });
  const families = {
    web: { ...POLICY.default, inbound: [{ name: 'in', protocol: 'tcp', port: 99 }] },
  };
  writeFileSync(file, JSON.stringify({ version: 1, dns_servers: ['192.0.2.53'], families }));
  const nameOf = (family: number) => (family === 7 ? 'web' : undefined);
  const keeper = new NatKeeper({ file, filter, log, nameOf, place });
  expect(keeper.lease).toEqual({ router: '10.86.0.1', dns: ['192.0.2.53'] });
  keeper.start();
  await keeper.settled();
  const gateways = async () => (await lab.nat.view()).gateways.map(({ family }) => family);
  expect(await gateways()).toEqual([]);

  const [named, other] = [lab.guest(7, 0), lab.guest(8, 0)];
  keeper.changed();
  await keeper.settled();
  expect(await gateways()).toEqual([7, 8]);
  const connect = async (guest: typeof named) =>
    (await lab.peers.ask(guest.netns, 'tcp', { to: SERVER, port: 80 })).outcome;
  expect([await connect(named), await connect(other)]).toEqual(['ok', 'ECONNREFUSED']);

  // Another process does not know the names, and does as the daemon did.
  await lab.newNat(0, place).sync();
  expect([await connect(named), await connect(other)]).toEqual(['ok', 'ECONNREFUSED']);

  // `explain` says the same.
  const explained = (from: string, to: string, ...more: string[]) => {
    const { stdout, stderr } = snowflock('nat', 'explain', from, to, '--json', ...more);
    if (stdout === '') throw new Error(stderr);
    const { family, verdict, counter } = JSON.parse(stdout) as Record<string, unknown>;
    return { family, verdict, counter };
  };
  const allowed = { family: 7, verdict: 'allow', counter: 'allow-web' };
  const web = `${SERVER}:80`;
  expect(explained('10.86.0.2', web, '--family', '7')).toEqual(allowed);
  expect(explained('10.86.0.2', web, '--family', 'web')).toEqual(allowed);
  const refused = { family: 8, verdict: 'refuse', counter: 'refused-outbound' };
  expect(explained('10.86.0.2', web, '--family', '8')).toEqual(refused);
  const into = { family: 7, verdict: 'allow', counter: 'inbound-in' };
  expect(explained(OTHERS[0] ?? '', 'host:99')).toEqual(into);
  // Of a file the names are known and no numbers.
  const byFile = explained('10.86.0.2', web, '--family', 'web', '--file', file);
  expect(byFile).toEqual({ ...allowed, family: null });
  const portOfFile = explained(OTHERS[0] ?? '', 'host:99', '--file', file);
  expect(portOfFile).toEqual({ ...into, family: null });

  filter.removeVm(named.tap);
  keeper.changed();
  await keeper.settled();
  expect(await gateways()).toEqual([8]);
  await keeper.close(false);
  expect(await gateways()).toEqual([8]);

  // A policy that is wrong ends the start of the daemon.
  writeFileSync(file, '{');
  expect(() => new NatKeeper({ file, filter, log, nameOf, place })).toThrow(
    expect.objectContaining({ code: 'E_CONFIG' }),
  );
});

/** VMs that daemons boot and fork, with `nat_policy` in host.json: the guests' own traffic. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import type { NatView } from '../../src/nat/gateway.js';
import { startDaemonOn, type TestbedDaemon } from '../../src/testbed/daemons.js';
import { Lab, sh, until } from '../fork/lab.js';
import { run } from '../netback-filter/lab.js';
import { Peers } from './lab.js';

/** The machine outside: the testbed's switch. */
const OUTSIDE = '10.85.0.250';
const LIMIT_MS = 30_000;
const folder = mkdtempSync(join(tmpdir(), 'sfnatvm-'));
const file = join(folder, 'nat.json');
const ALLOW = { allow: [{ name: 'web', protocol: 'tcp', to: [OUTSIDE], ports: [80] }] };
const INBOUND = { inbound: [{ name: 'in', protocol: 'tcp', port: 2222, to_port: 22 }] };
const POLICY = { version: 1, default: ALLOW, families: { parent: { ...ALLOW, ...INBOUND } } };
/** Answers with what it is sent; clones have it from their parent. */
const SERVER = 'nc -ll -p 22 -e /bin/cat >/dev/null 2>&1 & echo $! >/run/server';

let lab: Lab;
let peers: Peers;
let outside: { path: string };

beforeAll(async () => {
  writeFileSync(file, JSON.stringify(POLICY));
  lab = await Lab.start(2, { nat_policy: file });
  const name = lab.daemon(0).host.netns.replace(/h1$/, 'br');
  run('ip', '-n', name, 'address', 'add', `${OUTSIDE}/24`, 'dev', 'br0');
  outside = { path: `/run/netns/${name}` };
  peers = new Peers();
  for (const port of [80, 81]) {
    await peers.ask(outside, 'serve_tcp', { address: OUTSIDE, port });
  }
});

afterAll(async () => {
  peers?.close();
  await lab?.destroy();
  rmSync(folder, { recursive: true, force: true });
});

async function snowflock({ host }: TestbedDaemon, ...args: string[]): Promise<string> {
  const main = join(projectRoot, 'dist/src/cli/main.js');
  const done = await lab.testbed.execIn(host, [process.execPath, main, 'nat', ...args]);
  if (done.status !== 0) throw new Error(`nat ${args.join(' ')}: ${done.stderr}`);
  return done.stdout;
}

const shown = async (daemon: TestbedDaemon): Promise<NatView> =>
  JSON.parse(await snowflock(daemon, 'show', '--json')) as NatView;

const gateways = (daemon: TestbedDaemon, wanted: number): Promise<void> =>
  until(`${wanted} gateways on ${daemon.host.name}\n${lab.logs()}`, LIMIT_MS, async () => {
    return (await shown(daemon)).gateways.length === wanted;
  });

const count = async (daemon: TestbedDaemon, name: string): Promise<number> =>
  (await shown(daemon)).gateways[0]?.counters[name]?.packets ?? 0;

/** From a guest to the machine outside: what was said comes back. */
const says = (vm: string): Promise<string> =>
  sh(lab.client, vm, `echo hello | nc -w 5 ${OUTSIDE} 80`);

const inbound = async (to: string): Promise<string> =>
  (await peers.ask(outside, 'tcp', { to, port: 2222 })).outcome;

test('a VM and its clones reach what is allowed through their own hosts, and nothing else', async () => {
  const [first, second] = [lab.daemon(0), lab.daemon(1)];
  const vm = await lab.parent('parent');
  await gateways(first, 1);
  expect(await says(vm)).toBe('hello');
  const refused = await sh(lab.client, vm, `nc -w 5 ${OUTSIDE} 81 </dev/null 2>&1`, 1);
  expect(refused).toContain('refused');
  expect(await count(first, 'refused-outbound')).toBe(1);
  expect(await snowflock(first, 'show')).toMatch(/refused-outbound +1 +60/);
  expect((await shown(second)).gateways).toEqual([]);

  await sh(lab.client, vm, SERVER);
  await until('the server', LIMIT_MS, async () => (await inbound(first.host.address)) === 'ok');
  const fork = await lab.fork(vm, 2);
  const far = fork.clones.find((clone) => clone.host === second.host.name);
  expect(new Set(fork.clones.map((clone) => clone.host)).size).toBe(2);
  await gateways(second, 1);
  for (const clone of fork.clones) expect(await says(clone.vm)).toBe('hello');
  expect(await count(second, 'allow-web-out')).toBeGreaterThan(3);
  // Clones serve the port as well, and only the parent is reached.
  expect(await inbound(second.host.address)).toBe('ECONNREFUSED');
  expect(await inbound(first.host.address)).toBe('ok');
  await sh(lab.client, vm, 'kill $(cat /run/server)');
  const ended = async () => (await inbound(first.host.address)) === 'ECONNREFUSED';
  await until("the end of the parent's server", LIMIT_MS, ended);
  for (const clone of fork.clones) await sh(lab.client, clone.vm, 'kill -0 $(cat /run/server)');

  // The daemon dies, its gateway goes on, and so does the next daemon.
  second.process.kill('SIGKILL');
  const open = 'echo one; sleep 1; echo two';
  if (far === undefined) throw new Error('no clone on the second host');
  await until('the end of the daemon', LIMIT_MS, async () => second.process.signalCode !== null);
  expect((await shown(second)).gateways.length).toBe(1);
  lab.daemons[1] = await startDaemonOn(lab.testbed, second.host);
  expect(await sh(lab.client, far.vm, `(${open}) | nc -w 5 ${OUTSIDE} 80`)).toBe('one\ntwo');
  expect(await count(lab.daemon(1), 'allow-web-out')).toBeGreaterThan(8);

  await lab.client.killClones(vm, { fork: fork.id });
  await gateways(lab.daemon(1), 0);
  expect(await says(vm)).toBe('hello');
  await lab.client.kill(vm);
  await gateways(first, 0);
  expect((await shown(first)).host).toEqual({});
});

test('one host is the router: a VM of the other goes through it as long as it is there', async () => {
  const [first, second] = [lab.daemon(0), lab.daemon(1)];
  writeFileSync(file, JSON.stringify({ ...POLICY, router: first.host.name }));
  for (const daemon of [first, second]) await snowflock(daemon, 'apply', file);
  const vm = await second.client.run({
    name: 'parent',
    image: 'minimal',
    ram_bytes: 256 * 2 ** 20,
    vcpus: 1,
  });
  await gateways(first, 1);
  expect(await says(vm.id)).toBe('hello');
  expect(await count(first, 'allow-web-out')).toBeGreaterThan(3);
  expect(await shown(second)).toMatchObject({ router: first.host.name, gateways: [] });
  await sh(lab.client, vm.id, SERVER);
  await until('the server', LIMIT_MS, async () => (await inbound(first.host.address)) === 'ok');
  await second.client.kill(vm.id);
  await gateways(first, 0);
});

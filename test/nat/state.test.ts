/** Who may change a host's gateways, and when: the lock, and the uplink that they belong to. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { NetbackFilter } from '../../src/netback-filter/filter.js';
import { filterIn } from '../../src/testbed/filter-in.js';
import { NatLab, SERVER } from './lab.js';

const POLICY = {
  default: { allow: [{ name: 'web', protocol: 'tcp', to: [SERVER], ports: [80] }] },
};
const NOBODY = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
let lab: NatLab;
const children: ChildProcess[] = [];

beforeEach(async () => {
  lab = await NatLab.create();
});

afterEach(async () => {
  for (const child of children.splice(0)) {
    const gone = child.exitCode === null && child.signalCode === null && once(child, 'exit');
    child.stdin?.end(); // its `cat` ends, and so the lock
    await gone;
  }
  await lab?.destroy();
});

/** What a process that locks the file says: `locked`, and it keeps the lock; or why it cannot. */
async function lock(path: string, ...as: string[]): Promise<string> {
  const holding = ['flock', '--exclusive', path, 'sh', '-c', 'echo locked; exec cat'];
  const [name = '', ...args] = [...as, ...holding];
  const child = spawn(name, args, { stdio: 'pipe' });
  children.push(child);
  const said = Promise.race([once(child.stdout, 'data'), once(child.stderr, 'data')]);
  return String((await said)[0]).trim();
}

test('who is not root cannot keep gateways from being changed', async () => {
  chmodSync(lab.runDir, 0o755); // as /run/snowflock
  expect(await lock(lab.runDir, ...NOBODY)).toBe('locked');
  lab.guest(7, 1);
  expect(await lab.apply(POLICY)).toMatchObject({ families: [7] });
  const file = join(lab.runDir, 'nat.lock');
  expect(statSync(file).mode & 0o777).toBe(0o600);
  expect(await lock(file, ...NOBODY)).toContain('Permission denied');
});

test('one process changes gateways at a time', async () => {
  await lab.apply(POLICY);
  expect(await lock(join(lab.runDir, 'nat.lock'))).toBe('locked');
  lab.guest(7, 1);
  const order: string[] = [];
  const synced = lab.nat.sync().then(() => order.push('synced'));
  await waits(lab.runDir);
  order.push('released');
  for (const child of children) child.stdin?.end();
  await synced;
  expect(order).toEqual(['released', 'synced']);
});

/** Until a process waits for the lock. */
async function waits(runDir: string): Promise<void> {
  const inode = statSync(join(runDir, 'nat.lock')).ino;
  const waiting = new RegExp(`-> FLOCK .*:${inode} `);
  await expect.poll(() => waiting.test(readFileSync('/proc/locks', 'utf8'))).toBe(true);
}

test('gateways on one uplink are not taken down by a command for another', async () => {
  const guest = lab.guest(7, 1);
  await lab.serve(80);
  await lab.apply(POLICY);
  const { netns } = lab.host;
  netns.exec(...'ip link add eth1 address 02:00:00:00:05:03 type veth'.split(' '));
  const other = await netns.do(() => NetbackFilter.attach({ uplink: 'eth1' }));
  try {
    const second = lab.newNat(0, { filter: filterIn(other, netns.path) });
    const policy = { version: 1 as const };
    const refused = { code: 'E_STATE', message: expect.stringContaining('--uplink eth0') };
    for (const work of [
      () => second.sync(),
      () => second.refresh(),
      () => second.apply(policy),
      () => second.remove(),
      () => second.view(),
    ]) {
      await expect(work()).rejects.toMatchObject(refused);
    }
    const connect = async () =>
      (await lab.peers.ask(guest.netns, 'tcp', { to: SERVER, port: 80 })).outcome;
    expect(await connect()).toBe('ok');
    expect(await lab.nat.sync()).toEqual([7]);

    // When they have been taken away, or their uplink has gone, the other one can have gateways.
    expect(await lab.nat.remove()).toEqual([7]);
    expect(await second.apply(policy)).toEqual({ families: [], failed: {} });
  } finally {
    netns.do(() => other.detach());
    other.close();
  }
});

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { addressOfVmid } from '../../src/network/addresses.js';
import { gained, Lab, type Namespace } from './lab.js';

let lab: Lab | undefined;
afterEach(() => lab?.destroy());

const BYTES = 8 << 20;

/** Sends 8 MiB by TCP from one namespace to another; both sides print the same hash. */
async function transfer(from: Namespace, to: Namespace, address: string): Promise<void> {
  const script = join(projectRoot, 'test/netback-filter/tcp-peer.mjs');
  const start = (netns: Namespace, ...words: string[]) =>
    spawn('ip', ['netns', 'exec', netns.name, process.execPath, script, ...words], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
  const server = start(to, 'listen', address);
  try {
    server.stdout.setEncoding('utf8');
    const [port] = (await once(server.stdout, 'data')) as [string];
    const received = once(server.stdout, 'data');
    const client = start(from, 'send', address, port.trim(), String(BYTES));
    try {
      client.stdout.setEncoding('utf8');
      const [sent] = (await once(client.stdout, 'data')) as [string];
      expect(sent).toMatch(/^8388608 [0-9a-f]{64}\n$/);
      expect(await received).toEqual([sent]);
    } finally {
      client.kill('SIGKILL');
    }
  } finally {
    server.kill('SIGKILL');
  }
}

test("the hosts' own traffic on the uplinks is untouched", async () => {
  lab = await Lab.create(2);
  const [a, b] = [lab.host(0), lab.host(1)];
  a.guest(1, 0);
  a.netns.exec('busybox', 'ping', '-c', '2', '-W', '5', b.address);
  const before = a.stats();
  await transfer(a.netns, b.netns, b.address);
  expect(gained(before, a.stats())).toEqual({});
});

test('guests with whole network stacks talk TCP and ping, on one host and across', async () => {
  lab = await Lab.create(2);
  const guests = [
    lab.host(0).stackGuest(1, 0),
    lab.host(0).stackGuest(1, 1),
    lab.host(1).stackGuest(1, 2),
  ];
  guests.forEach(({ netns }, vmid) => {
    netns.exec('ip', 'address', 'add', `${addressOfVmid(vmid)}/16`, 'dev', 'eth0');
  });
  const [parent, sibling, remote] = guests.map((guest) => guest.netns);
  if (parent === undefined || sibling === undefined || remote === undefined) throw new Error();
  for (const [to, vmid] of [
    [sibling, 1],
    [remote, 2],
  ] as const) {
    parent.exec('busybox', 'ping', '-c', '1', '-W', '5', addressOfVmid(vmid));
    // Larger than the MTU: IPv4 fragments.
    parent.exec('busybox', 'ping', '-c', '1', '-W', '5', '-s', '4000', addressOfVmid(vmid));
    await transfer(parent, to, addressOfVmid(vmid));
    await transfer(to, parent, addressOfVmid(0));
  }
});

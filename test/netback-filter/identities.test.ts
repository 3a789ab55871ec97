import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, expect, test } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { wireMac } from '../../src/network/addresses.js';
import { arp } from './frames.js';
import { Guest, gained, Lab } from './lab.js';

const FAMILY = 64;
const CLONES = 64;
const ADDERS = 4; // processes on each host
const execute = promisify(execFile);
let lab: Lab | undefined;
afterEach(() => lab?.destroy());

test('64 clones added at once: own MAC, IP and tap each, and the first try reaches the parent', async () => {
  lab = await Lab.create(2);
  const here = lab.host(0);
  const parent = here.guest(FAMILY, 0);
  const clones: Guest[] = [];
  for (let vmid = 1; vmid <= CLONES; vmid++) {
    const host = lab.host(vmid % 2);
    const tap = lab.interfaceName();
    const clone = new Guest(host, tap, { family: FAMILY, vmid }, host.tap(tap));
    lab.onDestroy(() => clone.close());
    clones.push(clone);
  }
  // From processes of their own, none of which waits for another.
  const script = join(projectRoot, 'test/netback-filter/add-vms.mjs');
  const batches = lab.hosts.flatMap((host) => {
    const vms = clones
      .filter((clone) => clone.host === host)
      .map(({ tap, identity }) => ({ tap, ...identity }));
    return Array.from({ length: ADDERS }, (_, at) => ({
      netns: host.netns.name,
      vms: vms.filter((_vm, index) => index % ADDERS === at),
    }));
  });
  await Promise.all(
    batches.map(({ netns, vms }) =>
      execute('ip', ['netns', 'exec', netns, process.execPath, script, JSON.stringify(vms)]),
    ),
  );

  const known = lab.hosts.flatMap((host) => host.attached.vms());
  expect(known).toHaveLength(CLONES + 1);
  for (const of of [(it: (typeof known)[0]) => it.tap, (it: (typeof known)[0]) => it.ip, wireMac]) {
    expect(new Set(known.map(of)).size).toBe(CLONES + 1);
  }

  const before = here.stats();
  for (const clone of clones) {
    clone.send(arp({ senderIp: clone.ip, targetIp: parent.ip }));
    clone.send(clone.frameTo(parent, `first of ${clone.identity.vmid}.`));
  }
  for (const clone of clones) {
    const text = `first of ${clone.identity.vmid}.`;
    expect(await parent.receive((it) => it.includes(text))).toEqual(clone.arrivingAt(parent, text));
    const answer = await clone.receive();
    expect(answer.subarray(22, 28).toString('hex')).toBe(parent.wireMac.replaceAll(':', ''));
  }
  expect(parent.frames).toHaveLength(CLONES);
  expect(gained(before, here.stats())).toEqual({
    arp_answered: CLONES / 2,
    guest_to_local: CLONES / 2,
    wire_to_guest: CLONES / 2,
  });
});

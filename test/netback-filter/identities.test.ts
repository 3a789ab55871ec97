/**
 * Identities of 64 clones: given out by what gives them out for forks (tickets of two hosts, asked
 * for at once, by a parent and by a clone of it), put into the filters by many processes at once.
 */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { pino } from 'pino';
import { afterEach, expect, test } from 'vitest';
import { Resources, type Ticket, TicketBook } from '../../src/allocator/index.js';
import { projectRoot } from '../../src/common/native.js';
import { wireMac } from '../../src/network/addresses.js';
import type { Host as DaemonHost, LiveVm } from '../../src/sfld/host.js';
import { LocalHost } from '../../src/sfld/local-host.js';
import type { VmRecord } from '../../src/sfld/records.js';
import { Store } from '../../src/sfld/store.js';
import { requestTicket } from '../../src/sfld/tickets.js';
import { arp } from './frames.js';
import { Guest, gained, Lab } from './lab.js';

const FAMILY = 64;
const CLONES = 64;
const ADDERS = 4; // processes on each host
const execute = promisify(execFile);
const TICKETS = 16;
const RAM_BYTES = 2 ** 27;
let lab: Lab | undefined;
let folder: string | undefined;
afterEach(() => {
  lab?.destroy();
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

/** Of two daemons what gives room and numbers out, h1 being the family's host. */
async function daemons(): Promise<[DaemonHost, DaemonHost]> {
  folder = mkdtempSync(join(tmpdir(), 'sf-identities-'));
  const hosts: DaemonHost[] = [];
  const unused = () => {
    throw new Error('no clone is made here');
  };
  const ports = ['h1', 'h2'].map((name, at) => {
    const own = () => hosts[at] as DaemonHost;
    return new LocalHost(name, own, unused, unused);
  });
  const peers = { all: () => ports, get: (name: string) => ports.find((it) => it.name === name) };
  for (const { name } of ports) {
    const stateDir = join(folder, name);
    const limits = { cpus: CLONES, memoryBytes: CLONES * RAM_BYTES };
    hosts.push({
      config: { name, stateDir },
      log: pino({ level: 'silent' }),
      resources: new Resources({ ...limits, overcommit: { cpus: 1, memory: 1 } }),
      tickets: new TicketBook(),
      peers,
      vms: await Store.open<VmRecord>(join(stateDir, 'vms')),
    } as unknown as DaemonHost);
  }
  const [one, two] = hosts;
  if (one === undefined || two === undefined) throw new Error('two hosts were made');
  return [one, two];
}

function vm(vmid: number): LiveVm {
  const of = { family: FAMILY, family_host: 'h1', vmid, ram_bytes: RAM_BYTES, vcpus: 1 };
  const record = { ...of, id: `vm${vmid}`, name: `vm${vmid}`, next_vmid: 1 };
  return { record: record as VmRecord } as LiveVm;
}

/** Where each of the clones runs that the tickets are for: host and vmid. */
async function allocate(): Promise<{ host: 0 | 1; vmid: number }[]> {
  const [one, two] = await daemons();
  const parent = vm(0);
  await one.vms.save(parent.record);
  const tickets: Ticket[] = await Promise.all(
    Array.from({ length: TICKETS }, (_, at) =>
      at % 2 === 0
        ? requestTicket(one, parent, CLONES / TICKETS)
        : requestTicket(two, vm(0xf000), CLONES / TICKETS),
    ),
  );
  return tickets.flatMap(({ placements, vmids }) => {
    const where = placements.flatMap(({ host, clones }) =>
      Array.from({ length: clones }, () => (host === 'h1' ? 0 : 1) as 0 | 1),
    );
    return vmids.map((vmid, at) => ({ host: where[at] ?? 0, vmid }));
  });
}

test('64 clones added at once: own MAC, IP and tap each, and the first try reaches the parent', async () => {
  lab = await Lab.create(2);
  const here = lab.host(0);
  const parent = here.guest(FAMILY, 0);
  const clones: Guest[] = [];
  const places = await allocate();
  expect(places).toHaveLength(CLONES);
  for (const { host: at, vmid } of places) {
    const host = lab.host(at);
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

  const local = clones.filter((clone) => clone.host === here).length;
  expect(local).toBeGreaterThan(0);
  expect(local).toBeLessThan(CLONES);
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
    arp_answered: local,
    guest_to_local: local,
    wire_to_guest: CLONES - local,
  });
});

/** The parent's host dies: clones whose pages are on living hosts do not notice. Real guests. */
import { afterEach, expect, it, vi } from 'vitest';
import type { CloneResult, ReplicaSummary } from '../../src/api/client.js';
import { Lab, sh, until } from './lab.js';

// Three emulated guests boot, fork and hash on two cores; leases pass in real time.
vi.setConfig({ testTimeout: 300_000 });

const RAM_MIB = 128;
const LEASE_MS = 4000;
const HASH = 'echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/shm/data /root/data';
/** No limit that matters here. */
const FILL = { prefetch_bytes_per_s: 1e9, prefetch_ram_bytes_per_s: 1e9 };

let lab: Lab | undefined;
afterEach(async () => {
  const ended = lab;
  lab = undefined;
  await ended?.destroy();
});

interface Family {
  lab: Lab;
  vm: string;
  fork: string;
  hash: string;
  /** The clone on host `index`. */
  clone: (index: number) => string;
}

/** Hosts with own settings; a parent with data on the first, and one clone on each host. */
async function family(own: Record<string, unknown>[], lease_ms = LEASE_MS): Promise<Family> {
  lab = await Lab.start(own.length, { lease_ms }, own);
  const here = lab;
  const { vm, hash } = await parent(here);
  const fork = await here.fork(vm, own.length);
  return {
    lab: here,
    vm,
    fork: fork.id,
    hash,
    clone: (index) => cloneOn(here, fork.clones, index),
  };
}

async function parent(here: Lab): Promise<{ vm: string; hash: string }> {
  const vm = await here.parent('parent', RAM_MIB);
  const hash = await sh(
    here.client,
    vm,
    `mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs none /dev/shm; } &&
     dd if=/dev/urandom of=/dev/shm/data bs=1M count=12 2>/dev/null &&
     dd if=/dev/urandom of=/root/data bs=1M count=8 2>/dev/null && sync && ${HASH}`,
  );
  return { vm, hash };
}

function cloneOn(here: Lab, clones: CloneResult[], index: number): string {
  const found = clones.find((one) => one.host === here.daemon(index).host.name);
  if (found === undefined) throw new Error(`no clone on host ${index}`);
  if (!found.ok) throw new Error(`${found.error?.message}\n${here.logs()}`);
  return found.vm;
}

/** Replicas of a host, as its own daemon shows them. */
async function replicas(here: Lab, index: number): Promise<ReplicaSummary[]> {
  const { client, host } = here.daemon(index);
  const all = await client.replicas();
  return all.replicas.filter((one) => one.host === host.name);
}

function complete(here: Lab, index: number): Promise<void> {
  // The disk has two million pages, nearly all of them zero.
  return until(`host ${index} holds all`, 180_000, async () => {
    const found = await replicas(here, index);
    return found.length === 2 && found.every((one) => one.complete);
  });
}

function sourceIs(here: Lab, index: number, state: string): Promise<void> {
  return until(`host ${index} sees its source ${state}`, 60_000, async () => {
    const found = await replicas(here, index);
    return found.length === 2 && found.every((one) => one.source.state === state);
  });
}

async function runsOn(here: Lab, index: number): Promise<string[]> {
  const { client, host } = here.daemon(index);
  const { vms } = await client.list();
  return vms.filter((vm) => vm.host === host.name).map((vm) => vm.id);
}

/** Hashes memory and disk over and over in the guest; what it saw goes to a file. */
async function keepHashing(here: Lab, index: number, vm: string): Promise<void> {
  await sh(
    here.daemon(index).client,
    vm,
    `(while :; do ${HASH} | md5sum >> /root/seen; done) >/dev/null 2>&1 </dev/null &`,
  );
}

it('clones whose hosts hold all live on when the host of their parent dies, and after its return', async () => {
  const { lab: here, vm, hash, clone } = await family([{}, FILL, FILL]);
  await keepHashing(here, 1, clone(1));
  await complete(here, 1);
  await complete(here, 2);
  for (const one of await replicas(here, 1)) {
    expect(one).toMatchObject({ served: true, source: { host: 'h1', state: 'live' } });
  }
  await here.powerOff(0);
  const diedAt = Date.now();
  const rounds = (): Promise<number> =>
    sh(here.daemon(1).client, clone(1), 'wc -l < /root/seen').then(Number);
  const before = await rounds();
  await sourceIs(here, 1, 'lost');
  for (const one of await replicas(here, 1)) {
    expect(one).toMatchObject({ needed_pages: 0, unheld_pages: 0 });
  }
  // For longer than any lease.
  await until('two leases have passed', 60_000, async () => Date.now() - diedAt > 2 * LEASE_MS);
  expect(await runsOn(here, 1)).toEqual([clone(1)]);
  expect(await rounds()).toBeGreaterThan(before);
  expect(await sh(here.daemon(2).client, clone(2), HASH)).toBe(hash);
  // An operator can end one where it runs, though nobody can join it.
  await here.daemon(2).client.kill(clone(2));
  expect(await runsOn(here, 2)).toEqual([]);

  await here.powerOn(0);
  await sourceIs(here, 1, 'ended');
  expect(await runsOn(here, 0)).toEqual([]);
  expect(await runsOn(here, 1)).toEqual([clone(1)]);
  expect((await here.client.list()).vms.map((one) => one.id)).not.toContain(vm);
  const { client } = here.daemon(1);
  expect(await sh(client, clone(1), HASH)).toBe(hash);
  const seen = await sh(
    client,
    clone(1),
    'cat /root/seen; wc -l < /root/seen; sort -u /root/seen | wc -l',
  );
  expect(seen.split('\n').at(-1)?.trim()).toBe('1');
  await client.kill(clone(1));
  for (const daemon of here.daemons) expect(await here.remnants(daemon)).toEqual([]);
});

it('a clone gets what it lacks from another host when its source is dead, also after its data plane died', async () => {
  lab = await Lab.start(3, { lease_ms: LEASE_MS }, [{}, FILL, {}]);
  const here = lab;
  const { vm, hash } = await parent(here);
  const checkpoint = await here.client.checkpoint(vm);
  const clones = async (): Promise<(index: number) => string> => {
    const { ticket } = await here.client.requestTicket(vm, 3);
    const fork = await here.client.createClones(vm, checkpoint.id, ticket);
    return (index) => cloneOn(here, fork.clones.slice(-3), index);
  };
  const early = await clones();
  await complete(here, 1);
  // What the first clone on the third host overheard goes with it; the next one begins with nothing.
  await here.client.kill(early(2));
  const late = await clones();
  const [ram] = await replicas(here, 2);
  expect(ram?.complete).toBe(false);
  await here.powerOff(0);
  await sourceIs(here, 2, 'lost');
  const shown = await replicas(here, 2);
  for (const one of shown) expect(one).toMatchObject({ unheld_pages: 0, held_by: ['h2'] });
  await here.killDataplane(2);
  expect(await sh(here.daemon(2).client, late(2), HASH)).toBe(hash);
  expect(await sh(here.daemon(1).client, late(1), HASH)).toBe(hash);
});

it('a clone whose pages are nowhere ends with its lease, and says why', async () => {
  const { lab: here } = await family([{}, {}]);
  await here.powerOff(0);
  await until('the orphan has ended', 60_000, async () => (await runsOn(here, 1)).length === 0);
  expect(here.logs()).toMatch(/pages of its generations are on no other host/);
  expect(await here.remnants(here.daemon(1))).toEqual([]);
});

it('a partition: short, nobody notices; long, what the parent gave up ends; so does what it killed meanwhile', async () => {
  // Longer than it takes to suspect, so that a short one is well within the lease.
  const { lab: here, vm, fork, hash, clone } = await family([{}, FILL], 20_000);
  const { host } = here.daemon(1);
  const partition = async (meanwhile: () => Promise<void>): Promise<void> => {
    here.testbed.cut(host);
    try {
      await meanwhile();
    } finally {
      here.testbed.heal(host);
    }
  };
  const nobodyRuns = (): Promise<void> =>
    until('nobody runs what is given up', 60_000, async () => {
      return (await runsOn(here, 1)).length === 0;
    });

  await partition(() => sourceIs(here, 1, 'lost'));
  await sourceIs(here, 1, 'live');
  expect(await sh(here.daemon(1).client, clone(1), HASH)).toBe(hash);
  const now = await here.client.fork(fork);
  expect(now.fork.clones.map((one) => one.end)).toEqual([null, null]);

  await complete(here, 1);
  await partition(async () => {
    await until('the parent learns that it is lost', 60_000, async () => {
      const { clones } = (await here.client.fork(fork)).fork;
      return clones.some((one) => one.host === 'h2' && one.end?.reason === 'lost');
    });
    expect(await sh(here.daemon(1).client, clone(1), HASH)).toBe(hash);
  });
  await nobodyRuns();
  expect(here.logs()).toMatch(/had given it up/);
  expect(await sh(here.client, vm, HASH)).toBe(hash);

  const second = await here.fork(vm, 2);
  await complete(here, 1);
  await partition(async () => {
    await here.client.kill(vm);
    expect(await runsOn(here, 0)).toEqual([]);
    const left = cloneOn(here, second.clones, 1);
    expect(await sh(here.daemon(1).client, left, HASH)).toBe(hash);
  });
  await nobodyRuns();
  for (const daemon of here.daemons) expect(await here.remnants(daemon)).toEqual([]);
});

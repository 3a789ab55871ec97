/** Hosts of later clones are sent what earlier clones touched first. Real guests. */
import { afterEach, expect, it, vi } from 'vitest';
import type { WireStats } from '../../src/api/client.js';
import { count } from '../../src/sfld/holdings.js';
import { Lab, MIB, sh, until } from './lab.js';

// An emulated guest boots, forks and hashes on two cores.
vi.setConfig({ testTimeout: 300_000 });

const HASH = 'echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/shm/data /root/data';

let lab: Lab | undefined;
afterEach(async () => {
  const ended = lab;
  lab = undefined;
  await ended?.destroy();
});

async function parent(here: Lab): Promise<{ vm: string; hash: string }> {
  const vm = await here.parent('parent', 128);
  const hash = await sh(
    here.client,
    vm,
    `mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs none /dev/shm; } &&
     dd if=/dev/urandom of=/dev/shm/data bs=1M count=8 2>/dev/null &&
     dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null && sync && ${HASH}`,
  );
  return { vm, hash };
}

interface Sent {
  ram: Record<string, number>;
  disk: Record<string, number>;
}

/** What a fork's generations were asked for and sent since `before`. */
async function sent(here: Lab, fork: string, before?: Sent): Promise<Sent> {
  const { wire } = await here.client.fork(fork);
  if (wire === null) throw new Error('no counters');
  const since = (kind: keyof WireStats): Record<string, number> =>
    Object.fromEntries(
      Object.entries(wire[kind]).map(([name, value]) => [
        name,
        value - (before?.[kind][name] ?? 0),
      ]),
    );
  return { ram: since('ram'), disk: since('disk') };
}

/** The same small work in the clone on each host. */
async function work(here: Lab, clones: { vm: string }[], hash: string): Promise<void> {
  for (const { vm } of clones) expect(await sh(here.client, vm, HASH)).toBe(hash);
}

it('clones of a later fork of the same parent ask for a small part of what those of the first did', async () => {
  lab = await Lab.start(2);
  const here = lab;
  const { vm, hash } = await parent(here);
  const rounds: Sent[] = [];
  for (let round = 0; round < 2; round++) {
    const fork = await here.fork(vm, 2);
    await work(here, fork.clones, hash);
    rounds.push(await sent(here, fork.id));
    await here.client.killClones(vm, { fork: fork.id });
  }
  const [first, second] = rounds;
  for (const kind of ['ram', 'disk'] as const) {
    const [a, b] = [first?.[kind], second?.[kind]];
    console.log(
      `${kind}: asked ${a?.pagesRequested}, then ${b?.pagesRequested}, ${b?.pagesReplayed} replayed`,
    );
    // One of the hosts may come when the other's clone has faulted.
    expect(a?.pagesReplayed).toBeLessThan(1000);
    expect(a?.historyPages).toBeGreaterThan(1000);
    expect(b?.pagesReplayed).toBeGreaterThan(1000);
    expect(b?.pagesRequested).toBeLessThan((a?.pagesRequested ?? 0) / 4);
  }
});

it('so do clones made later of one checkpoint: each host is sent as many pages as are set', async () => {
  lab = await Lab.start(2, {}, [{ replay_bytes: 16 * 4096 }]);
  const here = lab;
  const { vm, hash } = await parent(here);
  const checkpoint = await here.client.checkpoint(vm);
  const round = async (): Promise<Sent> => {
    const before = await sent(here, checkpoint.id);
    const { ticket } = await here.client.requestTicket(vm, 2);
    const { clones } = await here.client.createClones(vm, checkpoint.id, ticket);
    const made = clones.slice(-2);
    await work(here, made, hash);
    for (const { vmid } of made) await here.client.killClones(vm, { vmid });
    // A clone that came before would stand on what the earlier ones fetched.
    await until('the replicas are gone', 30_000, async () => {
      return (await here.client.replicas()).replicas.length === 0;
    });
    return sent(here, checkpoint.id, before);
  };
  // One of the hosts may come when the other's clone has faulted.
  const first = await round();
  const second = await round();
  for (const kind of ['ram', 'disk'] as const) {
    expect(first[kind].pagesReplayed).toBeLessThanOrEqual(16);
    expect(second[kind].pagesReplayed).toBeGreaterThanOrEqual(16);
    expect(second[kind].pagesReplayed).toBeLessThanOrEqual(32);
  }
});

it('what is named as disjoint is answered to each host alone, and nothing else is', async () => {
  lab = await Lab.start(2, { replay_bytes: 0 });
  const here = lab;
  const { vm, hash } = await parent(here);
  await expect(
    here.client.setDisjoint(vm, { disk: [{ offset_bytes: 2 ** 50, size_bytes: 4096 }] }),
  ).rejects.toMatchObject({ code: 'E_ARGUMENT' });
  const whole = { offset_bytes: 0, size_bytes: 128 * MIB };
  expect(await here.client.setDisjoint(vm, { ram: [whole] })).toEqual({
    ram: [0, (128 * MIB) / 4096],
    disk: [],
  });
  const alone = async (): Promise<{ ram: number; disk: number; asked: number }> => {
    const fork = await here.fork(vm, 2);
    await work(here, fork.clones, hash);
    const { ram, disk } = await sent(here, fork.id);
    await here.client.killClones(vm, { fork: fork.id });
    return {
      ram: (ram.unicastAnswers ?? 0) / (ram.pagesServed ?? 0),
      disk: (disk.unicastAnswers ?? 0) / (disk.pagesServed ?? 0),
      asked: ram.pagesRequested ?? 0,
    };
  };
  const named = await alone();
  expect(named.ram).toBe(1);
  expect(named.disk).toBeLessThan(0.5);
  await here.client.setDisjoint(vm, {});
  const shared = await alone();
  expect(shared.ram).toBeLessThan(0.5);
  console.log(`pages of RAM asked: ${named.asked} disjoint, ${shared.asked} multicast`);
  // Said in the guest, of a file: where it lies on the disk, as far as it is cut into whole pages.
  await sh(here.client, vm, 'sf disjoint /root/data');
  const { disjoint } = await here.fork(vm, 1);
  expect(disjoint.ram).toEqual([]);
  expect(count(disjoint.disk)).toBe((4 * MIB) / 4096);
  await expect(sh(here.client, vm, 'sf disjoint /proc/cmdline')).rejects.toThrow('not on the VM');
});

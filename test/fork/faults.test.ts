import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { startDaemonOn } from '../../src/testbed/daemons.js';
import { dataplanePid, Lab, sh, until } from './lab.js';

const HASH = 'echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/shm/data /root/data';

describe('failures during and after a fork', () => {
  let lab: Lab;
  let vm: string;
  let before: string;

  beforeAll(async () => {
    lab = await Lab.start(2, { lease_ms: 4000 });
    vm = await lab.parent('parent');
    before = await sh(
      lab.client,
      vm,
      `mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs none /dev/shm; } &&
       dd if=/dev/urandom of=/dev/shm/data bs=1M count=48 2>/dev/null &&
       dd if=/dev/urandom of=/root/data bs=1M count=24 2>/dev/null && sync && ${HASH}`,
    );
  });
  afterAll(() => lab?.destroy());

  it.each([
    ["the clones' host", 1],
    ["the parent's host", 0],
  ])('SIGKILL of the data plane on %s while pages are outstanding', async (_where, index) => {
    const fork = await lab.fork(vm, 4);
    const daemon = lab.daemon(index);
    const pid = await dataplanePid(daemon.host.dirs.run);
    const hashes = fork.clones.map((clone) => sh(lab.client, clone.vm, HASH));
    // Pages are on their way: the clones read 72 MiB of RAM and disk, and hold a part of it.
    const watched = fork.clones.find((clone) => clone.host === daemon.host.name);
    const dataPages = (48 * 2 ** 20) / 4096;
    await until('the clones have begun to read', 30_000, async () => {
      const { replica_present: present } = await lab.client.counters(watched?.vm ?? '');
      return present > 2_000;
    });
    const { replica_present: present } = await lab.client.counters(watched?.vm ?? '');
    process.kill(pid, 'SIGKILL');
    expect(present).toBeLessThan(dataPages);
    for (const hash of await Promise.all(hashes)) expect(hash).toBe(before);
    expect(await dataplanePid(daemon.host.dirs.run)).not.toBe(pid);
    await sh(lab.client, vm, HASH).then((hash) => expect(hash).toBe(before));
    await lab.client.killClones(vm, { fork: fork.id });
  });

  it('sfld killed: VMs continue and are found again', async () => {
    const fork = await lab.fork(vm, 2);
    const daemon = lab.daemon(0);
    const pids = vmPids(lab);
    const used = async (): Promise<number> => (await lab.client.host()).groups.used;
    const groups = await used();
    expect(groups).toBeGreaterThanOrEqual(2);
    daemon.process.kill('SIGKILL');
    await new Promise((resolve) => daemon.process.once('exit', resolve));
    lab.daemons[0] = await startDaemonOn(lab.testbed, daemon.host);
    expect(vmPids(lab)).toEqual(pids);
    expect(await used()).toBe(groups);
    const { vms } = await lab.client.list();
    expect(new Set(vms.map((one) => one.id))).toEqual(
      new Set([vm, ...fork.clones.map((clone) => clone.vm)]),
    );
    await until('the guest agent answers again', 30_000, () =>
      sh(lab.client, vm, 'true').then(
        () => true,
        () => false,
      ),
    );
    for (const clone of fork.clones) expect(await sh(lab.client, clone.vm, HASH)).toBe(before);
    expect(await lab.client.killClones(vm, { fork: fork.id })).toBe(2);
  });

  it('a host cut off during a fork costs its own clones only, and nothing is left behind', async () => {
    const ticket = await lab.client.requestTicket(vm, 4);
    lab.testbed.cut(lab.daemon(1).host);
    try {
      const fork = await lab.client.clone(vm, ticket.ticket);
      const byHost = (name: string) => fork.clones.filter((clone) => clone.host === name);
      expect(byHost('h1').length).toBeGreaterThan(0);
      expect(byHost('h2').length).toBeGreaterThan(0);
      for (const clone of byHost('h1')) {
        expect(clone.ok).toBe(true);
        expect(await sh(lab.client, clone.vm, HASH)).toBe(before);
      }
      for (const clone of byHost('h2')) {
        expect(clone.ok).toBe(false);
        expect(clone.error?.code).toMatch(/^E_(PEER|TIMEOUT)$/);
        expect(clone.error?.message).toContain('h2');
      }
      expect(await sh(lab.client, vm, HASH)).toBe(before);
      await lab.client.killClones(vm, { fork: fork.id });
    } finally {
      lab.testbed.heal(lab.daemon(1).host);
    }
    await until('the cut host is clean', 60_000, async () => {
      const { vms } = await lab.daemon(1).client.list();
      return vms.every((one) => one.host !== 'h2');
    });
    for (const daemon of lab.daemons) expect(await lab.remnants(daemon)).toEqual([]);
  });

  it('a clone whose parent host vanished ends when its lease runs out; the parent learns of it', async () => {
    const fork = await lab.fork(vm, 2);
    const remote = fork.clones.filter((clone) => clone.host === 'h2');
    expect(remote.length).toBeGreaterThan(0);
    lab.testbed.cut(lab.daemon(1).host);
    try {
      await until('the parent learns of it', 60_000, async () => {
        const now = await lab.client.fork(fork.id);
        return now.fork.clones.every((clone) => clone.host === 'h1' || clone.end !== null);
      });
    } finally {
      lab.testbed.heal(lab.daemon(1).host);
    }
    await until('the orphan has ended', 60_000, async () => {
      const { vms } = await lab.daemon(1).client.list();
      return vms.every((one) => one.host !== 'h2');
    });
    const { fork: now } = await lab.client.fork(fork.id);
    for (const clone of now.clones.filter((one) => one.host === 'h2')) {
      expect(clone.end?.reason).toBe('lost');
    }
    await lab.client.killClones(vm, { fork: fork.id });
  });

  // From before the capture to after the clones' start, which takes some 100 ms here.
  it.each([0, 10, 20, 40, 80, 160])(
    'sfld killed %i ms into a fork leaves the parent running and nothing half made',
    async (delayMs) => {
      const daemon = lab.daemon(0);
      const ticket = await lab.client.requestTicket(vm, 2);
      const fork = lab.client.clone(vm, ticket.ticket).catch(() => undefined);
      await new Promise((resolve) => setTimeout(resolve, delayMs));
      daemon.process.kill('SIGKILL');
      await fork;
      await new Promise((resolve) =>
        daemon.process.exitCode !== null || daemon.process.signalCode !== null
          ? resolve(undefined)
          : daemon.process.once('exit', resolve),
      );
      lab.daemons[0] = await startDaemonOn(lab.testbed, daemon.host);
      await until('the parent works', 30_000, () =>
        sh(lab.client, vm, 'true').then(
          () => true,
          () => false,
        ),
      );
      for (const one of (await lab.client.forks()).forks) {
        const alive = one.clones.some((clone) => clone.end === null);
        if (alive) await lab.client.killClones(vm, { fork: one.id });
      }
      await until('nothing is left', 60_000, async () => {
        const left = await Promise.all(lab.daemons.map((one) => lab.remnants(one)));
        const { vms } = await lab.client.list();
        return left.flat().length === 0 && vms.length === 1;
      });
      // The parent is whole, and can be forked again.
      expect(await sh(lab.client, vm, HASH)).toBe(before);
      const again = await lab.fork(vm, 2);
      for (const clone of again.clones) expect(await sh(lab.client, clone.vm, HASH)).toBe(before);
      await lab.client.killClones(vm, { fork: again.id });
    },
  );
});

/** Process ids of all VMs, from the daemons' own records. */
function vmPids(lab: Lab): number[] {
  return lab
    .records()
    .map((record) => record.hypervisor?.pid ?? 0)
    .sort((a, b) => a - b);
}

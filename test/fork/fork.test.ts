import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Lab, sh, until } from './lab.js';

// Large enough that most of it is not touched by the guest on its own.
const RAM_DATA_MIB = 64;
const DISK_DATA_MIB = 32;
const HASH = 'md5sum /dev/shm/data /root/data';
/** Drops clean pages, so that the disk's data is read from the disk. */
const COLD = 'echo 3 > /proc/sys/vm/drop_caches';

describe('a fork', () => {
  let lab: Lab;
  let vm: string;
  let before: string;

  beforeAll(async () => {
    lab = await Lab.start(2);
    vm = await lab.parent('parent');
    before = await sh(
      lab.client,
      vm,
      `mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs none /dev/shm; } &&
       dd if=/dev/urandom of=/dev/shm/data bs=1M count=${RAM_DATA_MIB} 2>/dev/null &&
       dd if=/dev/urandom of=/root/data bs=1M count=${DISK_DATA_MIB} 2>/dev/null && sync &&
       ${COLD} && ${HASH}`,
    );
  });
  afterAll(() => lab?.destroy());

  it('gives each clone the RAM and disk of the instant, while the parent overwrites both', async () => {
    const fork = await lab.fork(vm, 4);
    // The parent overwrites everything as fast as it can while the clones read.
    const overwritten = sh(
      lab.client,
      vm,
      `dd if=/dev/zero of=/dev/shm/data bs=1M count=${RAM_DATA_MIB} conv=notrunc 2>/dev/null &&
       dd if=/dev/zero of=/root/data bs=1M count=${DISK_DATA_MIB} conv=notrunc 2>/dev/null && sync &&
       ${COLD} && ${HASH}`,
    );
    const hashes = await Promise.all(
      fork.clones.map((clone) => sh(lab.client, clone.vm, `${COLD} && ${HASH}`)),
    );
    for (const hash of hashes) expect(hash).toBe(before);
    expect(await overwritten).not.toBe(before);
    // What a clone writes is its own.
    const [one, other] = fork.clones;
    if (one === undefined || other === undefined) throw new Error('four clones were asked for');
    await sh(lab.client, one.vm, 'echo mine > /root/mine && sync');
    await sh(lab.client, other.vm, 'test ! -e /root/mine');
    await sh(lab.client, vm, 'test ! -e /root/mine');
    await lab.client.killClones(vm, { fork: fork.id });
  });

  it('binds identity: vmid, address, hostname and randomness differ, the parent keeps its own', async () => {
    const fork = await lab.fork(vm, 3);
    const ask =
      'sf info --json; ip -4 -o addr show eth0; hostname; head -c 16 /dev/urandom | md5sum';
    const said = await Promise.all(
      [vm, ...fork.clones.map((clone) => clone.vm)].map((one) => sh(lab.client, one, ask)),
    );
    expect(said[0]).toContain('10.86.0.2/16');
    for (const [i, clone] of fork.clones.entries()) {
      expect(said[i + 1]).toContain(`${clone.ip}/16`);
    }
    const last = said.map((text) => text.split('\n').at(-1));
    expect(new Set(last).size).toBe(4);
    expect(new Set(fork.clones.map((clone) => clone.wire_mac)).size).toBe(3);
    // Each VM's process is a user of its own, without privileges, in QEMU's sandbox.
    const users = lab.records().map((record) => {
      const status = readFileSync(`/proc/${record.hypervisor?.pid}/status`, 'utf8');
      expect(status).toMatch(/^Seccomp:\t2$/m);
      expect(status).toMatch(/^CapEff:\t0+$/m);
      return `${record.hypervisor?.run_dir.split('/')[2]} ${/^Uid:\t(\d+)/m.exec(status)?.[1]}`;
    });
    // Hosts of a testbed share the machine's numbers; VMs of one host never do.
    const hosts = lab.records().map((record) => record.hypervisor?.run_dir.split('/')[3]);
    const own = users.map((user, i) => `${hosts[i]} ${user}`);
    expect(new Set(own).size).toBe(4);
    // Each reaches the parent at once.
    for (const clone of fork.clones) await sh(lab.client, clone.vm, 'ping -c 1 -W 5 10.86.0.2');
    await lab.client.killClones(vm, { fork: fork.id });
  });

  it('fetches a small part of the RAM, and nothing of a clone is left when it has ended', async () => {
    const fork = await lab.fork(vm, 2);
    for (const clone of fork.clones) {
      await until('a reply of each clone', 60_000, async () => {
        const now = await lab.client.fork(fork.id);
        return now.fork.clones.every((one) => one.reply_ms !== null);
      });
      const counters = await lab.client.counters(clone.vm);
      expect(counters.replica_present).toBeGreaterThan(0);
      expect(counters.replica_present).toBeLessThan(counters.ram_pages / 4);
    }
    await lab.client.killClones(vm, { fork: fork.id });
    const { vms } = await lab.client.list();
    expect(vms.map((one) => one.id)).toEqual([vm]);
    for (const daemon of lab.daemons) expect(await lab.remnants(daemon)).toEqual([]);
  });

  it('called in the guest returns 0 in the parent and the vmid in each clone, and joins', async () => {
    const out = await sh(
      lab.client,
      vm,
      `set -- $(sf ticket 3); ticket=$1; id=$(sf clone $ticket) || exit 1
       if [ "$id" != 0 ]; then echo $id > /root/id; sync; sf exit $((id % 7)); sleep 60; fi;
       sf join $ticket; test $? = 4`,
    );
    const fork = (await lab.client.forks()).forks.at(-1);
    for (const clone of fork?.clones ?? []) {
      expect(clone.end).toMatchObject({ reason: 'exit', status: clone.vmid % 7 });
      expect(out.split('\n')).toContain(`${clone.vmid} ${clone.vmid % 7}`);
    }
    expect(fork?.clones.length).toBe(3);
  });

  it('of a clone makes a family tree: the grandchild has what its parent had', async () => {
    const first = await lab.fork(vm, 1);
    const child = first.clones[0];
    if (child === undefined) throw new Error('one clone was asked for');
    const on = lab.daemons.find(({ host }) => host.name === child.host);
    if (on === undefined) throw new Error('no such host');
    const mark = 'cat /dev/shm/mark /root/mark';
    await sh(on.client, child.vm, 'echo ram > /dev/shm/mark && echo disk > /root/mark && sync');
    const hash = await sh(on.client, child.vm, `${COLD} && ${HASH}`);
    const ticket = await on.client.requestTicket(child.vm, 2);
    const second = await on.client.clone(child.vm, ticket.ticket);
    for (const clone of second.clones) {
      expect(clone.error).toBeNull();
      expect(await sh(on.client, clone.vm, `${COLD} && ${mark} && ${HASH}`)).toBe(
        `ram\ndisk\n${hash}`,
      );
    }
    const vmids = [...first.clones, ...second.clones].map((clone) => clone.vmid);
    expect(new Set(vmids).size).toBe(3);
    await lab.client.kill(child.vm);
    const { vms } = await lab.client.list();
    expect(vms.map((one) => one.id)).toEqual([vm]);
  });

  it('can be taken as a checkpoint, and cloned later, more than once', async () => {
    await sh(lab.client, vm, 'echo then > /dev/shm/when');
    const checkpoint = await lab.client.checkpoint(vm);
    await sh(lab.client, vm, 'echo now > /dev/shm/when');
    for (let round = 0; round < 2; round++) {
      const ticket = await lab.client.requestTicket(vm, 1);
      const fork = await lab.client.createClones(vm, checkpoint.id, ticket.ticket);
      const clone = fork.clones.at(-1);
      expect(clone?.error).toBeNull();
      expect(await sh(lab.client, clone?.vm ?? '', 'cat /dev/shm/when')).toBe('then');
      await lab.client.kill(clone?.vm ?? '');
    }
    await lab.client.releaseCheckpoint(checkpoint.id);
    await expect(
      lab.client.createClones(vm, checkpoint.id, (await lab.client.requestTicket(vm, 1)).ticket),
    ).rejects.toMatchObject({ code: 'E_NOT_FOUND' });
  });
});

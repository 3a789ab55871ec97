/** The parent's host dies; no living host holds all that a clone lacks, but several do together. */
import { createConnection } from 'node:net';
import { createInterface } from 'node:readline';
import { afterEach, expect, it, vi } from 'vitest';
import { Lab, MIB, sh, until } from './lab.js';

// An emulated guest boots, forks and hashes on two cores; leases pass in real time.
vi.setConfig({ testTimeout: 300_000 });

const RAM_MIB = 128;
const HASH = 'echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/shm/data /root/data';

let lab: Lab | undefined;
afterEach(async () => {
  const ended = lab;
  lab = undefined;
  await ended?.destroy();
});

it('a clone gets from several hosts what they hold only together, also where no multicast arrives', async () => {
  // The second host gets all of the disk; RAM comes as it is touched only.
  lab = await Lab.start(4, { lease_ms: 6000 }, [{}, { prefetch_bytes_per_s: 1e9 }]);
  const here = lab;
  // The other two do not overhear what it fetches, are answered each alone, and hear no announce.
  for (const { host } of here.daemons.slice(2)) {
    for (const words of [
      'add table ip unicast',
      'add chain ip unicast in { type filter hook prerouting priority -300 ; }',
      'add rule ip unicast in udp length gt 0 ip daddr 224.0.0.0/4 drop',
    ]) {
      await here.testbed.execIn(host, ['nft', words]);
    }
  }
  const vm = await here.parent('parent', RAM_MIB);
  const hash = await sh(
    here.client,
    vm,
    `mkdir -p /dev/shm && { mountpoint -q /dev/shm || mount -t tmpfs none /dev/shm; } &&
     dd if=/dev/urandom of=/dev/shm/data bs=1M count=24 2>/dev/null &&
     dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null && sync && ${HASH}`,
  );
  const fork = await here.fork(vm, 4);
  const cloneOn = (index: number): string => {
    const found = fork.clones.find((one) => one.host === here.daemon(index).host.name);
    if (found === undefined) throw new Error(`no clone on host ${index}`);
    return found.vm;
  };
  const ramOn = async (index: number) => {
    const { replicas } = await here.daemon(index).client.replicas();
    const name = here.daemon(index).host.name;
    const found = replicas.find((one) => one.host === name && one.kind === 'ram');
    if (found === undefined) throw new Error(`no replica on host ${index}`);
    return found;
  };
  // The memory of one clone is read from the begin to beyond the middle, of another one from there.
  const part = (RAM_MIB / 2) * MIB;
  await Promise.all([read(here, cloneOn(1), 0, part), read(here, cloneOn(2), part, part)]);
  await until('a host holds the disk', 180_000, async () => {
    const { replicas } = await here.daemon(1).client.replicas();
    return replicas.some((one) => one.host === 'h2' && one.kind === 'disk' && one.complete);
  });
  for (let index = 1; index < 4; index++) {
    expect(await ramOn(index)).toMatchObject({ complete: false });
  }
  await here.powerOff(0);
  await until('the source is lost', 60_000, async () => (await ramOn(3)).source.state === 'lost');
  const shown = await ramOn(3);
  expect(shown.held_by.sort()).toEqual(['h2', 'h3']);
  expect(shown).toMatchObject({ unheld_pages: 0 });
  expect(shown.needed_pages).toBeGreaterThan(24 * 256);
  // It needs pages of both.
  expect(await sh(here.daemon(3).client, cloneOn(3), HASH)).toBe(hash);
  expect((await ramOn(3)).held_pages).toBeGreaterThan(shown.held_pages + 24 * 128);
});

/** Has QEMU read a part of a clone's memory, which fetches it. */
async function read(here: Lab, vm: string, first: number, bytes: number): Promise<void> {
  const record = here.records().find((one) => one.id === vm)?.hypervisor;
  if (record === undefined || record === null) throw new Error(`${vm} does not run`);
  const monitor = createConnection(record.watchdog_socket);
  const lines = createInterface({ input: monitor })[Symbol.asyncIterator]();
  const command = async (execute: string, args: object): Promise<void> => {
    monitor.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    for (;;) {
      const { value, done } = await lines.next();
      if (done === true) throw new Error(`the monitor of ${vm} closed`);
      const reply = JSON.parse(value) as { error?: { desc: string }; return?: unknown };
      if (reply.error !== undefined) throw new Error(`${execute}: ${reply.error.desc}`);
      if (reply.return !== undefined) return;
    }
  };
  try {
    await command('qmp_capabilities', {});
    // In steps, so that the guest gets its turns.
    for (let at = first; at < first + bytes; at += 4 * MIB) {
      await command('pmemsave', { val: at, size: 4 * MIB, filename: '/dev/null' });
    }
  } finally {
    monitor.destroy();
  }
}

/**
 * What a fork costs: the parent's pause (and that it does not grow), the time to a running clone,
 * bytes on the wire for 1 and for 8 clones. Beside it, in the same run, what stock QEMU needs for the
 * same VM: a cold boot, and a full save and restore of its state and RAM.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, chownSync, mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { ForkRecord, SnowflockClient } from '../src/api/client.js';
import { exec } from '../src/api/exec.js';
import { GuestChannel } from '../src/api/guest-channel.js';
import { SnowflockError } from '../src/common/errors.js';
import type { VmSpec } from '../src/hypervisor/driver.js';
import { QemuDriver } from '../src/hypervisor/qemu/driver.js';
import { defaultImageDir, findImage } from '../src/image/images.js';
import { configure, startDaemons } from '../src/testbed/daemons.js';
import { Testbed } from '../src/testbed/testbed.js';
import type { Bench } from './lib/bench.js';
import { summarize } from './lib/stats.js';
import { ratio, spread } from './lib/table.js';

const RAM_BYTES = 512 * 2 ** 20;
const VM_ID = 64_947;
/** Does the pause grow with RAM? These have nothing in most of it, as a guest that has just booted. */
const SIZES_MIB = [512, 2048, 4096];
/** What the VM holds when it is forked, or saved. */
const LOAD = 'dd if=/dev/urandom of=/run/data bs=1M count=64';

const bench: Bench = {
  name: 'fork',
  description: "forking a VM of 512 MiB, beside QEMU's own boot, save and restore",
  async run({ quick, log, signal }) {
    const stop = (): void => {
      if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'bench fork was interrupted');
    };
    log('a testbed of 4 hosts');
    const testbed = await Testbed.create({ hosts: 4 });
    const single: ForkRecord[] = [];
    const eight: ForkRecord[] = [];
    const bySize: { ram_mib: number; pause_ms: number[] }[] = [];
    const bytes = { one: [] as number[], eight: [] as number[] };
    let bootMs = 0;
    try {
      for (const host of testbed.hosts) await configure(host, { image_dir: defaultImageDir() });
      const daemons = await startDaemons(testbed);
      const client = daemons[0]?.client;
      if (client === undefined) throw new SnowflockError('E_INTERNAL', 'a testbed has a host');
      log('boot of the parent');
      const began = performance.now();
      await client.run({ name: 'parent', image: 'minimal', ram_bytes: RAM_BYTES, vcpus: 1 });
      bootMs = performance.now() - began;
      await work(client, 'parent', LOAD);
      const rounds = quick ? 3 : 20;
      for (let round = 0; round < rounds; round++) {
        stop();
        log(`fork ${round + 1} of ${rounds}: one clone`);
        const done = await oneFork(client, 1);
        single.push(done.fork);
        bytes.one.push(done.bytes);
      }
      for (let round = 0; round < (quick ? 1 : 5); round++) {
        stop();
        log(`8 clones on 4 hosts, round ${round + 1}`);
        const done = await oneFork(client, 8);
        eight.push(done.fork);
        bytes.eight.push(done.bytes);
      }
      await client.kill('parent');
      for (const ram_mib of SIZES_MIB) {
        stop();
        log(`forks of a VM of ${ram_mib} MiB`);
        bySize.push({ ram_mib, pause_ms: await pauses(client, ram_mib, quick ? 3 : 7) });
      }
    } finally {
      await testbed.destroy();
    }
    stop();
    log('stock QEMU: boot, full save, full restore of the same VM');
    const peer = await stockQemu(quick ? 1 : 5);

    const pause = single.map((fork) => fork.parent_pause_ms ?? Number.NaN);
    const running = single.map((fork) => fork.fork_ms ?? Number.NaN);
    const all8 = eight.map((fork) => fork.fork_ms ?? Number.NaN);
    const restore = summarize(peer.restoreMs);
    const saved = summarize(peer.saveMs);
    const row = (what: string, values: number[], goalMs?: number): (string | number)[] => {
      const summary = summarize(values);
      const factor = ratio(saved.median + restore.median, summary.median);
      return [what, spread(summary), goalMs === undefined ? '' : `≤ ${goalMs}`, factor];
    };
    return {
      tables: [
        {
          title: 'Time, ms: median (min–max); how many times faster than full save and restore',
          columns: ['what', 'ms', 'goal', 'factor'],
          rows: [
            row('parent pause, first 5 forks', pause.slice(0, 5), 20),
            row('parent pause, last 5 forks', pause.slice(-5), 20),
            row('one clone running, from the request', running, 250),
            row('8 clones on 4 hosts running', all8, 1500),
            row('QEMU full save', peer.saveMs),
            row('QEMU full restore', peer.restoreMs),
            row('QEMU cold boot to the guest agent', peer.bootMs),
          ],
        },
        {
          title: 'Parent pause by size of RAM, ms: median (min–max)',
          columns: ['MiB', 'ms'],
          rows: bySize.map(({ ram_mib, pause_ms }) => [ram_mib, spread(summarize(pause_ms))]),
        },
        {
          title: 'Size',
          columns: ['what', 'bytes', 'of RAM'],
          rows: [
            [
              'descriptor',
              spread(summarize(single.map((f) => f.descriptor_bytes))),
              share(single[0]?.descriptor_bytes),
            ],
            [
              'sent, one clone until it answered',
              spread(summarize(bytes.one)),
              share(summarize(bytes.one).median),
            ],
            [
              'sent, 8 clones until they answered',
              spread(summarize(bytes.eight)),
              share(summarize(bytes.eight).median),
            ],
            [
              'QEMU full save',
              spread(summarize(peer.saveBytes)),
              share(summarize(peer.saveBytes).median),
            ],
          ],
        },
      ],
      figures: {
        ram_bytes: RAM_BYTES,
        parent_pause_ms: pause,
        one_clone_running_ms: running,
        eight_clones_running_ms: all8,
        descriptor_bytes: single.map((fork) => fork.descriptor_bytes),
        dirty_pages: single.map((fork) => fork.dirty_pages),
        wire_bytes_one: bytes.one,
        wire_bytes_eight: bytes.eight,
        wire_ratio_eight_to_one: summarize(bytes.eight).median / summarize(bytes.one).median,
        boot_ms: bootMs,
        parent_pause_by_size: bySize,
        qemu: peer,
      },
      notes: [
        `bytes for 8 clones over bytes for one (goal: ≤ 1.3): ${(summarize(bytes.eight).median / summarize(bytes.one).median).toFixed(2)}`,
      ],
    };
  },
};

export default bench;

function share(bytes: number | undefined): string {
  return `${((100 * (bytes ?? 0)) / RAM_BYTES).toFixed(2)}%`;
}

async function work(client: SnowflockClient, vm: string, script: string): Promise<void> {
  const child = await exec(client, vm, ['/bin/sh', '-c', script]);
  child.stdin.end();
  child.stdout.resume();
  child.stderr.resume();
  const { status } = await child.exited;
  if (status !== 0) throw new SnowflockError('E_GUEST', `${script} ended with ${status} in ${vm}`);
}

/** A parent of that size, with the same data in it; the pause of each of its forks. */
async function pauses(client: SnowflockClient, ram_mib: number, forks: number): Promise<number[]> {
  const spec = { image: 'minimal', ram_bytes: ram_mib * 2 ** 20, vcpus: 1 };
  await client.run({ name: 'parent', ...spec });
  await work(client, 'parent', LOAD);
  const found: number[] = [];
  for (let round = 0; round < forks; round++) {
    const { fork } = await oneFork(client, 1);
    found.push(fork.parent_pause_ms ?? Number.NaN);
  }
  await client.kill('parent');
  return found;
}

/** One fork; the same small work in each clone; then the bytes its generations cost. */
async function oneFork(
  client: SnowflockClient,
  clones: number,
): Promise<{ fork: ForkRecord; bytes: number }> {
  const ticket = await client.requestTicket('parent', clones);
  if (ticket.granted !== clones) {
    throw new SnowflockError('E_CAPACITY', `granted ${ticket.granted} of ${clones} clones`);
  }
  const fork = await client.clone('parent', ticket.ticket);
  const failed = fork.clones.find((clone) => !clone.ok);
  if (failed !== undefined) {
    throw new SnowflockError('E_CLONE_START', failed.error?.message ?? 'a clone failed');
  }
  await Promise.all(fork.clones.map((clone) => work(client, clone.vm, 'md5sum /run/data')));
  const { wire } = await client.fork(fork.id);
  await client.killClones('parent', { fork: fork.id });
  return { fork, bytes: (wire?.ram.wireBytes ?? 0) + (wire?.disk.wireBytes ?? 0) };
}

interface Peer {
  bootMs: number[];
  saveMs: number[];
  restoreMs: number[];
  saveBytes: number[];
}

/** The same machine and image on stock QEMU, RAM its own: boots, saves all, restores all. */
async function stockQemu(runs: number): Promise<Peer> {
  const image = await findImage(defaultImageDir(), 'minimal');
  const folder = mkdtempSync('/dev/shm/sf-bench-');
  const user = { uid: VM_ID, gid: VM_ID };
  const children: ChildProcess[] = [];
  const peer: Peer = { bootMs: [], saveMs: [], restoreMs: [], saveBytes: [] };
  try {
    chownSync(folder, user.uid, user.gid);
    const nbd = join(folder, 'nbd.sock');
    children.push(
      spawn(
        'qemu-nbd',
        [
          '--snapshot',
          '--persistent',
          '--shared=0',
          '-f',
          'raw',
          '-x',
          'disk',
          '-k',
          nbd,
          image.diskPath,
        ],
        { stdio: 'ignore', env: { ...process.env, TMPDIR: folder } },
      ),
    );
    for (let tries = 0; ; tries++) {
      try {
        chmodSync(nbd, 0o666);
        break;
      } catch (error) {
        if (tries > 500) throw error;
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    }
    const driver = new QemuDriver({
      user,
      maxStateBytes: 2 * RAM_BYTES,
      memory: () => ({ 'qom-type': 'memory-backend-ram' }),
    });
    for (let run = 0; run < runs; run++) {
      const spec = (name: string): VmSpec => ({
        id: `${name}${run}`,
        runDir: join(folder, `${name}${run}`),
        ramBytes: RAM_BYTES,
        vcpus: 1,
        disk: { nbdSocket: nbd, exportName: 'disk' },
        boot: {
          kernel: image.kernelPath,
          initrd: image.initrdPath,
          cmdline: image.manifest.cmdline,
        },
        user,
      });
      const bootAt = performance.now();
      const vm = await driver.boot(spec('boot'));
      const channel = new GuestChannel({ socketPath: vm.record.channel_socket });
      try {
        await channel.connect();
        await channel.hello({
          epoch: `boot-${run}`,
          vmid: 0,
          family: 0,
          hostname: 'bench',
          seed: randomBytes(32).toString('hex'),
        });
        peer.bootMs.push(performance.now() - bootAt);
        const load = channel.exec({ argv: ['/bin/sh', '-c', LOAD] });
        load.stdin.end();
        load.stdout.resume();
        load.stderr.resume();
        const loaded = await load.exited;
        if (loaded.status !== 0) throw new SnowflockError('E_GUEST', `${LOAD} failed`);
        const saveAt = performance.now();
        await vm.pause();
        const state = await vm.captureState({ timeoutMs: 120_000 });
        peer.saveMs.push(performance.now() - saveAt);
        peer.saveBytes.push(state.length);
        const restoreAt = performance.now();
        const copy = await driver.prepareClone(spec('copy'), vm.shape);
        try {
          await copy.loadState(state, { timeoutMs: 120_000 });
          await copy.run();
          peer.restoreMs.push(performance.now() - restoreAt);
        } finally {
          await copy.destroy();
        }
      } finally {
        channel.close();
        await vm.destroy();
      }
    }
    return peer;
  } finally {
    for (const child of children) child.kill('SIGKILL');
    rmSync(folder, { recursive: true, force: true });
  }
}

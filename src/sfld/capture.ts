/**
 * Capturing a VM: its RAM and disk become one generation each, its device state goes into a
 * descriptor (paper section 3.2).
 *
 * Order, and why it is safe:
 *   1. forkBegin      memtap protects RAM while the VM runs; what is written meanwhile is noted
 *   2. pause          no vCPU runs, I/O is drained: what the disk and RAM hold now is the instant
 *   3. captureState   device state; QEMU may still touch RAM here, so it comes before 4
 *   4. commit + seal  the pages noted in 1 are protected again; the disk's top slice is sealed
 *   5. resume         from here on every write copies the old page into the generation first
 * Whatever fails, the VM is resumed and the generation given up; if this process dies, the data
 * plane's watchdog does both.
 */
import { rm, writeFile } from 'node:fs/promises';
import { SnowflockError } from '../common/errors.js';
import { Undo } from '../common/undo.js';
import { encodeDescriptor } from '../descriptor/index.js';
import { bitmapOfRuns } from '../descriptor/zero-map.js';
import { rescueVm } from '../hypervisor/index.js';
import { GUEST_MAC, NETWORK, PREFIX_BITS } from '../network/addresses.js';
import type { Host, LiveVm } from './host.js';
import type { ForkRecord, GenerationRef } from './records.js';

export interface Capture {
  /** The parent runs again. Rejects with what failed; it runs then too. */
  resumed: Promise<void>;
  /** The descriptor's bytes, once the generations are served. Rejects as `resumed` does. */
  descriptor: Promise<Buffer>;
}

/** Captures into `fork`: its state goes from `capturing` to `open`. */
export function captureVm(host: Host, live: LiveVm, fork: ForkRecord): Capture {
  const paused = pauseAndCapture(host, live, fork);
  return {
    resumed: paused.then(() => {}),
    descriptor: paused.then((captured) => publish(host, live, fork, captured)),
  };
}

interface Captured {
  state: Buffer;
  zeroRuns: number[];
}

async function pauseAndCapture(host: Host, live: LiveVm, fork: ForkRecord): Promise<Captured> {
  const { record, vm } = live;
  const call = host.dataplane.call;
  if (record.hypervisor === null) {
    throw new SnowflockError('E_STATE', `VM ${record.name} is not running`);
  }
  // Known before anything is made: a daemon that dies in here finds at its next start what to drop.
  await host.forks.save(fork);
  let sealed = false;
  try {
    await allDone([
      call('vm.fork_begin', {
        vm: record.id,
        generation: fork.ram.generation,
        directory: fork.ram_directory,
        rescue: record.hypervisor,
      }),
      call('disk.prepare_fork', { disk: record.id }),
    ]);
    const pausedAt = performance.now();
    let captured: Captured;
    try {
      await vm.pause();
      const state = await vm.captureState();
      if (live.guard !== undefined) fork.connections = live.guard.connections();
      const [commit] = await allDone([
        call('vm.fork_commit', { vm: record.id, generation: fork.ram.generation }),
        call('disk.fork', { disk: record.id, generation: fork.disk.generation }).then(() => {
          sealed = true;
        }),
      ]);
      captured = { state, zeroRuns: commit.zero_runs };
      fork.dirty_pages = commit.dirty_pages;
    } finally {
      // By its second monitor if the first is not to be had: a parent never stays paused.
      const rescue = record.hypervisor;
      await vm.resume().catch(() => rescueVm(rescue));
    }
    fork.parent_pause_ms = performance.now() - pausedAt;
    await call('vm.fork_end', { vm: record.id });
    return captured;
  } catch (error) {
    fork.state = 'closed';
    await giveUp(host, fork, sealed);
    await host.forks.remove(fork.id);
    throw error;
  }
}

async function publish(
  host: Host,
  live: LiveVm,
  fork: ForkRecord,
  { state, zeroRuns }: Captured,
): Promise<Buffer> {
  const { record, vm } = live;
  try {
    await allDone([
      serve(host, fork.ram, { vm: record.id }, fork.disjoint.ram),
      serve(host, fork.disk, { disk: record.id }, fork.disjoint.disk),
    ]);
    const descriptor = encodeDescriptor({
      machine: vm.shape,
      ram: fork.ram,
      disk: fork.disk,
      identity: {
        family: record.family,
        guest_mac: GUEST_MAC,
        network: `${NETWORK}/${PREFIX_BITS}`,
      },
      parent: { host: host.config.name, vm: record.id, vmid: record.vmid },
      created_ms: fork.created_ms,
      state,
      zero_map: bitmapOfRuns(zeroRuns, fork.ram.pages),
    });
    fork.descriptor_bytes = descriptor.length;
    if (fork.held) await writeFile(fork.descriptor_path, descriptor, { mode: 0o600 });
    fork.state = 'open';
    await host.forks.save(fork);
    return descriptor;
  } catch (error) {
    fork.state = 'closed';
    await giveUp(host, fork, true);
    await host.forks.remove(fork.id);
    throw error;
  }
}

/** Each step is tried, whatever became of the others: the VM may have ended meanwhile. */
export async function giveUp(host: Host, fork: ForkRecord, sealed: boolean): Promise<void> {
  const call = host.dataplane.call;
  const { vm, ram, disk } = fork;
  const undo = new Undo();
  undo.add('descriptor', () => rm(fork.descriptor_path, { force: true }));
  undo.add('saved pages', () => rm(fork.ram_directory, { recursive: true, force: true }));
  if (sealed) {
    undo.add('disk generation', () =>
      call('disk.drop_generation', { disk: vm, generation: disk.generation }),
    );
  }
  undo.add('RAM generation', () => call('vm.fork_abort', { vm, generation: ram.generation }));
  undo.add('disk server', () => call('generation.unserve', { generation: disk.generation }));
  undo.add('RAM server', () => call('generation.unserve', { generation: ram.generation }));
  await undo.run(host.log);
  releaseGroups(host, fork);
}

function releaseGroups(host: Host, fork: ForkRecord): void {
  for (const { source } of [fork.disk, fork.ram]) {
    host.groups.release({ group: source.group, port: source.group_port });
  }
}

/**
 * As Promise.all, but rejects only when all have ended: what is undone after a failure must not
 * overtake what is still under way.
 */
async function allDone<T extends readonly unknown[]>(
  work: {
    [K in keyof T]: Promise<T[K]>;
  },
): Promise<T> {
  await Promise.allSettled(work);
  return (await Promise.all(work)) as unknown as T;
}

export function serve(
  host: Host,
  generation: GenerationRef,
  of: { vm: string } | { disk: string },
  disjoint: number[],
  call: Host['dataplane']['call'] = host.dataplane.call,
): Promise<unknown> {
  return call('generation.serve', {
    generation: generation.generation,
    of,
    key: generation.source.key,
    group: generation.source.group,
    group_port: generation.source.group_port,
    replay_pages: Math.floor(host.config.replayBytes / 4096),
    disjoint,
  });
}

/** Ends the generations of a fork that nobody needs any more; its record stays, for joins. */
export async function closeFork(host: Host, fork: ForkRecord): Promise<void> {
  if (fork.state !== 'open') return;
  fork.state = 'closed';
  const call = host.dataplane.call;
  // Counters are for people: if the data plane has just been replaced they are gone.
  const stats = (generation: string): Promise<Record<string, number>> =>
    call('generation.stats', { generation }).catch(() => ({}));
  fork.wire = { ram: await stats(fork.ram.generation), disk: await stats(fork.disk.generation) };
  await host.forks.save(fork);
  const undo = new Undo();
  undo.add('descriptor', () => rm(fork.descriptor_path, { force: true }));
  undo.add('disk generation', () =>
    call('disk.drop_generation', { disk: fork.vm, generation: fork.disk.generation }),
  );
  undo.add('RAM generation', () =>
    call('vm.drop_generation', {
      vm: fork.vm,
      generation: fork.ram.generation,
      directory: fork.ram_directory,
    }),
  );
  for (const { generation } of [fork.disk, fork.ram]) {
    undo.add('server', () => call('generation.unserve', { generation }));
  }
  await undo.run(host.log);
  releaseGroups(host, fork);
}

import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { newGenerationId } from '../../src/common/ids.js';
import { connectToDataplane } from '../../src/dataplane/rpc.js';
import { QmpClient } from '../../src/hypervisor/qemu/qmp.js';
import type { VmRecord } from '../../src/sfld/records.js';
import { Lab, sh, until } from './lab.js';

async function status(record: VmRecord): Promise<string> {
  const qmp = await QmpClient.connect(record.hypervisor?.watchdog_socket ?? '');
  try {
    return ((await qmp.execute('query-status', {})) as { status: string }).status;
  } finally {
    qmp.close();
  }
}

describe('the watchdog', () => {
  let lab: Lab;
  let vm: string;

  beforeAll(async () => {
    lab = await Lab.start(1);
    vm = await lab.parent('parent', 128);
  });
  afterAll(() => lab?.destroy());

  it('resumes a paused parent when whoever forks it goes away, and gives the fork up', async () => {
    const { host } = lab.daemon(0);
    const [record] = lab.records();
    if (!record?.hypervisor) throw new Error('the VM has a process');

    const caller = await connectToDataplane(join(host.dirs.run, 'dataplane.sock'));
    const generation = newGenerationId();
    await caller.call('vm.fork_begin', {
      vm,
      generation,
      directory: join(host.dirs.ram, 'generation', generation),
      rescue: record.hypervisor,
    });
    const qmp = await QmpClient.connect(record.hypervisor.watchdog_socket);
    await qmp.execute('stop', {});
    qmp.close();
    expect(await status(record)).toBe('paused');
    caller.close();

    await until('the parent runs again', 10_000, async () => (await status(record)) === 'running');
    expect(await sh(lab.client, vm, 'echo alive')).toBe('alive');
    // What the caller had begun is gone: the VM can be forked.
    const fork = await lab.fork(vm, 1);
    expect(fork.clones[0]?.ok).toBe(true);
  });
});

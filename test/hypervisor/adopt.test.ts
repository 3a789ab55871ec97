import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { VmRecord } from '../../src/hypervisor/driver.js';
import { isAlive } from '../../src/hypervisor/qemu/process.js';
import { type Bed, counts, fileSays, makeBed } from './harness.js';

let bed: Bed;
beforeEach(() => {
  bed = makeBed();
});
afterEach(() => bed.end());

const running = (text: string) => counts(text).length >= 2;

const hooks = JSON.stringify(new URL('./ts-hooks.mjs', import.meta.url).href);
const loader = `import { register } from 'node:module'; register(${hooks});`;
const controller = new URL('./controller.ts', import.meta.url).pathname;

/** Boots a VM from another Node process, which is killed once it has said the VM's record. */
async function bootElsewhere(id: string, then: 'run' | 'pause'): Promise<VmRecord> {
  const options = ['--import', `data:text/javascript,${encodeURIComponent(loader)}`];
  const args = [...options, controller, bed.ramFolder, JSON.stringify(bed.spec(id)), then];
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
    if (text.endsWith('\n')) child.kill('SIGKILL');
  });
  await once(child, 'close');
  const record = JSON.parse(text) as VmRecord;
  bed.ownPid(record);
  return record;
}

test('a VM lives on when its daemon is killed, and is found again', async () => {
  const record = await bootElsewhere('vm', 'run');
  await fileSays(record.console_log, running);
  const vm = bed.own(await bed.driver.adopt(record));
  expect(await vm.status()).toBe('running');

  await vm.pause();
  const state = await vm.captureState();
  bed.copyRam('vm', 'clone');
  await vm.resume();
  const clone = bed.own(await bed.driver.prepareClone(bed.spec('clone'), vm.shape));
  await clone.loadState(state);
  await clone.run();
  expect(await fileSays(clone.record.console_log, running)).not.toContain('BAD');

  const ended = new Promise((resolve) => vm.once('exited', resolve));
  await vm.destroy();
  expect(await ended).toMatchObject({ status: null, signal: null, expected: true });
  expect(await vm.status()).toBe('exited');
});

test('a VM that was paused when its daemon was killed is found paused, and resumes', async () => {
  const record = await bootElsewhere('vm', 'pause');
  const vm = bed.own(await bed.driver.adopt(record));
  expect(await vm.status()).toBe('paused');
  await vm.resume();
  const now = counts(readFileSync(record.console_log, 'utf8')).length;
  await fileSays(record.console_log, (text) => counts(text).length > now + 1);
});

test('the end of an adopted VM is noticed', async () => {
  const vm = bed.own(await bed.driver.adopt(await bootElsewhere('vm', 'run')));
  const ended = new Promise((resolve) => vm.once('exited', resolve));
  process.kill(vm.record.pid, 'SIGKILL');
  expect(await ended).toMatchObject({ status: null, expected: false });
});

test('a VM that ended meanwhile is not found', async () => {
  const record = await bootElsewhere('vm', 'run');
  process.kill(record.pid, 'SIGKILL');
  const identity = { pid: record.pid, startTicks: record.start_ticks, bootId: record.boot_id };
  await expect.poll(() => isAlive(identity)).toBe(false);
  await expect(bed.driver.adopt(record)).rejects.toMatchObject({ code: 'E_NOT_FOUND' });
});

test('a process that merely has the same pid is left alone', async () => {
  const vm = await bed.boot('vm');
  const record = { ...vm.record, start_ticks: String(Number(vm.record.start_ticks) - 1) };
  await expect(bed.driver.adopt(record)).rejects.toMatchObject({ code: 'E_NOT_FOUND' });
  const earlier = { ...vm.record, boot_id: '00000000-0000-0000-0000-000000000000' };
  await expect(bed.driver.adopt(earlier)).rejects.toMatchObject({ code: 'E_NOT_FOUND' });
  expect(await vm.status()).toBe('running');
});

test('a released VM lives on, and the watchdog can resume it', async () => {
  const vm = await bed.boot('vm');
  await vm.pause();
  vm.release();
  const socket = createConnection(vm.record.watchdog_socket);
  await once(socket, 'connect');
  socket.write('{"execute":"qmp_capabilities"}\n{"execute":"cont"}\n');
  const now = counts(readFileSync(vm.record.console_log, 'utf8')).length;
  await fileSays(vm.record.console_log, (text) => counts(text).length > now + 1);
  socket.destroy();
  const again = bed.own(await bed.driver.adopt(vm.record));
  expect(await again.status()).toBe('running');
});

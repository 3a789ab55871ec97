import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { createConnection } from 'node:net';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { VmExit } from '../../src/hypervisor/driver.js';
import type { QemuVm } from '../../src/hypervisor/qemu/vm.js';
import { type Bed, counts, fileSays, makeBed, USER } from './harness.js';

let bed: Bed;
beforeEach(() => {
  bed = makeBed();
});
afterEach(() => bed.end());

/** Types on the guest's console; resolves when it was taken. */
async function type(vm: QemuVm, text: string): Promise<void> {
  const socket = createConnection(vm.record.console_socket);
  await once(socket, 'connect');
  socket.write(text);
  // The guest answers with further counts; then it has had its chance to read.
  await once(socket, 'data').catch(() => undefined);
  socket.on('error', () => {});
  socket.resume();
}

function exitOf(vm: QemuVm): Promise<VmExit> {
  return new Promise((resolve) => vm.once('exited', resolve));
}

const running = (text: string) => counts(text).length >= 2;

test('the VM process is unprivileged and sandboxed', async () => {
  const vm = await bed.boot('vm');
  const status = readFileSync(`/proc/${vm.record.pid}/status`, 'utf8');
  const field = (name: string) => new RegExp(`^${name}:[ \\t]*(.*)$`, 'm').exec(status)?.[1];
  expect(field('Uid')?.split('\t')).toEqual(Array(4).fill(String(USER.uid)));
  expect(field('Gid')?.split('\t')).toEqual(Array(4).fill(String(USER.gid)));
  expect(field('Groups')?.trim()).toBe('');
  expect(field('Seccomp')).toBe('2');
  expect(field('NoNewPrivs')).toBe('1');
  expect(field('CapEff')).toBe('0000000000000000');
  const limits = readFileSync(`/proc/${vm.record.pid}/limits`, 'utf8');
  expect(limits).toMatch(/^Max core file size\s+0\s+0/m);
  // A session of its own: signals for the daemon's group do not reach it.
  const stat = readFileSync(`/proc/${vm.record.pid}/stat`, 'utf8').split(') ')[1]?.split(' ');
  expect(stat?.[3]).toBe(String(vm.record.pid));
  const environment = readFileSync(`/proc/${vm.record.pid}/environ`, 'utf8');
  expect(
    environment.split('\0').filter((word) => word !== '' && !/^(PATH|PWD)=/.test(word)),
  ).toEqual([]);
  expect(statSync(vm.record.run_dir).mode & 0o777).toBe(0o700);
});

test('pause and resume tell when they took effect', async () => {
  const vm = await bed.boot('vm');
  const seen: string[] = [];
  vm.on('paused', () => seen.push('paused'));
  vm.on('resumed', () => seen.push('resumed'));
  const paused = await vm.pause();
  expect(await vm.status()).toBe('paused');
  const resumed = await vm.resume();
  expect(await vm.status()).toBe('running');
  expect(resumed.atMs).toBeGreaterThan(paused.atMs);
  expect(seen).toEqual(['paused', 'resumed']);
});

test('a VM killed from outside announces its end, with its last words', async () => {
  const vm = await bed.boot('vm');
  const ended = exitOf(vm);
  process.kill(vm.record.pid, 'SIGTERM');
  expect(await ended).toMatchObject({ status: 0, signal: null, expected: false });
  expect((await ended).logTail).toContain('terminating on signal 15');

  const other = await bed.boot('other');
  const killed = exitOf(other);
  process.kill(other.record.pid, 'SIGKILL');
  expect(await killed).toMatchObject({ status: null, signal: 'SIGKILL', expected: false });
  expect(await other.status()).toBe('exited');
  await expect(other.pause()).rejects.toMatchObject({ code: 'E_CLOSED' });
});

test('a VM killed during its capture fails it with a clear error', async () => {
  const vm = await bed.boot('vm');
  await vm.pause();
  const capture = vm.captureState();
  process.kill(vm.record.pid, 'SIGKILL');
  await expect(capture).rejects.toMatchObject({ code: 'E_CLOSED' });
});

test('destroy may be called any number of times and leaves no socket', async () => {
  const vm = await bed.boot('vm');
  const ended = exitOf(vm);
  await Promise.all([vm.destroy(), vm.destroy(), vm.destroy({ graceMs: 0 })]);
  await vm.destroy();
  expect((await ended).expected).toBe(true);
  expect(existsSync(`/proc/${vm.record.pid}`)).toBe(false);
  expect(readdirSync(vm.record.run_dir).filter((name) => name.endsWith('.sock'))).toEqual([]);
});

test('a stopped process is ended all the same', async () => {
  const vm = await bed.boot('vm');
  process.kill(vm.record.pid, 'SIGSTOP');
  await vm.destroy({ graceMs: 50 });
  expect(existsSync(`/proc/${vm.record.pid}`)).toBe(false);
});

test('a guest that resets itself ends its VM', async () => {
  const vm = await bed.boot('vm');
  await fileSays(vm.record.console_log, running);
  const reason = new Promise((resolve) => vm.once('shutdown', resolve));
  const ended = exitOf(vm);
  await type(vm, 'r');
  expect(await reason).toEqual({ reason: 'guest-reset' });
  expect(await ended).toMatchObject({ status: 0, expected: false });
});

test('a guest that panics is told from one that resets', async () => {
  const vm = await bed.boot('vm');
  await fileSays(vm.record.console_log, running);
  const panic = new Promise((resolve) => vm.once('panic', resolve));
  await type(vm, 'p');
  expect(await panic).toEqual({ message: 'as asked' });
});

test('a guest that floods its console does not fill the disk', async () => {
  const logMaxBytes = 64 << 10;
  const vm = await bed.boot('vm', { console: { logMaxBytes } });
  const log = vm.record.console_log;
  await fileSays(log, running);
  await type(vm, 'f');
  await fileSays(`${log}.1`, (text) => text.includes('flooding'));
  const first = statSync(`${log}.1`).ino;
  expect(statSync(log).size).toBeLessThan(64 << 20);
  expect(first).toBeGreaterThan(0);
  expect(await vm.status()).toBe('running');
});

test('a QEMU that cannot start says why', async () => {
  const boot = bed.driver.boot(
    bed.spec('vm', { boot: { kernel: '/nowhere/vmlinux', cmdline: '' } }),
  );
  await expect(boot).rejects.toMatchObject({ code: 'E_QEMU' });
  await expect(boot).rejects.toThrow(/could not (open|load) .*vmlinux|\/nowhere\/vmlinux/);
});

test.each([
  ['id', { id: '../vm' }],
  ['memory', { ramBytes: (16 << 20) + 4096 }],
  ['vcpus', { vcpus: 0 }],
  ['user', { user: { uid: 0, gid: 0 } }],
  ['MAC', { nic: { tapFd: 5, mac: '52:54:00:12:34:5' } }],
  ['socket path', { runDir: `/tmp/${'x'.repeat(100)}` }],
])('a specification with a bad %s is refused', async (_, change) => {
  const spec = { ...bed.spec('vm'), ...change };
  await expect(bed.driver.boot(spec)).rejects.toMatchObject({ code: 'E_ARGUMENT' });
});

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { QemuDriver } from '../../src/hypervisor/qemu/driver.js';
import { probeKvm, runProbeGuest } from '../../src/hypervisor/qemu/kvm-probe.js';
import { defaultMachine } from '../../src/hypervisor/qemu/machine.js';
import { USER } from './harness.js';

const QEMU = '/usr/bin/qemu-system-x86_64';
let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'sf-probe-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

test('the probe guest runs on an accelerator that works', async () => {
  const verdict = await runProbeGuest(QEMU, 'tcg', defaultMachine, USER, 30_000);
  expect(verdict).toEqual({ works: true, reason: 'a probe guest ran on tcg' });
});

test('an accelerator that does not work is told from one that does', async () => {
  const verdict = await runProbeGuest(QEMU, 'xen', defaultMachine, USER, 30_000);
  expect(verdict.works).toBe(false);
  expect(verdict.reason).toMatch(/^a probe guest on xen failed: .+/);
});

test('a guest that hangs is ended at the time limit', async () => {
  // A QEMU that does nothing: `sleep` under another name does not know its options, so a script.
  const script = join(folder, 'qemu');
  writeFileSync(script, '#!/bin/sh\nexec /bin/sleep 60\n', { mode: 0o755 });
  const own = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
  const verdict = await runProbeGuest(script, 'kvm', defaultMachine, own, 100);
  expect(verdict).toEqual({ works: false, reason: 'a probe guest on kvm hung for 100 ms' });
});

test('the verdict is kept for this boot and this QEMU only', async () => {
  const cache = join(folder, 'deep', 'kvm.json');
  const first = await probeKvm(QEMU, defaultMachine, USER, cache);
  const kept = JSON.parse(readFileSync(cache, 'utf8')) as { works: boolean };
  expect(kept.works).toBe(first.works);

  writeFileSync(cache, JSON.stringify({ ...kept, reason: 'from the cache' }));
  expect((await probeKvm(QEMU, defaultMachine, USER, cache)).reason).toBe('from the cache');
  writeFileSync(cache, JSON.stringify({ ...kept, reason: 'from the cache', boot_id: 'other' }));
  expect((await probeKvm(QEMU, defaultMachine, USER, cache)).reason).toBe(first.reason);
  writeFileSync(cache, '{"works":');
  expect((await probeKvm(QEMU, defaultMachine, USER, cache)).reason).toBe(first.reason);
});

test('capabilities say what runs guests here and why', async () => {
  const found = await new QemuDriver({ user: USER }).probe();
  expect(found.version).toMatch(/^\d+\.\d+\.\d+/);
  expect(['kvm', 'tcg']).toContain(found.accel);
  expect(found.accel_reason).not.toBe('');
});

test('a missing QEMU is a missing requirement', async () => {
  const driver = new QemuDriver({ user: USER, binary: join(folder, 'none') });
  await expect(driver.probe()).rejects.toMatchObject({ code: 'E_REQUIREMENT' });
});

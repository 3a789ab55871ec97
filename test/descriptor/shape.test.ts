import { expect, test } from 'vitest';
import { checkShape } from '../../src/descriptor/index.js';
import type { Capabilities } from '../../src/hypervisor/driver.js';
import { sample } from './sample.js';

const host: Capabilities = {
  driver: 'qemu',
  version: '7.2.22',
  machine: 'pc',
  accel: 'tcg',
  accel_reason: 'a probe guest on kvm failed',
  cpu: 'max',
  max_vcpus: 255,
};

test('a host of the same kind can run the clones', () => {
  const { ram_bytes: ramBytes, vcpus } = sample().machine;
  expect(() => checkShape(sample(), host, { ramBytes, vcpus })).not.toThrow();
});

test.each([
  ['driver', { driver: 'xen' }, {}],
  ['version', { version: '8.0.0' }, {}],
  ['accelerator', { accel: 'kvm' }, {}],
  ['CPU', { cpu: 'qemu64' }, {}],
  ['machine', { machine: 'q35' }, {}],
  ['RAM', {}, { ramBytes: 4096 }],
  ['vcpus', {}, { vcpus: 2 }],
])('another %s is named', (what, change, expected) => {
  const check = () => checkShape(sample(), { ...host, ...change }, expected);
  expect(check).toThrow(expect.objectContaining({ code: 'E_SHAPE' }));
  expect(check).toThrow(new RegExp(what));
});

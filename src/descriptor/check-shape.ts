import { SnowflockError } from '../common/errors.js';
import type { Capabilities } from '../hypervisor/driver.js';
import type { DescriptorHeader } from './schema.js';

/**
 * Can this host run clones of the descriptor's parent? Asked as soon as a descriptor's header is
 * known, before anything is made for it. `expected` is what was reserved here for the clones.
 * @throws E_SHAPE naming every difference.
 */
export function checkShape(
  descriptor: Pick<DescriptorHeader, 'machine' | 'ram'>,
  host: Capabilities,
  expected: { ramBytes?: number; vcpus?: number } = {},
): void {
  const { machine } = descriptor;
  const wrong: string[] = [];
  const compare = (what: string, there: string | number, here: string | number): void => {
    if (there !== here) wrong.push(`${what} is ${there} there and ${here} here`);
  };
  compare('driver', machine.driver, host.driver);
  compare('version', machine.version, host.version);
  compare('machine', machine.machine, host.machine);
  compare('accelerator', machine.accel, host.accel);
  compare('CPU', machine.cpu, host.cpu);
  if (expected.ramBytes !== undefined) compare('RAM', machine.ram_bytes, expected.ramBytes);
  if (expected.vcpus !== undefined) compare('vcpus', machine.vcpus, expected.vcpus);
  if (machine.vcpus > host.max_vcpus) {
    wrong.push(`${machine.vcpus} vcpus, of which this host runs ${host.max_vcpus}`);
  }
  if (wrong.length === 0) return;
  throw new SnowflockError('E_SHAPE', `this host cannot run these clones: ${wrong.join('; ')}`);
}

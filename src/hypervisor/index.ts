import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import type { HypervisorDriver, VmRecord, VmUser } from './driver.js';
import { QemuDriver } from './qemu/driver.js';
import { rescue } from './qemu/rescue.js';

export interface DriverOptions {
  user: VmUser;
  /** Where a driver may remember what it found out about this machine. */
  cacheDir: string;
}

/** The driver of this name. Errors: E_CONFIG. */
export function driverByName(name: string, options: DriverOptions): HypervisorDriver {
  if (name === 'qemu') {
    return new QemuDriver({
      user: options.user,
      kvmCacheFile: join(options.cacheDir, 'kvm-probe.json'),
    });
  }
  throw new SnowflockError('E_CONFIG', `no hypervisor driver ${name}: qemu exists`);
}

/**
 * Resumes a VM through its second control socket: the watchdog's way, while the daemon that paused
 * it is gone or still holds the first one. Does nothing to a VM that runs.
 */
export async function rescueVm(record: VmRecord): Promise<void> {
  if (record.driver !== 'qemu') {
    throw new SnowflockError('E_CONFIG', `no hypervisor driver ${record.driver}: qemu exists`);
  }
  await rescue(record);
}

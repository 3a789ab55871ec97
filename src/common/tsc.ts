import { setTimeout as sleep } from 'node:timers/promises';
import { loadAddon } from './native.js';

interface TscAddon {
  readTsc(): { tsc: bigint; ns: bigint };
}

const SAMPLE_MS = 100;
let known: Promise<number> | undefined;

/**
 * Rate of this host's time stamp counter in kHz, measured once per process over 100 ms.
 *
 * For the kernel's `tsc_early_khz=` in guests under TCG: the machine `microvm` has no clock but the
 * PIT to calibrate the counter against, and on a busy host that calibration fails about every other
 * time; the guest then hangs before its console is up. TCG guests see the host's counter.
 */
export async function tscKhz(): Promise<number> {
  known ??= measure();
  return await known;
}

async function measure(): Promise<number> {
  const addon = loadAddon<TscAddon>('dataplane');
  const start = addon.readTsc();
  await sleep(SAMPLE_MS);
  const end = addon.readTsc();
  return Math.round((Number(end.tsc - start.tsc) / Number(end.ns - start.ns)) * 1e6);
}

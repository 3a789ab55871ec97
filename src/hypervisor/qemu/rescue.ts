import type { VmRecord } from '../driver.js';
import { QmpClient } from './qmp.js';

const LIMIT_MS = 5_000;

/**
 * Lets a paused VM go on, through its second monitor. Nothing else of the VM is touched: the daemon
 * may still live and hold the rest. After a capture QEMU calls the paused state `postmigrate`.
 */
export async function rescue(record: VmRecord): Promise<void> {
  const qmp = await QmpClient.connect(record.watchdog_socket);
  try {
    const { running } = (await qmp.execute('query-status', {}, LIMIT_MS)) as { running: boolean };
    if (!running) await qmp.execute('cont', {}, LIMIT_MS);
  } finally {
    qmp.close();
  }
}

import { loadAddon } from '../common/native.js';

/** Tells the service manager how this process is: sd_notify(3). Nothing without one. E_IO. */
export function notifyServiceManager(state: string): void {
  const socket = process.env.NOTIFY_SOCKET;
  if (socket === undefined || socket === '') return;
  const addon = loadAddon<{ sendDatagram(path: string, text: string): void }>('dataplane');
  addon.sendDatagram(socket, state);
}

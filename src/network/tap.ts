import { MTU } from './addresses.js';
import { native, netback } from './native.js';

export interface TapOptions {
  /** Frames carry a virtio_net_hdr, so that guest and host can use offloads. Default true. */
  vnetHdr?: boolean;
  /** Default 1500. */
  mtu?: number;
}

/**
 * A new tap in this process's network namespace; it lives as long as the descriptor or a copy of it
 * (QEMU's: `-netdev tap,id=..,fd=N`, the descriptor inherited). Up, without IPv6. The descriptor is
 * close-on-exec and non-blocking, the caller closes it. Add the VM to the filter before anybody
 * writes to it: a bare tap reaches the host's stack.
 * E_EXISTS (the name), E_ARGUMENT, E_NETWORK.
 */
export function openTap(name: string, options: TapOptions = {}): number {
  return native(() => netback().openTap(name, options.vnetHdr ?? true, options.mtu ?? MTU));
}

/**
 * Runs synchronous work with this thread in another network namespace (a path such as
 * /run/netns/NAME or /proc/PID/ns/net). What it opens stays in that namespace.
 */
export function inNetns<T>(path: string, work: () => T): T {
  return native(() => netback().inNetns(path, work));
}

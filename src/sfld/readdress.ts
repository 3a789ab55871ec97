/**
 * A clone whose guest has no agent, or one that leaves the network alone, gets its own address by
 * DHCP. Its guest does not know that it is another VM now: its host makes it ask.
 *
 *   clone runs ─► ping ─► reset ─► ping ─► cable off ─► cable on ─► asks ─► new lease
 *                                            ▲                       │ nothing heard
 *                                            └───────── longer ◄─────┘
 *
 *  - ping (ARP): the guest runs, and how fast it is;
 *  - reset: connections inherited from the parent end (network/tcp-guard.ts); it comes first, for
 *    without its old address the guest takes no reset any more. After the second ping it has them;
 *  - cable: clients that watch the carrier (systemd-networkd, dhcpcd, ifplugd) give their lease up or
 *    ask for it again, which gets a NAK, and begin anew. The guest's kernel must see the cable off
 *    before it is on again, hence a pause as long as its first answer took. Linux tells its programs
 *    of carrier changes at most once a second (net/core/link_watch.c), so later tries are longer;
 *  - clients that do not watch it (dhclient, udhcpc alone) hear the NAK when they renew: within the
 *    seconds that the lease of such a VM says.
 *
 * Left out on purpose: FORCERENEW (RFC 3203), which no client takes without authentication.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import type { DhcpService } from '../dhcp/service.js';
import type { ResetReport } from '../network/tcp-guard.js';
import type { LiveVm } from './host.js';
import type { PrepareRequest } from './records.js';

/** A guest that does not answer ARP is not waited for: its client may work all the same. */
const PING_LIMIT_MS = 2000;
const RESET_LIMIT_MS = 1000;
/** How long the cable is off at the first try: as long as the first answer took, in these bounds. */
const OFF_MS = { least: 20, most: 500 };
/** How long the client then has to say something. */
const WAIT_MS = 1200;
const FURTHER_TRIES = [
  { offMs: 1500, waitMs: 3000 },
  { offMs: 3000, waitMs: 10_000 },
];
/** Long enough for clients that only renew, and for their second try. */
const LEASE_LIMIT_MS = 120_000;

/**
 * Resolves when the guest has taken a lease from now on. Rejects with E_TIMEOUT.
 * `heard` is called for each packet that came from it.
 */
export function leaseTaken(
  dhcp: DhcpService,
  limitMs: number,
  heard: () => void = () => {},
): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(limit);
      stop();
    };
    const limit = setTimeout(() => {
      end();
      reject(new SnowflockError('E_TIMEOUT', `the guest took no lease in ${limitMs} ms`));
    }, limitMs);
    limit.unref();
    const stop = dhcp.watch((event) => {
      heard();
      if (event !== 'ack') return;
      end();
      resolve();
    });
  });
}

/** Call it when the clone runs. Resolves when it has its own address. E_TIMEOUT, E_QEMU, E_CLOSED. */
export async function readdress(
  log: Logger,
  live: LiveVm,
  inherited: PrepareRequest['inherited'],
): Promise<void> {
  const { record, vm, dhcp } = live;
  const began = performance.now();
  let asked = () => {};
  const asks = new Promise<void>((resolve) => {
    asked = resolve;
  });
  const taken = leaseTaken(dhcp, LEASE_LIMIT_MS, () => asked());
  taken.catch(() => {}); // what fails before it says more
  const { firstMs, report } = await endInherited(live, inherited);
  const resetMs = performance.now() - began;
  const offMs = Math.min(Math.max(firstMs, OFF_MS.least), OFF_MS.most);
  let tries = 0;
  for (const { offMs: off, waitMs } of [{ offMs, waitMs: WAIT_MS }, ...FURTHER_TRIES]) {
    tries++;
    await toggle(live, off);
    const stop = new AbortController();
    const late = sleep(waitMs, false, { signal: stop.signal }).catch(() => false);
    const spoke = await Promise.race([asks.then(() => true), late]);
    stop.abort();
    if (spoke) break;
    if (record.state === 'ending' || record.state === 'ended') break;
  }
  await taken;
  const leaseMs = performance.now() - began;
  log.info(
    { vm: vm.id, first_ms: firstMs, tries, reset_ms: resetMs, lease_ms: leaseMs, ...report },
    'readdressed',
  );
}

/** Resolves when the guest has taken the resets. `firstMs`: how long its first answer took. */
async function endInherited(
  { guard }: LiveVm,
  inherited: PrepareRequest['inherited'],
): Promise<{ firstMs: number; report: ResetReport | undefined }> {
  if (guard === undefined || inherited === undefined) return { firstMs: 0, report: undefined };
  const { address, connections } = inherited;
  const firstMs = (await guard.ping(address, PING_LIMIT_MS)) ?? PING_LIMIT_MS;
  const report = await guard.reset(connections, address, RESET_LIMIT_MS);
  if (report.reset > 0) await guard.ping(address, PING_LIMIT_MS);
  return { firstMs, report };
}

async function toggle({ vm }: LiveVm, offMs: number): Promise<void> {
  await vm.setLink(false);
  await sleep(offMs);
  try {
    await vm.setLink(true);
  } catch (error) {
    const { code, message } = asSnowflockError(error);
    throw new SnowflockError(code, `VM ${vm.id} stays without its cable: ${message}`);
  }
}

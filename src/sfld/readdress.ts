/**
 * A clone whose guest has no agent, or one that leaves the network alone, gets its own address by
 * DHCP. Its guest does not know that it is another VM now: its host makes it ask.
 *
 *   clone runs ─► ping, reset ─► ping ─► cable off ─► cable on ─► asks ─► new lease
 *                                          ▲                       │
 *                                          └──── longer ◄──────────┴ silent without a lease
 *
 *  - ping (ARP): the guest runs, and how fast it is. The second finds it warm;
 *  - reset: connections inherited from the parent end (network/tcp-guard.ts). It comes before the
 *    cable, for without its old address the guest takes no reset any more. It begins with the first
 *    ping: frames wait in the tap until the guest takes them. After the second ping it has them;
 *  - cable: clients that watch the carrier (systemd-networkd, dhcpcd, ifplugd) give their lease up or
 *    ask for it again, which gets a NAK, and begin anew. The guest's kernel must see the cable off
 *    before it is on again, hence a pause of some warm answers' length. Linux tells its programs of
 *    carrier changes at most once a second (net/core/link_watch.c), so later tries are longer;
 *  - a client that has spoken is left alone as long as it goes on; one that falls silent without a
 *    lease gets the next try. What it said may have been its RELEASE, or got lost;
 *  - clients that do not watch it (dhclient, udhcpc alone) hear the NAK when they renew.
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
/**
 * How long the cable is off at the first try: so many warm answers, in these bounds. Unseen after 42 ms
 * where answers took 14 (emulated). 100 ms cost a client nothing that gives its lease up meanwhile.
 */
const OFF_ANSWERS = 4;
const OFF_MS = { least: 100, most: 500 };
/** How long the client may then say nothing at all. */
const WAIT_MS = 1200;
const FURTHER_TRIES = [
  { offMs: 1500, waitMs: 3000 },
  { offMs: 3000, waitMs: 10_000 },
  { offMs: 3000, waitMs: 20_000 },
];
/** A client that spoke and has no lease repeats itself sooner; udhcpc waits 3 s after a NAK. */
const SILENT_MS = 6000;
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
  let heardAt: number | undefined;
  const taken = leaseTaken(dhcp, LEASE_LIMIT_MS, () => {
    heardAt = performance.now();
  });
  taken.catch(() => {}); // what fails before it says more
  // A client that was asking when it was forked has its address by itself.
  const early = taken.then(() => undefined);
  const ended = await Promise.race([early, endInherited(live, inherited)]);
  if (ended === undefined) {
    log.info({ vm: vm.id, tries: 0, lease_ms: performance.now() - began }, 'readdressed');
    return;
  }
  const { firstMs, warmMs, report } = ended;
  const resetMs = performance.now() - began;
  const offMs = Math.min(Math.max(OFF_ANSWERS * warmMs, OFF_MS.least), OFF_MS.most);
  let onMs: number | undefined;
  let tries = 0;
  for (const { offMs: off, waitMs } of [{ offMs, waitMs: WAIT_MS }, ...FURTHER_TRIES]) {
    tries++;
    await toggle(live, off);
    const since = performance.now();
    onMs ??= since - began;
    const silentAt = () =>
      heardAt === undefined || heardAt < since ? since + waitMs : heardAt + SILENT_MS;
    if (await leaseBefore(taken, silentAt)) break;
    if (record.state === 'ending' || record.state === 'ended') break;
    const heard = dhcp.counters();
    log.warn({ vm: vm.id, tries, ...heard }, 'the guest is silent and has no lease');
  }
  await taken;
  const leaseMs = performance.now() - began;
  const times = { first_ms: firstMs, warm_ms: warmMs, reset_ms: resetMs, on_ms: onMs };
  log.info({ vm: vm.id, tries, ...times, lease_ms: leaseMs, ...report }, 'readdressed');
}

/** False when the time has come; it may move while it is waited for. Rejects as `taken` does. */
async function leaseBefore(taken: Promise<void>, time: () => number): Promise<boolean> {
  for (let left = time() - performance.now(); left > 0; left = time() - performance.now()) {
    const stop = new AbortController();
    const late = sleep(left, false, { signal: stop.signal }).catch(() => false);
    try {
      if (await Promise.race([taken.then(() => true), late])) return true;
    } finally {
      stop.abort();
    }
  }
  return false;
}

/**
 * Resolves when the guest has taken the resets. `firstMs`: how long its first answer took, `warmMs`:
 * how long another one takes.
 */
async function endInherited(
  { guard }: LiveVm,
  inherited: PrepareRequest['inherited'],
): Promise<{ firstMs: number; warmMs: number; report: ResetReport | undefined }> {
  if (guard === undefined || inherited === undefined) {
    return { firstMs: 0, warmMs: 0, report: undefined };
  }
  const { address, connections } = inherited;
  const first = guard.ping(address, PING_LIMIT_MS);
  const reset = guard.reset(connections, address, PING_LIMIT_MS + RESET_LIMIT_MS);
  const firstMs = await first;
  const report = await reset;
  if (firstMs === undefined) return { firstMs: PING_LIMIT_MS, warmMs: OFF_MS.most, report };
  const warmMs = (await guard.ping(address, PING_LIMIT_MS)) ?? OFF_MS.most;
  return { firstMs, warmMs, report };
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

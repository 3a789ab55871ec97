/** Clients nobody wrote for this server obtain, renew, rebind and lose leases, and follow a fork. */
import { type ChildProcess, spawn } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { DhcpService } from '../../src/dhcp/service.js';
import { addressOfVmid, GATEWAY, GUEST_MAC } from '../../src/network/addresses.js';
import { type Host, Lab, type Namespace } from '../netback-filter/lab.js';
import { CLIENTS, type ClientKind, RealClient } from './real-client.js';

const FAMILY = 22;
const WAIT_MS = 60_000;
let lab: Lab;
beforeAll(async () => {
  lab = await Lab.create(1);
});
afterAll(() => lab?.destroy());

/** Wakes whoever waits for a condition whenever something happened; says what it knows if never. */
class Waiter {
  readonly #waiting = new Set<() => void>();
  constructor(readonly describe: () => string) {}

  happened(): void {
    for (const look of this.#waiting) look();
  }

  until(what: string, holds: () => boolean): Promise<void> {
    return new Promise((resolve, reject) => {
      const limit = setTimeout(() => {
        this.#waiting.delete(look);
        reject(new Error(`never: ${what}\n${this.describe()}`));
      }, WAIT_MS);
      const look = () => {
        if (!holds()) return;
        clearTimeout(limit);
        this.#waiting.delete(look);
        resolve();
      };
      this.#waiting.add(look);
      look();
    });
  }
}

const addressOf = (netns: Namespace): string =>
  netns.exec('ip', '-4', '-o', 'address', 'show', 'dev', 'eth0');

/** Calls back at each change of an address in the namespace, once it is known to listen. */
async function watchAddresses(netns: Namespace, changed: () => void): Promise<ChildProcess> {
  const words = `netns exec ${netns.name} ip -o monitor address`;
  const monitor = spawn('ip', words.split(' '), { stdio: ['ignore', 'pipe', 'ignore'] });
  const first = new Promise<void>((resolve) => monitor.stdout.once('data', () => resolve()));
  const poke = setInterval(() => {
    netns.exec('ip', 'address', 'replace', '127.0.0.2/8', 'dev', 'lo');
    netns.exec('ip', 'address', 'del', '127.0.0.2/8', 'dev', 'lo');
  }, 100);
  await first.finally(() => clearInterval(poke));
  monitor.stdout.on('data', changed);
  return monitor;
}

async function lifeOf(kind: ClientKind, host: Host, vmid: number): Promise<void> {
  const guest = host.stackGuest(FAMILY, vmid);
  const { netns, tap } = guest;
  const events: string[] = [];
  let client: RealClient | undefined;
  const waiter = new Waiter(() => `events: ${events}\n${addressOf(netns)}\n${client?.log ?? ''}`);
  const service = host.netns.do(
    () =>
      new DhcpService({
        tap,
        family: FAMILY,
        identity: {
          address: addressOfVmid(vmid),
          guestMac: GUEST_MAC,
          hostname: `vm-${vmid}`,
          leaseSeconds: kind.leaseSeconds,
        },
        onEvent: (event, state) => {
          events.push(state === undefined ? event : `${event} ${state}`);
          waiter.happened();
        },
      }),
  );
  const monitor = await watchAddresses(netns, () => waiter.happened());
  const has = (address: string) => () => addressOf(netns).includes(`inet ${address}/16`);
  const heard = (what: string) => {
    const since = events.length;
    return waiter.until(what, () => events.slice(since).includes(what));
  };
  try {
    client = new RealClient(kind, netns);
    const mine = addressOfVmid(vmid);
    await waiter.until(`has ${mine}`, has(mine));
    expect(events).toContain('offer');
    expect(events).toContain('ack selecting');

    await heard('ack renewing');
    expect(has(mine)()).toBe(true);

    const clone = vmid + 100;
    const clones = addressOfVmid(clone);
    const place = { family: FAMILY, vmid: clone };
    host.netns.do(() => host.attached.addVm({ tap, ...place }, { family: FAMILY, vmid }));
    service.setIdentity({ ...service.identity, address: clones });
    await heard('nak renewing');
    await waiter.until(`has ${clones}`, has(clones));
    await waiter.until(`gave up ${mine}`, () => !has(mine)());
    expect(service.state).toBe('bound');

    // Datagrams to the server alone get lost; what the client then sends to all arrives.
    netns.exec(
      'nft',
      'add table netdev lose; add chain netdev lose out ' +
        '{ type filter hook egress device eth0 priority 0; }; ' +
        `add rule netdev lose out ip daddr ${GATEWAY} udp dport 67 counter drop`,
    );
    await heard('ack rebinding');
    expect(has(clones)()).toBe(true);
    expect(netns.exec('nft', 'list', 'table', 'netdev', 'lose')).toMatch(/counter packets [1-9]/);

    service.stop();
    await waiter.until('lost the lease', () => addressOf(netns) === '');
  } finally {
    client?.stop();
    monitor.kill('SIGKILL');
    service.stop();
  }
}

describe('obtains, renews, follows a fork, rebinds and loses its lease', () => {
  for (const [vmid, kind] of CLIENTS.entries()) {
    // Each waits for its lease's times most of the time.
    test.concurrent(kind.name, { timeout: 300_000 }, () => lifeOf(kind, lab.host(0), vmid));
  }
});

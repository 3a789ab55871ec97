/**
 * Clients, a host that translates their addresses, and a server, each a namespace:
 *
 *     clients ── host ── server        by plain masquerade, or by the gateway of src/nat
 *
 * Everything goes with `close`.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { NatHost } from '../../src/nat/gateway.js';
import { NetbackFilter } from '../../src/netback-filter/filter.js';
import { addressOfVmid, GUEST_MAC } from '../../src/network/addresses.js';
import { inNetns } from '../../src/network/tap.js';
import { filterIn } from '../../src/testbed/filter-in.js';

export const SERVER = '192.168.77.100';
const FAMILY = 7;

function ip(netns: string | undefined, lines: readonly string[]): void {
  const at = netns === undefined ? [] : ['-n', netns];
  execFileSync('ip', [...at, '-batch', '-'], { input: `${lines.join('\n')}\n` });
}

export class NatNet {
  readonly #undo: (() => void | Promise<void>)[] = [];
  nat: NatHost | undefined;

  private constructor(
    readonly prefix: string,
    readonly clients: number,
  ) {}

  get host(): string {
    return `${this.prefix}h`;
  }
  get server(): string {
    return `${this.prefix}s`;
  }
  client(index: number): string {
    return `${this.prefix}c${index}`;
  }

  /** `gateway`: behind the filter and a gateway, without a policy yet; else masquerade. */
  static async create(name: string, clients: number, gateway: boolean): Promise<NatNet> {
    const net = new NatNet(`sfbn${process.pid}${name}`, clients);
    try {
      net.#base();
      if (gateway) await net.#gateway();
      else net.#masquerade();
      return net;
    } catch (error) {
      await net.close();
      throw error;
    }
  }

  #base(): void {
    const all = [this.host, this.server];
    for (let i = 0; i < this.clients; i++) all.push(this.client(i));
    this.#undo.push(() => {
      for (const name of all) spawnSync('ip', ['netns', 'del', name], { stdio: 'ignore' });
    });
    ip(
      undefined,
      all.map((name) => `netns add ${name}`),
    );
    ip(this.host, [
      `link add eth0 address 02:00:00:00:01:01 type veth peer name eth0 address 02:00:00:00:01:02 netns ${this.server}`,
      'address add 192.168.77.1/24 dev eth0',
      'link set eth0 up',
    ]);
    ip(this.server, [`address add ${SERVER}/24 dev eth0`, 'link set eth0 up', 'link set lo up']);
    for (let i = 0; i < this.clients; i++) {
      ip(this.host, [
        `link add vm${i} address 02:00:00:00:02:02 type veth peer name eth0 address ${GUEST_MAC} netns ${this.client(i)}`,
      ]);
      ip(this.client(i), [
        `address add ${addressOfVmid(i)}/16 dev eth0`,
        'link set eth0 up',
        'route add default via 10.86.0.1',
      ]);
    }
  }

  #masquerade(): void {
    for (let i = 0; i < this.clients; i++) {
      ip(this.host, [
        `address add 10.86.0.1/32 dev vm${i}`,
        `link set vm${i} up`,
        `route add ${addressOfVmid(i)}/32 dev vm${i}`,
      ]);
    }
    const rules =
      'table ip bench { chain post { type nat hook postrouting priority 100; ' +
      'oifname "eth0" masquerade; }; }';
    execFileSync('ip', ['netns', 'exec', this.host, 'nft', rules]);
    execFileSync('ip', ['netns', 'exec', this.host, 'sysctl', '-qw', 'net.ipv4.ip_forward=1']);
  }

  async #gateway(): Promise<void> {
    const netns = `/run/netns/${this.host}`;
    const runDir = mkdtempSync(join(tmpdir(), 'sfbn-'));
    this.#undo.push(() => rmSync(runDir, { recursive: true, force: true }));
    const attached = await inNetns(netns, () => NetbackFilter.attach({ uplink: 'eth0' }));
    this.#undo.push(() => attached.close());
    const filter = filterIn(attached, netns);
    for (let i = 0; i < this.clients; i++) filter.addVm({ tap: `vm${i}`, family: FAMILY, vmid: i });
    this.nat = new NatHost({ filter, netns, runDir });
    this.#undo.push(async () => {
      await this.nat?.remove();
    });
  }

  async close(): Promise<void> {
    for (const work of this.#undo.reverse()) await work();
  }
}

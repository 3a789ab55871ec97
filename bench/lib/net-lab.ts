/**
 * Two hosts for the network bench, as namespaces joined by a veth pair, their uplinks eth0. Each lab
 * has one system that moves frames, and four guests: a, b and x on the first host, y on the second.
 * The guests are taps, whose other ends a program holds (tap-pump), or namespaces behind veth pairs,
 * with stacks of their own.
 */
import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { addressOfVmid, GUEST_MAC, wireMac } from '../../src/network/addresses.js';
import { Namespace } from '../../test/netback-filter/lab.js';

export const FAMILY = 7;
/** What the other machines of the family are numbered from; the guests here are 0 to 3. */
export const FIRST_KNOWN = 100;
export type Kind = 'tap' | 'veth';
export type GuestName = 'a' | 'b' | 'x' | 'y';
export type Hosts = readonly [Namespace, Namespace];

export interface Port {
  readonly name: GuestName;
  /** The interface on its host: the guest is behind it. */
  readonly device: string;
  readonly host: 0 | 1;
  readonly vmid: number;
  readonly ip: string;
  readonly wireMac: string;
  /** Of a guest with a stack. */
  readonly netns?: Namespace;
}

/** What moves frames between the guests. It is made on a lab and ended before the lab. */
export interface NetSystem {
  readonly title: string;
  /** The guest's own MAC address. */
  guestMac(port: Port): string;
  /** Where the guest sends what is for the other. */
  destination(to: Port): string;
  /** What the other sees as destination and source. */
  arrival(from: Port, to: Port): readonly [string, string];
  /** It cannot move frames whose checksums are still to be made: guests make them. */
  readonly withoutOffloads?: boolean;
  /** Processes whose work is part of moving a frame. */
  readonly pids?: readonly number[];
  close(): Promise<void>;
}

const PLACES: readonly (readonly [GuestName, 0 | 1, number])[] = [
  ['a', 0, 0],
  ['b', 0, 1],
  ['x', 0, 2],
  ['y', 1, 3],
];

export class NetLab {
  readonly hosts: Hosts;
  readonly ports: readonly Port[];
  readonly #namespaces: Namespace[] = [];
  readonly #prefix = `sfnet${process.pid}-${randomBytes(2).toString('hex')}-`;

  /** @param known VMs of the family besides the four guests */
  constructor(
    readonly kind: Kind,
    readonly known: number,
  ) {
    try {
      this.hosts = [this.#namespace('h1'), this.#namespace('h2')];
      const [one, two] = this.hosts;
      // All addresses are given: random ones can begin with 5e.
      one.exec(
        ...'ip link add eth0 address 02:00:00:00:01:01 type veth peer name eth0'.split(' '),
        ...`address 02:00:00:00:01:02 netns ${two.name}`.split(' '),
      );
      for (const host of this.hosts) {
        host.exec('sysctl', '-qw', 'net.ipv6.conf.all.disable_ipv6=1');
        host.exec('sysctl', '-qw', 'net.ipv6.conf.default.disable_ipv6=1');
        host.exec('ip', 'link', 'set', 'eth0', 'up', 'promisc', 'on');
      }
      this.ports = PLACES.map(([name, host, vmid]) => this.#port(name, host, vmid));
    } catch (error) {
      this.close();
      throw error;
    }
  }

  port(name: GuestName): Port {
    const port = this.ports.find((it) => it.name === name);
    if (port === undefined) throw new Error(`no guest ${name}`);
    return port;
  }

  of(host: 0 | 1): Port[] {
    return this.ports.filter((it) => it.host === host);
  }

  ifindex(port: Port): number {
    return Number(this.hosts[port.host].exec('cat', `/sys/class/net/${port.device}/ifindex`));
  }

  /** Of a VM that is known and not here. */
  knownVm(number: number): { vmid: number; ip: string; wireMac: string } {
    const vmid = FIRST_KNOWN + number;
    return { vmid, ip: addressOfVmid(vmid), wireMac: wireMac({ family: FAMILY, vmid }) };
  }

  /** Guests with stacks get their addresses and know each other's. */
  configureGuests(system: NetSystem): void {
    for (const port of this.ports) {
      const { netns } = port;
      if (netns === undefined) continue;
      netns.exec('ip', 'link', 'set', 'eth0', 'address', system.guestMac(port), 'up');
      netns.exec('ip', 'address', 'add', `${port.ip}/16`, 'dev', 'eth0');
      if (system.withoutOffloads === true) netns.exec('ethtool', '-K', 'eth0', 'tx', 'off');
      for (const other of this.ports) {
        if (other === port) continue;
        const neighbour = `ip neigh add ${other.ip} lladdr ${system.destination(other)} dev eth0`;
        netns.exec(...neighbour.split(' '), 'nud', 'permanent');
      }
    }
  }

  close(): void {
    for (const { name } of this.#namespaces.splice(0)) spawnSync('ip', ['netns', 'del', name]);
  }

  #namespace(name: string): Namespace {
    const netns = new Namespace(`${this.#prefix}${name}`);
    this.#namespaces.push(netns);
    return netns;
  }

  #port(name: GuestName, at: 0 | 1, vmid: number): Port {
    const host = this.hosts[at];
    const device = `vm-${name}`;
    const port = {
      name,
      device,
      host: at,
      vmid,
      ip: addressOfVmid(vmid),
      wireMac: wireMac({ family: FAMILY, vmid }),
    };
    if (this.kind === 'tap') {
      host.exec('ip', 'tuntap', 'add', device, 'mode', 'tap');
      host.exec('ip', 'link', 'set', device, 'address', `02:00:00:00:02:0${vmid}`, 'up');
      return port;
    }
    const netns = this.#namespace(name);
    host.exec(
      ...`ip link add ${device} address 02:00:00:00:02:0${vmid} type veth`.split(' '),
      ...`peer name eth0 address ${GUEST_MAC} netns ${netns.name}`.split(' '),
    );
    netns.exec('sysctl', '-qw', 'net.ipv6.conf.eth0.disable_ipv6=1');
    host.exec('ip', 'link', 'set', device, 'up');
    return { ...port, netns };
  }
}

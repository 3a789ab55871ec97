/**
 * A network for tests: hosts are namespaces whose uplinks hang on a bridge in a namespace of its
 * own, guests are taps whose other end the test holds, or namespaces behind a veth pair. Nothing
 * else of the machine is touched and all of it goes with `destroy`.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { NetbackFilter } from '../../src/netback-filter/filter.js';
import { addressOfVmid, GUEST_MAC, wireMac } from '../../src/network/addresses.js';
import { FramePort } from '../../src/network/frame-port.js';
import { inNetns, openTap } from '../../src/network/tap.js';
import { ipv4 } from './frames.js';

let labs = 0;

export function run(command: string, ...args: string[]): string {
  return execFileSync(command, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

export class Namespace {
  constructor(readonly name: string) {
    run('ip', 'netns', 'add', name);
    this.exec('ip', 'link', 'set', 'lo', 'up');
  }
  get path(): string {
    return `/run/netns/${this.name}`;
  }
  exec(...command: string[]): string {
    return run('ip', 'netns', 'exec', this.name, ...command);
  }
  /** Runs synchronous work in the namespace. */
  do<T>(work: () => T): T {
    return inNetns(this.path, work);
  }
}

/** Holds a tap's descriptor: sends as the guest and keeps what the guest would receive. */
export class Wire {
  readonly frames: Buffer[] = [];
  readonly #port: FramePort;
  #changed: () => void = () => {};

  constructor(fd: number) {
    const onFrame = (frame: Buffer) => {
      this.frames.push(frame);
      this.#changed();
    };
    this.#port = new FramePort(fd, { onFrame }, { maxFrameBytes: 70_000 });
  }

  send(...frames: Uint8Array[]): void {
    for (const frame of frames) {
      if (!this.#port.send(frame)) throw new Error('the tap took no frame');
    }
  }

  /** The first frame kept or still to come for which `wanted` holds. */
  async receive(wanted: (frame: Buffer) => boolean = () => true): Promise<Buffer> {
    for (;;) {
      const found = this.frames.find(wanted);
      if (found !== undefined) return found;
      await new Promise<void>((resolve, reject) => {
        const limit = setTimeout(() => {
          const seen = this.frames.map((frame) => frame.toString('hex')).join('\n');
          reject(new Error(`the frame did not arrive; these did:\n${seen}`));
        }, 10_000);
        this.#changed = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  }

  close(): void {
    this.#port.close();
  }
}

export interface Identity {
  family: number;
  vmid: number;
}

export class Guest extends Wire {
  readonly wireMac: string;
  readonly ip: string;
  constructor(
    readonly host: Host,
    readonly tap: string,
    readonly identity: Identity,
    fd: number,
  ) {
    super(fd);
    this.wireMac = wireMac(identity);
    this.ip = addressOfVmid(identity.vmid);
  }

  /** A frame to another VM, as the guest would send it. */
  frameTo(other: { wireMac: string; ip: string }, payload = 'hello'): Buffer {
    return ipv4({
      to: other.wireMac,
      sourceIp: this.ip,
      destinationIp: other.ip,
      payload: Buffer.from(payload),
    });
  }

  /** As that frame arrives at the other VM. */
  arrivingAt(other: { wireMac: string; ip: string }, payload = 'hello'): Buffer {
    return ipv4({
      to: GUEST_MAC,
      from: this.wireMac,
      sourceIp: this.ip,
      destinationIp: other.ip,
      payload: Buffer.from(payload),
    });
  }
}

export class Host {
  filter: NetbackFilter | undefined;
  constructor(
    readonly lab: Lab,
    readonly netns: Namespace,
    readonly address: string,
  ) {}

  async attach(): Promise<NetbackFilter> {
    this.filter = await this.netns.do(() => NetbackFilter.attach({ uplink: 'eth0' }));
    return this.filter;
  }

  get attached(): NetbackFilter {
    if (this.filter === undefined) throw new Error('no filter attached');
    return this.filter;
  }

  tap(name: string, vnetHdr = false): number {
    return this.netns.do(() => openTap(name, { vnetHdr, mtu: this.lab.mtu }));
  }

  guest(family: number, vmid: number, options: { vnetHdr?: boolean } = {}): Guest {
    const name = this.lab.interfaceName();
    const fd = this.tap(name, options.vnetHdr);
    const guest = new Guest(this, name, { family, vmid }, fd);
    this.lab.onDestroy(() => guest.close());
    this.netns.do(() => this.attached.addVm({ tap: name, family, vmid }));
    return guest;
  }

  /** A guest with a whole network stack; its interface is eth0, up, without an address. */
  stackGuest(family: number, vmid: number): { netns: Namespace; tap: string } {
    const netns = this.lab.namespace(`g${family}-${vmid}`);
    const tap = this.lab.interfaceName();
    this.netns.exec(
      ...`ip link add ${tap} mtu ${this.lab.mtu} address 02:00:00:00:00:02 type veth`.split(' '),
      ...`peer name eth0 mtu ${this.lab.mtu} address ${GUEST_MAC}`.split(' '),
      ...['netns', netns.name],
    );
    this.netns.exec('sysctl', '-qw', `net.ipv6.conf.${tap}.disable_ipv6=1`);
    this.netns.do(() => this.attached.addVm({ tap, family, vmid }));
    netns.exec('sysctl', '-qw', 'net.ipv6.conf.eth0.disable_ipv6=1');
    netns.exec('ip', 'link', 'set', 'eth0', 'up');
    return { netns, tap };
  }

  stats(): Record<string, number> {
    return this.attached.stats();
  }
}

export class Lab {
  readonly hosts: Host[] = [];
  /** A machine on the wire that sends what it wants and sees what is flooded. */
  readonly stranger: Wire;
  readonly #switch: Namespace;
  readonly #prefix = `sfnb${process.pid}-${++labs}-`;
  readonly #namespaces: Namespace[] = [];
  readonly #cleanup: (() => void)[] = [];
  #interfaces = 0;

  private constructor(
    hosts: number,
    readonly mtu: number,
  ) {
    this.#switch = this.namespace('sw');
    const sw = this.#switch;
    sw.exec('sysctl', '-qw', 'net.ipv6.conf.all.disable_ipv6=1');
    sw.exec('sysctl', '-qw', 'net.ipv6.conf.default.disable_ipv6=1');
    // A switch carries whatever comes. The file is there only in kernels with bridge netfilter.
    sw.exec('sysctl', '-qew', 'net.bridge.bridge-nf-call-iptables=0');
    sw.exec('sysctl', '-qew', 'net.bridge.bridge-nf-call-ip6tables=0');
    // All addresses are given: random ones can begin with 5e.
    sw.exec(...'ip link add br0 address 02:00:00:00:03:00 type bridge'.split(' '));
    sw.exec('ip', 'link', 'set', 'br0', 'up');
    const stranger = sw.do(() => openTap('stranger', { vnetHdr: false, mtu }));
    this.stranger = new Wire(stranger);
    this.onDestroy(() => this.stranger.close());
    sw.exec('ip', 'link', 'set', 'stranger', 'master', 'br0');
    // Its forged frames do not make the bridge send the others' traffic to it.
    sw.exec(...'bridge link set dev stranger learning off'.split(' '));
    for (let i = 1; i <= hosts; i++) {
      const netns = this.namespace(`h${i}`);
      const address = `192.168.77.${i}`;
      sw.exec(
        ...`ip link add port${i} mtu ${mtu} address 02:00:00:00:02:0${i} type veth`.split(' '),
        ...`peer name eth0 mtu ${mtu} address 02:00:00:00:01:0${i} netns ${netns.name}`.split(' '),
      );
      sw.exec('ip', 'link', 'set', `port${i}`, 'master', 'br0', 'up');
      netns.exec('ip', 'address', 'add', `${address}/24`, 'dev', 'eth0');
      netns.exec('ip', 'link', 'set', 'eth0', 'up');
      this.hosts.push(new Host(this, netns, address));
    }
  }

  /** Hosts with their filters attached. */
  static async create(hosts: number, { mtu = 1500 } = {}): Promise<Lab> {
    const lab = new Lab(hosts, mtu);
    try {
      for (const host of lab.hosts) await host.attach();
    } catch (error) {
      lab.destroy();
      throw error;
    }
    return lab;
  }

  /** Another machine on the wire, with a stack and an interface eth0 without an address. */
  strangeMachine(): Namespace {
    const netns = this.namespace('strange');
    this.#switch.exec(
      ...`ip link add port-s mtu ${this.mtu} address 02:00:00:00:02:99 type veth`.split(' '),
      ...`peer name eth0 mtu ${this.mtu} address 02:00:00:00:09:09`.split(' '),
      ...['netns', netns.name],
    );
    this.#switch.exec('ip', 'link', 'set', 'port-s', 'master', 'br0', 'up');
    this.#switch.exec(...'bridge link set dev port-s learning off'.split(' '));
    netns.exec('sysctl', '-qw', 'net.ipv6.conf.eth0.disable_ipv6=1');
    netns.exec('ip', 'link', 'set', 'eth0', 'up');
    return netns;
  }

  host(index: number): Host {
    const host = this.hosts[index];
    if (host === undefined) throw new Error(`no host ${index}`);
    return host;
  }

  namespace(name: string): Namespace {
    const netns = new Namespace(`${this.#prefix}${name}`);
    this.#namespaces.push(netns);
    return netns;
  }

  /** A namespace's eth0, down and without an address, on the switch. */
  joinSwitch(netns: Namespace, port: string, mac: string): void {
    const pair = `ip link add ${port} address 02:00:00:00:04:01 type veth peer name eth0`;
    this.#switch.exec(...pair.split(' '), ...`address ${mac} netns ${netns.name}`.split(' '));
    this.#switch.exec('ip', 'link', 'set', port, 'master', 'br0', 'up');
  }

  interfaceName(): string {
    return `vm${++this.#interfaces}`;
  }

  onDestroy(work: () => void): void {
    this.#cleanup.push(work);
  }

  destroy(): void {
    for (const work of this.#cleanup.reverse()) work();
    for (const host of this.hosts) host.filter?.close();
    for (const netns of this.#namespaces) spawnSync('ip', ['netns', 'del', netns.name]);
  }
}

/** What the counters gained since `before`, zeros left out. */
export function gained(
  before: Record<string, number>,
  after: Record<string, number>,
): Record<string, number> {
  return Object.fromEntries(
    Object.entries(after)
      .map(([name, count]) => [name, count - (before[name] ?? 0)] as const)
      .filter(([, count]) => count !== 0),
  );
}

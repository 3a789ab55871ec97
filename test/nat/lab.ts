/** A host with families behind its gateways, a machine outside, and sockets in all of them. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { NatHost, type NatHostOptions } from '../../src/nat/gateway.js';
import { type NatPolicy, parsePolicy } from '../../src/nat/policy.js';
import type { Resolver } from '../../src/nat/resolve.js';
import { addressOfVmid } from '../../src/network/addresses.js';
import { filterIn } from '../../src/testbed/filter-in.js';
import { type Host, Lab, type Namespace } from '../netback-filter/lab.js';

export const SERVER = '192.168.77.100';
/** More addresses of the machine outside. */
export const OTHERS = ['198.51.100.1', '203.0.113.5'];
export const HOST = '192.168.77.1';

export interface Outcome {
  outcome: string;
  ms: number;
  packets_per_s?: number;
  bytes_per_s?: number;
  sent?: number;
  bytes?: number;
  mtu?: number;
}

/** peer.py: see there what operations take. */
export class Peers {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, (outcome: Outcome) => void>();
  #next = 1;

  constructor() {
    const script = join(dirname(fileURLToPath(import.meta.url)), 'peer.py');
    const child = spawn('python3', [script], { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#child = child;
    createInterface({ input: child.stdout }).on('line', (line) => {
      const answer = JSON.parse(line) as Outcome & { id: number };
      this.#waiting.get(answer.id)?.(answer);
      this.#waiting.delete(answer.id);
    });
    child.on('exit', () => {
      for (const done of this.#waiting.values()) done({ outcome: 'peer.py ended', ms: 0 });
    });
  }

  ask(netns: Pick<Namespace, 'path'>, op: string, request: object = {}): Promise<Outcome> {
    const id = this.#next++;
    const answer = new Promise<Outcome>((resolve) => this.#waiting.set(id, resolve));
    this.#child.stdin?.write(`${JSON.stringify({ id, op, netns: netns.path, ...request })}\n`);
    return answer;
  }

  close(): void {
    this.#child.kill('SIGKILL');
  }
}

export interface Guest {
  netns: Namespace;
  tap: string;
  family: number;
  vmid: number;
  address: string;
}

export class NatLab {
  readonly peers = new Peers();
  readonly guests: Guest[] = [];
  readonly runDir = mkdtempSync(join(tmpdir(), 'sfnat-'));
  nat: NatHost;

  private constructor(
    readonly lab: Lab,
    readonly outside: Namespace,
    readonly resolver: Resolver,
  ) {
    this.nat = this.newNat();
  }

  /** As a daemon that starts: it knows nothing but what is in the kernel and the run folder. */
  newNat(index = 0, more: Partial<NatHostOptions> = {}): NatHost {
    return new NatHost({ ...this.place(index), ...more });
  }

  place(index = 0) {
    const { attached, netns } = this.lab.host(index);
    const { runDir, resolver } = this;
    return { filter: filterIn(attached, netns.path), netns: netns.path, runDir, resolver };
  }

  static async create(resolver: Resolver = () => Promise.resolve([]), hosts = 1): Promise<NatLab> {
    const lab = await Lab.create(hosts);
    try {
      const outside = lab.namespace('out');
      lab.joinSwitch(outside, 'out', '02:00:00:00:05:01');
      outside.exec('ip', 'address', 'add', `${SERVER}/24`, 'dev', 'eth0');
      for (const address of OTHERS) {
        outside.exec('ip', 'address', 'add', `${address}/32`, 'dev', 'eth0');
      }
      outside.exec('ip', 'link', 'set', 'eth0', 'up');
      for (const { netns } of lab.hosts) {
        netns.exec('ip', 'route', 'add', 'default', 'via', SERVER);
      }
      return new NatLab(lab, outside, resolver);
    } catch (error) {
      lab.destroy();
      throw error;
    }
  }

  get host(): Host {
    return this.lab.host(0);
  }

  /** A guest with its address and the gateway as its way out. */
  guest(family: number, vmid: number, index = 0): Guest {
    const { netns, tap } = this.lab.host(index).stackGuest(family, vmid);
    const address = addressOfVmid(vmid);
    netns.exec('ip', 'address', 'add', `${address}/16`, 'dev', 'eth0');
    netns.exec('ip', 'route', 'add', 'default', 'via', '10.86.0.1');
    const guest = { netns, tap, family, vmid, address };
    this.guests.push(guest);
    return guest;
  }

  /** Echo servers outside. */
  async serve(...ports: number[]): Promise<void> {
    const one = async (op: string, address: string, port: number) => {
      const { outcome } = await this.peers.ask(this.outside, op, { address, port });
      if (outcome !== 'ok') throw new Error(`${op} ${port}: ${outcome}`);
    };
    for (const port of ports) {
      await one('serve_tcp', '0.0.0.0', port);
      // One each: an answer comes from the address that was asked.
      for (const address of [SERVER, ...OTHERS]) await one('serve_udp', address, port);
    }
  }

  apply(policy: object) {
    return this.nat.apply(parsePolicy({ version: 1, ...policy }, 'test') as NatPolicy);
  }

  async counters(family: number) {
    const { gateways } = await this.nat.view();
    const gateway = gateways.find((it) => it.family === family);
    if (gateway === undefined) throw new Error(`no gateway of family ${family}`);
    return gateway.counters;
  }

  async destroy(): Promise<void> {
    this.peers.close();
    for (const index of this.lab.hosts.keys()) {
      await this.newNat(index)
        .remove()
        .catch((error: unknown) => console.error(error));
    }
    this.lab.destroy();
    rmSync(this.runDir, { recursive: true, force: true });
  }
}

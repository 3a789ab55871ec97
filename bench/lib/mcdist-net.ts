/**
 * The hosts of the mcdist benches: network namespaces joined by a bridge in a namespace of its own.
 * Nothing touches the machine's network; all names hold this process's id.
 *
 * With a limit each end of each veth pair has a token bucket (TBF), so no link of a host is faster
 * than another, either way. Loss is at the receivers: each drops packets at random, independently
 * of the others, before its IP stack sees them. With loss or a limit, segmentation offload is off:
 * what the qdisc counts and loss hits is what would be on a wire.
 */
import { readFileSync } from 'node:fs';
import { run } from '../../src/common/run.js';
import { Host } from '../../test/mcdist/net.js';

export interface NetPlan {
  readonly receivers: number;
  /** 0: none. */
  readonly limit_mbit_per_s: number;
  /** Of each receiver. */
  readonly loss_percent: number;
}

const TBF_BURST = '128kb';
const TBF_LATENCY = '20ms';
const ETHERNET_HEADER_BYTES = 14;

let nets = 0;

export interface Place {
  readonly namespace: string;
  readonly address: string;
}

export class BenchNet {
  readonly #prefix = `sfmb${process.pid}x${++nets}`;
  readonly #namespaces: string[] = [];
  readonly #places: Place[] = [];
  readonly #hosts = new Set<Host>();

  private constructor(readonly plan: NetPlan) {}

  static async make(plan: NetPlan): Promise<BenchNet> {
    const net = new BenchNet(plan);
    try {
      const hub = await net.#namespace('hub');
      await run('ip', ['-n', hub, 'link', 'add', 'br0', 'type', 'bridge']);
      await run('ip', ['-n', hub, 'link', 'set', 'br0', 'up']);
      for (let host = 0; host <= plan.receivers; host++) await net.#addHost(hub, host);
      return net;
    } catch (error) {
      await net.close();
      throw error;
    }
  }

  get source(): Place {
    return this.#at(0);
  }

  get receivers(): readonly Place[] {
    return this.#places.slice(1);
  }

  /** A process of ours in a namespace: `program` is what Node.js runs, see {@link Host}. */
  async start(place: Place, program: string): Promise<Host> {
    const host = await Host.start(place.namespace, place.address, [program]);
    this.#hosts.add(host);
    return host;
  }

  async end(hosts: readonly Host[]): Promise<void> {
    for (const host of hosts) {
      await host.kill();
      this.#hosts.delete(host);
    }
  }

  /** How any program is run in a namespace; it dies with this process. */
  command(place: Place, argv: readonly string[]): string[] {
    return ['ip', 'netns', 'exec', place.namespace, 'setpriv', '--pdeathsig', 'KILL', ...argv];
  }

  async close(): Promise<void> {
    await this.end([...this.#hosts]);
    for (const namespace of this.#namespaces.splice(0))
      await run('ip', ['netns', 'del', namespace]);
  }

  #at(number: number): Place {
    const place = this.#places[number];
    if (place === undefined) throw new RangeError(`no host ${number}`);
    return place;
  }

  async #namespace(suffix: string): Promise<string> {
    const name = `${this.#prefix}${suffix}`;
    await run('ip', ['netns', 'add', name]);
    this.#namespaces.push(name);
    return name;
  }

  async #addHost(hub: string, number: number): Promise<void> {
    const { limit_mbit_per_s, loss_percent } = this.plan;
    const namespace = await this.#namespace(`h${number}`);
    const address = `10.9.0.${number + 1}`;
    const port = `p${number}`;
    const peer = ['peer', 'name', 'eth0', 'netns', namespace];
    await run('ip', ['-n', hub, 'link', 'add', port, 'type', 'veth', ...peer]);
    const ends = [
      [hub, port],
      [namespace, 'eth0'],
    ] as const;
    for (const [where, device] of ends) {
      if (limit_mbit_per_s > 0 || loss_percent > 0) {
        const off = ['gso', 'off', 'tso', 'off', 'gro', 'off', 'tx-udp-segmentation', 'off'];
        await run('ip', ['netns', 'exec', where, 'ethtool', '-K', device, ...off]);
      }
      if (limit_mbit_per_s > 0) {
        const bucket = ['rate', `${limit_mbit_per_s}mbit`, 'burst', TBF_BURST];
        const tbf = ['root', 'tbf', ...bucket, 'latency', TBF_LATENCY];
        await run('tc', ['-n', where, 'qdisc', 'add', 'dev', device, ...tbf]);
      }
    }
    await run('ip', ['-n', hub, 'link', 'set', port, 'master', 'br0', 'up']);
    // With its broadcast address: udpcast's receivers find the sender by it.
    await run('ip', ['-n', namespace, 'addr', 'add', `${address}/24`, 'brd', '+', 'dev', 'eth0']);
    await run('ip', ['-n', namespace, 'link', 'set', 'eth0', 'up']);
    await run('ip', ['-n', namespace, 'link', 'set', 'lo', 'up']);
    if (loss_percent > 0 && number > 0) await lose(namespace, loss_percent);
    this.#places.push({ namespace, address });
  }
}

async function lose(namespace: string, percent: number): Promise<void> {
  const nft = (command: string) => run('ip', ['netns', 'exec', namespace, 'nft', command]);
  await nft('add table ip loss');
  await nft('add chain ip loss in { type filter hook prerouting priority -300 ; }');
  await nft(`add rule ip loss in numgen random mod 100 < ${percent} drop`);
}

/** What left by the interface of a process's namespace: bytes of IP packets, packets. */
export function sent(pid: number): { bytes: number; packets: number } {
  const text = readFileSync(`/proc/${pid}/net/dev`, 'utf8');
  const line = text.split('\n').find((each) => each.trim().startsWith('eth0:')) ?? '';
  const fields = line
    .slice(line.indexOf(':') + 1)
    .trim()
    .split(/\s+/)
    .map(Number);
  const [bytes = Number.NaN, packets = Number.NaN] = fields.slice(8);
  return { bytes: bytes - packets * ETHERNET_HEADER_BYTES, packets };
}

import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { projectRoot } from '../../src/common/native.js';
import { randomGroup } from '../../src/mcdist/groups.js';

const run = promisify(execFile);
const HOST = join(projectRoot, 'test', 'mcdist', 'host.mjs');

export interface HostError {
  code?: string;
  message: string;
}

/** A process in a namespace of its own, see host.mjs. */
export class Host {
  readonly #child: ChildProcess;
  readonly #calls = new Map<number, (reply: { value?: unknown; error?: HostError }) => void>();
  readonly exited: Promise<void>;
  #next = 0;

  private constructor(
    readonly namespace: string,
    readonly address: string,
    child: ChildProcess,
  ) {
    this.#child = child;
    this.exited = new Promise((resolve) => child.once('exit', () => resolve()));
    child.on('message', (reply: { id: number; value?: unknown; error?: HostError }) => {
      this.#calls.get(reply.id)?.(reply);
      this.#calls.delete(reply.id);
    });
    child.once('exit', () => {
      for (const call of this.#calls.values()) call({ error: { message: 'host exited' } });
      this.#calls.clear();
    });
  }

  static async start(namespace: string, address: string, program: string[]): Promise<Host> {
    // `ip netns exec` becomes node itself, so the pid is node's.
    const child = spawn('ip', ['netns', 'exec', namespace, process.execPath, ...program], {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    const host = new Host(namespace, address, child);
    await new Promise<void>((resolve, reject) => {
      child.once('message', () => resolve());
      child.once('exit', (code) => reject(new Error(`host process ended with ${code}`)));
    });
    return host;
  }

  call<T = void>(op: string, args: object = {}): Promise<T> {
    const id = ++this.#next;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, (reply) => {
        if (reply.error === undefined) resolve(reply.value as T);
        else reject(Object.assign(new Error(reply.error.message), { code: reply.error.code }));
      });
      this.#child.send({ id, op, args });
    });
  }

  async kill(): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      this.#child.kill('SIGKILL');
    }
    await this.exited;
  }
}

let nets = 0;

/** Namespaces joined by a bridge in a namespace of its own; nothing touches the machine's network. */
export class Net {
  readonly #prefix = `sfmc${process.pid}x${++nets}`;
  readonly #namespaces: string[] = [];
  readonly #hosts: Host[] = [];
  readonly folder: Promise<string>;

  private constructor(
    readonly mtu: number,
    readonly program: string[],
  ) {
    // The replicas are on tmpfs, as those of memory are.
    this.folder = mkdtemp('/dev/shm/sf-mcdist-');
  }

  /** `program`: what runs as a host, arguments of node; it answers messages as host.mjs does. */
  static async make(mtu = 1500, program = [HOST]): Promise<Net> {
    const net = new Net(mtu, program);
    const hub = net.#name('hub');
    await run('ip', ['netns', 'add', hub]);
    net.#namespaces.push(hub);
    await run('ip', ['-n', hub, 'link', 'add', 'br0', 'type', 'bridge']);
    await run('ip', ['-n', hub, 'link', 'set', 'br0', 'up']);
    return net;
  }

  #name(suffix: string): string {
    return `${this.#prefix}${suffix}`;
  }

  /** A new namespace on the bridge and a process in it. */
  async host(): Promise<Host> {
    const { namespace, address } = await this.namespace();
    return this.restart(namespace, address);
  }

  /** A new namespace on the bridge, with nothing in it. */
  async namespace(): Promise<{ namespace: string; address: string }> {
    const number = this.#namespaces.length;
    const namespace = this.#name(`h${number}`);
    const hub = this.#name('hub');
    const address = `10.9.0.${number}`;
    await run('ip', ['netns', 'add', namespace]);
    this.#namespaces.push(namespace);
    const port = `p${number}`;
    await run('ip', [
      ...['-n', hub, 'link', 'add', port, 'mtu', `${this.mtu}`, 'type', 'veth'],
      ...['peer', 'name', 'eth0', 'mtu', `${this.mtu}`, 'netns', namespace],
    ]);
    await run('ip', ['-n', hub, 'link', 'set', port, 'master', 'br0', 'up']);
    await run('ip', ['-n', namespace, 'addr', 'add', `${address}/24`, 'dev', 'eth0']);
    await run('ip', ['-n', namespace, 'link', 'set', 'eth0', 'up']);
    await run('ip', ['-n', namespace, 'link', 'set', 'lo', 'up']);
    return { namespace, address };
  }

  /** Another process in a namespace that is there. */
  async restart(namespace: string, address: string): Promise<Host> {
    const host = await Host.start(namespace, address, this.program);
    this.#hosts.push(host);
    return host;
  }

  /** Removes the source's replica, so that another generation may take its place. */
  async forgetSource(): Promise<void> {
    const path = join(await this.folder, 'source');
    await Promise.all([rm(path, { force: true }), rm(`${path}.map`, { force: true })]);
  }

  /** Drops that share of all packets that come to a host. */
  async lose(host: Host, percent: number): Promise<void> {
    const nft = (...words: string[]) =>
      run('ip', ['netns', 'exec', host.namespace, 'nft', ...words]);
    await nft('add table ip loss');
    await nft('add chain ip loss in { type filter hook prerouting priority -300 ; }');
    await nft(`add rule ip loss in udp length gt 0 numgen random mod 100 < ${percent} drop`);
  }

  /** No multicast reaches the host; all else does. */
  async noMulticast(host: Host): Promise<void> {
    const nft = (...words: string[]) =>
      run('ip', ['netns', 'exec', host.namespace, 'nft', ...words]);
    await nft('add table ip unicast');
    await nft('add chain ip unicast in { type filter hook prerouting priority -300 ; }');
    await nft('add rule ip unicast in udp length gt 0 ip daddr 224.0.0.0/4 drop');
  }

  /** Takes a host's link down at the bridge's port, or up again. */
  async link(host: Host, state: 'up' | 'down'): Promise<void> {
    const port = `p${host.address.split('.').at(-1)}`;
    await run('ip', ['-n', this.#name('hub'), 'link', 'set', port, state]);
  }

  async close(): Promise<void> {
    for (const host of this.#hosts) await host.kill();
    for (const namespace of this.#namespaces) await run('ip', ['netns', 'del', namespace]);
    await rm(await this.folder, { recursive: true, force: true });
  }
}

/** A generation to be distributed: ids, key, group. */
export function newGeneration(): {
  generation: string;
  keyHex: string;
  group: string;
  groupPort: number;
} {
  const generation = randomBytes(16).toString('hex');
  const { group, port } = randomGroup();
  return { generation, keyHex: randomBytes(32).toString('hex'), group, groupPort: port };
}
export type TestGeneration = ReturnType<typeof newGeneration>;

/** A source replica on `host` filled from `seed`, served by a server named `server`. */
export async function startSource(
  net: Net,
  host: Host,
  generation: TestGeneration,
  options: {
    pages: number;
    seed?: number;
    held?: number;
    zeros?: [number, number][];
    /** First and count of pages that LZ4 makes small. */
    packs?: [number, number];
    port?: number;
    policy?: object;
    mtuBytes?: number;
    fresh?: boolean;
  },
): Promise<{ address: string; port: number }> {
  const path = join(await net.folder, 'source');
  await host.call('replica', {
    name: 'source',
    path,
    generation: generation.generation,
    pages: options.pages,
    medium: 'memory',
  });
  if (options.fresh !== false) {
    await host.call('fillSource', {
      name: 'source',
      seed: options.seed ?? 1,
      count: options.held ?? options.pages,
      zeros: options.zeros,
      packs: options.packs,
    });
  }
  const port = await host.call<number>('server', {
    name: 'server',
    bindAddress: host.address,
    port: options.port ?? 0,
    interfaceAddress: host.address,
    mtuBytes: options.mtuBytes ?? 1500,
  });
  await host.call('serve', {
    name: 'server',
    provider: 'source',
    ...generation,
    policy: options.policy,
  });
  return { address: host.address, port };
}

/** An empty replica named `replica` on `host` and its client named `client`. */
export async function startReceiver(
  net: Net,
  host: Host,
  generation: TestGeneration,
  server: { address: string; port: number },
  options: { pages: number; sourceTimeoutMs?: number; mtuBytes?: number; name?: string },
): Promise<void> {
  const suffix = options.name ?? '';
  await host.call('replica', {
    name: `replica${suffix}`,
    path: join(await net.folder, `replica-${host.namespace}${suffix}`),
    generation: generation.generation,
    pages: options.pages,
    medium: 'memory',
  });
  await host.call('client', {
    name: `client${suffix}`,
    replica: `replica${suffix}`,
    ...generation,
    server,
    interfaceAddress: host.address,
    sourceTimeoutMs: options.sourceTimeoutMs ?? 20_000,
    mtuBytes: options.mtuBytes ?? 1500,
  });
}

/** A cluster of namespaces with daemons for one test file, and what tests do with its VMs. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ForkRecord, SnowflockClient } from '../../src/api/client.js';
import { exec } from '../../src/api/exec.js';
import { connectToDataplane } from '../../src/dataplane/rpc.js';
import { defaultImageDir } from '../../src/image/images.js';
import type { VmRecord } from '../../src/sfld/records.js';
import {
  configure,
  startDaemonOn,
  startDaemons,
  type TestbedDaemon,
} from '../../src/testbed/daemons.js';
import { Testbed } from '../../src/testbed/testbed.js';

export const MIB = 2 ** 20;

export class Lab {
  private constructor(
    readonly testbed: Testbed,
    readonly daemons: TestbedDaemon[],
  ) {}

  /** `own`: further settings of single hosts, by index. */
  static async start(
    hosts: number,
    settings: Record<string, unknown> = {},
    own: Record<string, unknown>[] = [],
  ): Promise<Lab> {
    Testbed.reap();
    const testbed = await Testbed.create({ hosts });
    try {
      for (const [index, host] of testbed.hosts.entries()) {
        await configure(host, { image_dir: defaultImageDir(), ...settings, ...own[index] });
      }
      return new Lab(testbed, await startDaemons(testbed));
    } catch (error) {
      await testbed.destroy();
      throw error;
    }
  }

  daemon(index: number): TestbedDaemon {
    const daemon = this.daemons[index];
    if (daemon === undefined) throw new Error(`the lab has no host ${index}`);
    return daemon;
  }

  /** A host loses its power: see Testbed.powerOff. */
  async powerOff(index: number): Promise<void> {
    await this.testbed.powerOff(this.daemon(index).host);
  }

  /** ... and comes back, with its files. */
  async powerOn(index: number): Promise<void> {
    const { host } = this.daemon(index);
    this.testbed.heal(host);
    this.daemons[index] = await startDaemonOn(this.testbed, host);
  }

  /** SIGKILL; resolves when another one runs. */
  async killDataplane(index: number): Promise<void> {
    const { host } = this.daemon(index);
    const pid = await dataplanePid(host.dirs.run);
    process.kill(pid, 'SIGKILL');
    await until('a new data plane', 30_000, async () =>
      dataplanePid(host.dirs.run).then(
        (now) => now !== pid,
        () => false,
      ),
    );
  }

  get client(): SnowflockClient {
    return this.daemon(0).client;
  }

  async parent(name: string, ramMib = 256): Promise<string> {
    const vm = await this.client.run({
      name,
      image: 'minimal',
      ram_bytes: ramMib * MIB,
      vcpus: 1,
    });
    return vm.id;
  }

  /** Ticket and fork from outside; fails unless all clones asked for were granted and run. */
  async fork(vm: string, clones: number): Promise<ForkRecord> {
    const ticket = await this.client.requestTicket(vm, clones);
    if (ticket.granted !== clones) throw new Error(`granted ${ticket.granted} of ${clones}`);
    const fork = await this.client.clone(vm, ticket.ticket);
    const failed = fork.clones.find((clone) => !clone.ok);
    if (failed !== undefined) throw new Error(`${failed.error?.message}\n${this.logs()}`);
    return fork;
  }

  /** The daemons' own records of all VMs. */
  records(): VmRecord[] {
    return this.testbed.hosts.flatMap((host) => {
      const folder = join(host.dirs.state, 'vms');
      return readdirSync(folder)
        .filter((name) => name.endsWith('.json'))
        .map((name) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as VmRecord);
    });
  }

  /**
   * What is on a host that belongs to no VM the daemon knows: VM processes, taps, replicas, saved
   * pages, disks, sockets.
   */
  async remnants({ host, client }: TestbedDaemon): Promise<string[]> {
    const { vms } = await client.list();
    const known = vms.filter((vm) => vm.host === host.name).map((vm) => vm.id);
    const bases = this.records()
      .filter((record) => known.includes(record.id))
      .flatMap((record) => [record.base?.ram.generation, record.base?.disk.generation]);
    const { forks } = await client.forks();
    const open = forks.filter((fork) => fork.state === 'open').map((fork) => fork.ram.generation);
    const wanted = [...known, ...bases, ...open];
    const files = ['replica', 'generation'].map((name) => join(host.dirs.ram, name));
    files.push(join(host.dirs.state, 'replica'), join(host.dirs.state, 'disk'));
    files.push(join(host.dirs.run, 'vm'));
    const left = files.flatMap((folder) =>
      readdirSync(folder)
        .filter((name) => !wanted.includes(name.replace(/\.map$/, '')))
        .map((name) => join(folder, name)),
    );
    const links = await this.testbed.execIn(host, ['ip', '-o', 'link', 'show']);
    for (const [, tap = '', vm = ''] of links.stdout.matchAll(/ (sf-(vm[0-9a-f]{8})):/g)) {
      if (!known.includes(vm)) left.push(`tap ${tap}`);
    }
    const socket = `SF_MEMTAP_SOCKET=${host.dirs.run}/memtap.sock`;
    for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
      let environment: string[];
      try {
        environment = readFileSync(join('/proc', pid, 'environ'), 'latin1').split('\0');
      } catch {
        continue; // it has ended
      }
      const vm = environment.find((entry) => entry.startsWith('SF_MEMTAP_VM='))?.slice(13);
      if (environment.includes(socket) && vm !== undefined && !known.includes(vm)) {
        left.push(`process ${pid} of ${vm}`);
      }
    }
    return left;
  }

  /** The ends of all daemons' logs, for messages. */
  logs(): string {
    return this.daemons
      .map(({ host, logPath }) => `--- ${host.name}\n${readFileSync(logPath, 'utf8').slice(-1500)}`)
      .join('\n');
  }

  destroy(): Promise<void> {
    return this.testbed.destroy();
  }
}

/** Of the host whose sockets are in `runDir`. Errors: E_DATAPLANE. */
export async function dataplanePid(runDir: string): Promise<number> {
  const client = await connectToDataplane(join(runDir, 'dataplane.sock'));
  try {
    return (await client.call('ping', {})).pid;
  } finally {
    client.close();
  }
}

/** Runs a shell script in a guest; its standard output. Fails if it exits with another status. */
export async function sh(
  client: SnowflockClient,
  vm: string,
  script: string,
  status = 0,
): Promise<string> {
  const child = await exec(client, vm, ['/bin/sh', '-c', script]);
  child.stdin.end();
  let out = '';
  let errors = '';
  child.stdout.on('data', (data: Buffer) => {
    out += data.toString();
  });
  child.stderr.on('data', (data: Buffer) => {
    errors += data.toString();
  });
  const exited = await child.exited;
  if (exited.status !== status) {
    throw new Error(`${vm}: ${script}: ended with ${JSON.stringify(exited)}: ${out}${errors}`);
  }
  return out.trim();
}

/** Waits for something that has no event of its own, looking every 50 ms; bounded. */
export async function until(what: string, limitMs: number, look: () => Promise<boolean>) {
  const limit = Date.now() + limitMs;
  while (!(await look())) {
    if (Date.now() > limit) throw new Error(`${what}: not after ${limitMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

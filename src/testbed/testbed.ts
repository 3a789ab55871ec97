/**
 * Hosts as network namespaces on one machine, nothing shared: each has its own address on a
 * switch of its own, its own folders, its own certificate, and what runs there is started by
 * `spawnIn`. What works here works on several machines; a host can be cut off and joined again.
 *
 * States: making → up → removed. Everything made is in a record first (see record.ts), and is
 * removed by destroy(), at process exit, on SIGINT, SIGTERM and SIGHUP, and after an uncaught
 * error; after SIGKILL by the next `Testbed.reap()`, which touches only what a record of a dead
 * owner names. keep() lets it outlive its maker, until Testbed.remove().
 *
 * Removal is synchronous: it is the same code in an exit handler, where nothing else can run. It
 * ends every process inside the namespaces, whoever started it: a namespace is the testbed's own.
 *
 * Left out on purpose: mount, pid and user namespaces. Hosts share the machine's file system, and
 * each is told its own folders.
 */
import { type ChildProcess, type SpawnOptions, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, mkdirSync, rmSync, statfsSync } from 'node:fs';
import { cpus, freemem } from 'node:os';
import { join } from 'node:path';
import { initCluster } from '../cluster/ca.js';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import {
  createNetwork,
  HOSTS_MAX,
  hostAddress,
  hostNetns,
  netnsNames,
  removeNetns,
  setPort,
} from './network.js';
import {
  endProcessesSync,
  identify,
  isAlive,
  type ProcessId,
  processesInNetns,
  signalProcess,
} from './processes.js';
import {
  namesOf,
  readRecord,
  recordNames,
  removeRecord,
  type TestbedRecord,
  writeRecord,
} from './record.js';

/** For what was killed to be gone. */
const KILL_LIMIT_MS = 10_000;

export interface TestbedOptions {
  /** Number of hosts, 1 to 200; they are called h1, h2, … */
  readonly hosts: number;
  /** At most 12 of a-z and 0-9; default: made from the pid and a random part. */
  readonly name?: string;
  /** Limits each host's uplink, both ways. */
  readonly rateLimitMbit?: number;
  /** What each host may give to VMs; default: all CPUs, an equal share of free memory. */
  readonly resources?: {
    readonly cpus?: number;
    readonly memoryBytes?: number;
    readonly overcommit?: { readonly cpus?: number; readonly memory?: number };
  };
  /** Where the hosts' disks go; default `/var/tmp`. */
  readonly stateRoot?: string;
}

/** One host of a testbed. */
export interface TestbedHost {
  readonly name: string;
  /** Network namespace, under `/run/netns`. */
  readonly netns: string;
  /** IPv4 address on the uplink. */
  readonly address: string;
  readonly uplink: string;
  /** Its `host.json`, for `loadClusterConfig`. */
  readonly configPath: string;
  readonly dirs: { readonly state: string; readonly run: string; readonly ram: string };
}

/** What a command in a host's namespace said. */
export interface ExecResult {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

const EXEC_OUTPUT_BYTES_MAX = 16 * 1024 * 1024;

/** Testbeds of this process that are not removed yet. */
const live = new Set<Testbed>();

export class Testbed {
  readonly name: string;
  readonly hosts: readonly TestbedHost[];
  readonly #record: TestbedRecord;
  readonly #spawned: ProcessId[] = [];
  #removed = false;

  private constructor(record: TestbedRecord, hosts: readonly TestbedHost[]) {
    this.name = record.name;
    this.#record = record;
    this.hosts = hosts;
  }

  /**
   * Makes a testbed. Root only.
   * @throws {SnowflockError} `E_REQUIREMENT`, `E_ARGUMENT`, `E_EXISTS`, `E_NETWORK`, `E_IO`;
   * nothing is left behind.
   */
  static async create(options: TestbedOptions): Promise<Testbed> {
    if (process.getuid?.() !== 0) {
      throw new SnowflockError('E_REQUIREMENT', 'network namespaces need root: use sudo');
    }
    const count = options.hosts;
    if (!Number.isInteger(count) || count < 1 || count > HOSTS_MAX) {
      throw new SnowflockError('E_ARGUMENT', `${count} hosts: 1 to ${HOSTS_MAX} are possible`);
    }
    const name = options.name ?? `${process.pid.toString(36)}${randomBytes(2).toString('hex')}`;
    if (!/^[a-z0-9]{1,12}$/.test(name)) {
      throw new SnowflockError('E_ARGUMENT', `testbed name ${name}: at most 12 of a-z, 0-9`);
    }
    const owner = identify(process.pid);
    if (!owner) throw new SnowflockError('E_REQUIREMENT', 'cannot read /proc');
    const { prefix } = namesOf(name);
    const roots = {
      state: join(options.stateRoot ?? '/var/tmp', prefix),
      run: join('/run', prefix),
      ram: join('/dev/shm', prefix),
    };
    const record: TestbedRecord = {
      version: 1,
      name,
      owner,
      netns: netnsNames(prefix, count),
      dirs: Object.values(roots),
      processes: [],
    };
    const hosts = Array.from({ length: count }, (_, at): TestbedHost => {
      const host = `h${at + 1}`;
      return {
        name: host,
        netns: hostNetns(prefix, at + 1),
        address: hostAddress(at + 1),
        uplink: 'eth0',
        configPath: join(roots.state, 'cluster', 'hosts', host, 'host.json'),
        dirs: {
          state: join(roots.state, host),
          run: join(roots.run, host),
          ram: join(roots.ram, host),
        },
      };
    });
    const testbed = new Testbed(record, hosts);
    writeRecord(record, true);
    live.add(testbed);
    installHandlers();
    try {
      // Traversable by others: QEMU runs as a user without privileges. Keys have modes of their own.
      for (const dir of [...record.dirs, ...hosts.flatMap((host) => Object.values(host.dirs))]) {
        mkdirSync(dir, { recursive: true });
        chmodSync(dir, 0o755);
      }
      createNetwork(prefix, count, options.rateLimitMbit);
      await initCluster({
        dir: join(roots.state, 'cluster'),
        name,
        hosts: hosts.map((host) => ({
          name: host.name,
          address: host.address,
          stateDir: host.dirs.state,
          runDir: host.dirs.run,
          ramDir: host.dirs.ram,
          uplink: host.uplink,
          resources: resourcesOf(options, roots.ram),
        })),
      });
    } catch (error) {
      testbed.destroySync(0);
      throw asSnowflockError(error, 'E_IO');
    }
    return testbed;
  }

  /**
   * Removes what testbeds whose owner is dead have left on this machine.
   * @returns the names of those removed.
   * @throws {SnowflockError} the first failure, after all others were removed.
   */
  static reap(): string[] {
    const reaped: string[] = [];
    const failures: unknown[] = [];
    for (const name of recordNames()) {
      try {
        const record = readRecord(name);
        if (!record || record.kept || isAlive(record.owner)) continue;
        remove(record, [], 0);
        reaped.push(name);
      } catch (error) {
        failures.push(error);
      }
    }
    if (failures.length > 0) throw failures[0];
    return reaped;
  }

  /** Names of the testbeds on this machine. */
  static list(): string[] {
    return recordNames();
  }

  /**
   * Removes a testbed that was kept, or whose maker is dead.
   * @throws {SnowflockError} `E_NOT_FOUND`, `E_IN_USE` when its maker still runs it.
   */
  static remove(name: string): void {
    const record = /^[a-z0-9]{1,12}$/.test(name) ? readRecord(name) : undefined;
    if (!record) throw new SnowflockError('E_NOT_FOUND', `there is no testbed ${name}`);
    if (!record.kept && isAlive(record.owner)) {
      throw new SnowflockError('E_IN_USE', `testbed ${name} is run by process ${record.owner.pid}`);
    }
    remove(record, record.processes, 2000);
  }

  /**
   * Leaves the testbed and its processes running when this process ends; `Testbed.remove(name)`
   * ends it. Processes that hold pipes to this one must get by without them.
   */
  keep(): void {
    if (this.#removed) throw new SnowflockError('E_CLOSED', `testbed ${this.name} is removed`);
    this.#record.kept = true;
    writeRecord(this.#record);
    this.#forget();
  }

  /** @throws {SnowflockError} `E_NOT_FOUND`. */
  host(name: string): TestbedHost {
    const host = this.hosts.find((candidate) => candidate.name === name);
    if (!host) throw new SnowflockError('E_NOT_FOUND', `testbed has no host ${name}`);
    return host;
  }

  /**
   * Starts a program in a host's network namespace. The child's pid is the program's own. It is
   * ended by destroy() at the latest.
   */
  spawnIn(host: TestbedHost, argv: readonly string[], options: SpawnOptions = {}): ChildProcess {
    if (this.#removed) throw new SnowflockError('E_CLOSED', `testbed ${this.name} is removed`);
    const child = spawn('nsenter', [`--net=/run/netns/${host.netns}`, '--', ...argv], options);
    const id = child.pid === undefined ? undefined : identify(child.pid);
    if (id) {
      this.#spawned.push(id);
      const processes = [...this.#record.processes.filter(isAlive), id];
      this.#record.processes = processes;
      writeRecord(this.#record);
    }
    return child;
  }

  /**
   * Runs a command in a host's network namespace to its end.
   * @throws {SnowflockError} `E_TIMEOUT` (default after 30 s; the command is killed), `E_IO`.
   */
  execIn(
    host: TestbedHost,
    argv: readonly string[],
    options: { readonly timeoutMs?: number; readonly input?: string | Uint8Array } = {},
  ): Promise<ExecResult> {
    const child = this.spawnIn(host, argv, { stdio: ['pipe', 'pipe', 'pipe'] });
    return new Promise((resolve, reject) => {
      const output = { stdout: [] as Buffer[], stderr: [] as Buffer[] };
      let bytes = 0;
      let failed: SnowflockError | undefined;
      const fail = (code: 'E_TIMEOUT' | 'E_IO', what: string): void => {
        failed ??= new SnowflockError(code, `${argv.join(' ')} on ${host.name}: ${what}`);
        child.kill('SIGKILL');
      };
      const limit = setTimeout(
        () => fail('E_TIMEOUT', 'took longer than its limit'),
        options.timeoutMs ?? 30_000,
      );
      for (const stream of ['stdout', 'stderr'] as const) {
        child[stream]?.on('data', (part: Buffer) => {
          bytes += part.byteLength;
          if (bytes > EXEC_OUTPUT_BYTES_MAX) fail('E_IO', 'wrote too much');
          else output[stream].push(part);
        });
      }
      child.on('error', (error) => {
        clearTimeout(limit);
        reject(new SnowflockError('E_IO', `${argv.join(' ')}: ${error.message}`));
      });
      child.on('close', (status, signal) => {
        clearTimeout(limit);
        if (failed) return reject(failed);
        const stdout = Buffer.concat(output.stdout).toString('utf8');
        const stderr = Buffer.concat(output.stderr).toString('utf8');
        resolve({ status, signal, stdout, stderr });
      });
      // A command that does not read its input closes it: that is no failure of ours.
      child.stdin?.on('error', () => {});
      child.stdin?.end(options.input ?? '');
    });
  }

  /** Cuts a host off: its frames vanish silently, it keeps its carrier and gets no error. */
  cut(host: TestbedHost): void {
    setPort(namesOf(this.name).prefix, this.#index(host), false);
  }

  /** Joins a host again. */
  heal(host: TestbedHost): void {
    setPort(namesOf(this.name).prefix, this.#index(host), true);
  }

  /**
   * A power cut of a host: nothing it would still say gets out, and every process in its namespace is
   * killed, the oldest (its daemon) first. `heal()` and a new daemon bring it back; as files in memory
   * are still there, it looks like a machine whose processes died, with the same boot id.
   */
  async powerOff(host: TestbedHost): Promise<void> {
    this.cut(host);
    const find = (): ProcessId[] => processesInNetns(host.netns);
    for (const target of find().sort((a, b) => a.startTicks - b.startTicks)) {
      signalProcess(target, 'SIGKILL');
    }
    const deadline = performance.now() + KILL_LIMIT_MS;
    while (find().some(isAlive)) {
      if (performance.now() > deadline) {
        throw new SnowflockError('E_STATE', `cannot end the processes of ${host.name}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  /**
   * Ends all processes (SIGTERM, after `graceMs` SIGKILL), removes namespaces and folders.
   * Repeatable.
   * @throws {SnowflockError} `E_STATE` when a process cannot be ended; the record stays.
   */
  async destroy(graceMs = 2000): Promise<void> {
    if (this.#removed) return;
    for (const target of this.#spawned) signalProcess(target, 'SIGTERM');
    const deadline = performance.now() + graceMs;
    while (this.#spawned.some(isAlive) && performance.now() < deadline) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    this.destroySync(0);
  }

  /** As destroy(), for exit handlers. */
  destroySync(graceMs = 2000): void {
    if (this.#removed) return;
    this.#removed = true;
    this.#forget();
    remove(this.#record, this.#spawned, graceMs);
  }

  #forget(): void {
    live.delete(this);
    if (live.size === 0) removeHandlers();
  }

  #index(host: TestbedHost): number {
    const at = this.hosts.indexOf(host);
    if (at < 0) throw new SnowflockError('E_ARGUMENT', `${host.name} is not of this testbed`);
    return at + 1;
  }
}

function remove(record: TestbedRecord, asked: readonly ProcessId[], graceMs: number): void {
  const find = (): ProcessId[] => {
    const inside = record.netns.flatMap((name) => processesInNetns(name));
    const known = new Set(inside.map((target) => target.pid));
    const moved = [...record.processes, ...asked].filter(
      (target) => !known.has(target.pid) && isAlive(target),
    );
    return [...inside, ...moved];
  };
  const left = endProcessesSync(find, asked, graceMs);
  if (left.length > 0) {
    const pids = left.map((target) => target.pid).join(', ');
    throw new SnowflockError('E_STATE', `testbed ${record.name}: cannot end processes ${pids}`);
  }
  for (const name of record.netns) removeNetns(name);
  for (const dir of record.dirs) rmSync(dir, { recursive: true, force: true, maxRetries: 3 });
  removeRecord(record.name);
}

function resourcesOf(options: TestbedOptions, ramRoot: string) {
  const tmpfs = statfsSync(ramRoot);
  const share = Math.min(freemem(), tmpfs.bavail * tmpfs.bsize) / options.hosts;
  const { cpus: cpuLimit, memoryBytes, overcommit } = options.resources ?? {};
  return {
    cpus: cpuLimit ?? cpus().length,
    memory_bytes: memoryBytes ?? Math.floor(share * 0.8),
    overcommit: { cpus: 4, memory: 1, ...overcommit },
  };
}

const SIGNALS: readonly NodeJS.Signals[] = ['SIGINT', 'SIGTERM', 'SIGHUP'];
let handling = false;

// 'exit' covers process.exit() and uncaught errors; signals end a process without it.
function installHandlers(): void {
  if (handling) return;
  handling = true;
  process.on('exit', removeAll);
  for (const signal of SIGNALS) process.on(signal, onSignal);
}

function removeHandlers(): void {
  handling = false;
  process.off('exit', removeAll);
  for (const signal of SIGNALS) process.off(signal, onSignal);
}

function removeAll(): void {
  for (const testbed of [...live]) {
    try {
      testbed.destroySync(500);
    } catch (error) {
      process.stderr.write(`${String(error)}\n`);
    }
  }
}

function onSignal(signal: NodeJS.Signals): void {
  removeAll();
  removeHandlers();
  // Others' handlers decide from here; with none left the signal does what it does by default.
  if (process.listenerCount(signal) === 0) process.kill(process.pid, signal);
}

/**
 * HypervisorDriver for stock QEMU. See ../driver.ts for states and ./machine.ts for the machine.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmodSync, chownSync, mkdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { SnowflockError } from '../../common/errors.js';
import type { Capabilities, HypervisorDriver, VmRecord, VmSpec, VmUser } from '../driver.js';
import { assertSameShape, type MachineShape } from '../shape.js';
import {
  type ArgsOptions,
  buildArgs,
  machineName,
  shapeOf,
  validateSpec,
  vmPaths,
} from './args.js';
import { hardLimit } from './console-log.js';
import { probeKvm } from './kvm-probe.js';
import { defaultMachine, type Machine } from './machine.js';
import { isAlive, tailOf, VmProcess } from './process.js';
import { QmpClient } from './qmp.js';
import { QemuVm } from './vm.js';

const run = promisify(execFile);

const DEFAULT_LOG_BYTES = 1 << 20;
const DEFAULT_STATE_BYTES = 64 << 20;
/** Connect errors of a QEMU that is about to listen, or about to end. */
const NOT_YET = new Set(['ENOENT', 'ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'E_CLOSED']);
/** Its monitor answers after some 25 ms; a machine under load may take seconds. */
const START_LIMIT_MS = 20_000;

export interface QemuDriverOptions {
  /** Path of QEMU; default `/usr/bin/qemu-system-x86_64`. */
  binary?: string;
  /** User that VMs run as; probing is done as this user too. */
  user: VmUser;
  /** Remembers, until the next boot, whether KVM works. */
  kvmCacheFile?: string;
  machine?: Machine;
  /** Larger device state than this is refused (default 64 MiB). */
  maxStateBytes?: number;
  /** Other backing of guest RAM than a shared memfd; for tests and benchmarks without memtap. */
  memory?: (spec: VmSpec) => NonNullable<ArgsOptions['memory']>;
}

export class QemuDriver implements HypervisorDriver {
  readonly name = 'qemu';
  readonly #binary: string;
  readonly #machine: Machine;
  #capabilities: Promise<Capabilities> | undefined;

  constructor(private readonly options: QemuDriverOptions) {
    this.#binary = options.binary ?? '/usr/bin/qemu-system-x86_64';
    this.#machine = options.machine ?? defaultMachine;
  }

  probe(): Promise<Capabilities> {
    this.#capabilities ??= this.#probe().catch((error: unknown) => {
      this.#capabilities = undefined;
      throw error;
    });
    return this.#capabilities;
  }

  async #probe(): Promise<Capabilities> {
    let text: string;
    try {
      text = (await run(this.#binary, ['--version'], { timeout: 10_000, env: {} })).stdout;
    } catch (error) {
      throw new SnowflockError('E_REQUIREMENT', `cannot run ${this.#binary}`, { cause: error });
    }
    const version = /^QEMU emulator version (.{1,120})/.exec(text)?.[1];
    if (version === undefined) {
      throw new SnowflockError('E_REQUIREMENT', `${this.#binary} is not QEMU`);
    }
    const kvm = await probeKvm(
      this.#binary,
      this.#machine,
      this.options.user,
      this.options.kvmCacheFile,
    );
    return {
      driver: this.name,
      version,
      machine: machineName(this.#machine),
      accel: kvm.works ? 'kvm' : 'tcg',
      accel_reason: kvm.reason,
      cpu: kvm.works ? hostCpu() : this.#machine.tcgCpu,
      max_vcpus: 255,
    };
  }

  async shapeOf(spec: VmSpec): Promise<MachineShape> {
    validateSpec(spec);
    return shapeOf(spec, this.#machine, await this.probe());
  }

  async boot(spec: VmSpec): Promise<QemuVm> {
    const shape = await this.shapeOf(spec);
    return this.#start(spec, shape, false);
  }

  async prepareClone(spec: VmSpec, shape: MachineShape): Promise<QemuVm> {
    const own = await this.shapeOf(spec);
    assertSameShape(shape, own);
    const vm = await this.#start(spec, own, true);
    try {
      await vm.listenForState();
      return vm;
    } catch (error) {
      await vm.destroy();
      throw error;
    }
  }

  async adopt(record: VmRecord): Promise<QemuVm> {
    if (record.driver !== this.name) {
      throw new SnowflockError('E_ARGUMENT', `VM ${record.id} is of driver ${record.driver}`);
    }
    const { pid, start_ticks: startTicks, boot_id } = record;
    const process = VmProcess.adopt({ pid, startTicks, bootId: boot_id });
    const qmp = await QmpClient.connect(record.control_socket);
    return QemuVm.attach({ process, qmp, record, startMs: 0, maxStateBytes: this.#maxStateBytes });
  }

  alive({ pid, start_ticks: startTicks, boot_id }: VmRecord): boolean {
    return isAlive({ pid, startTicks, bootId: boot_id });
  }

  async end(record: VmRecord): Promise<void> {
    const { pid, start_ticks: startTicks, boot_id: bootId } = record;
    try {
      await VmProcess.adopt({ pid, startTicks, bootId }).end(0);
    } catch (error) {
      if (!(error instanceof SnowflockError) || error.code !== 'E_NOT_FOUND') throw error;
    }
  }

  get #maxStateBytes(): number {
    return this.options.maxStateBytes ?? DEFAULT_STATE_BYTES;
  }

  async #start(spec: VmSpec, shape: MachineShape, incoming: boolean): Promise<QemuVm> {
    const paths = vmPaths(spec);
    makeRunDir(spec);
    const { qmp, watchdog, console, channel, incoming: state } = paths;
    for (const path of [qmp, watchdog, console, channel, state]) rmSync(path, { force: true });
    const memory = this.options.memory?.(spec);
    const { accel } = shape;
    const choice = { machine: this.#machine, accel, incoming, ...(memory ? { memory } : {}) };
    const logMax = spec.console?.logMaxBytes ?? DEFAULT_LOG_BYTES;
    const began = performance.now();
    const process = await VmProcess.start({
      binary: this.#binary,
      args: buildArgs(spec, choice),
      user: spec.user,
      logFile: paths.log,
      maxFileBytes: hardLimit(logMax, spec.ramBytes),
      ...(spec.nic ? { inheritFd: spec.nic.tapFd } : {}),
      ...(spec.memtap ? { preload: spec.memtap.agentPath } : {}),
      env: spec.memtap
        ? {
            SF_MEMTAP_SOCKET: spec.memtap.socket,
            SF_MEMTAP_VM: spec.memtap.vm,
            SF_MEMTAP_TOKEN: spec.memtap.token,
          }
        : {},
    });
    try {
      const client = await this.#connect(process, spec, paths.qmp, paths.log);
      const startMs = performance.now() - began;
      const record: VmRecord = {
        driver: this.name,
        id: spec.id,
        run_dir: spec.runDir,
        pid: process.identity.pid,
        start_ticks: process.identity.startTicks,
        boot_id: process.identity.bootId,
        control_socket: paths.qmp,
        watchdog_socket: paths.watchdog,
        console_socket: paths.console,
        console_log: paths.consoleLog,
        console_log_max_bytes: logMax,
        channel_socket: paths.channel,
        log: paths.log,
        shape,
        user: spec.user,
        prepared: incoming,
      };
      const { maxStateBytes } = { maxStateBytes: this.#maxStateBytes };
      const vm = await QemuVm.attach({ process, qmp: client, record, startMs, maxStateBytes });
      return vm;
    } catch (error) {
      await process.end(0);
      throw error;
    }
  }

  /** The monitor's socket appears some 20 ms after the start; nothing announces it, so it is tried. */
  async #connect(process: VmProcess, spec: VmSpec, path: string, log: string): Promise<QmpClient> {
    const deadline = performance.now() + START_LIMIT_MS;
    for (;;) {
      try {
        return await QmpClient.connect(path, START_LIMIT_MS);
      } catch (error) {
        if (!process.alive) {
          const said = tailOf(log, 1000).trim();
          throw new SnowflockError('E_QEMU', `QEMU of VM ${spec.id} ended at its start: ${said}`);
        }
        const code = error instanceof Error && 'code' in error ? error.code : undefined;
        if (typeof code !== 'string' || !NOT_YET.has(code)) throw error;
        if (performance.now() > deadline) {
          throw new SnowflockError('E_TIMEOUT', `QEMU of VM ${spec.id} opens no monitor (${log})`);
        }
      }
      await sleep(1);
    }
  }
}

/** The folder belongs to the VM's user and to nobody else. */
function makeRunDir(spec: VmSpec): void {
  mkdirSync(spec.runDir, { recursive: true, mode: 0o700 });
  if (!statSync(spec.runDir).isDirectory()) {
    throw new SnowflockError('E_ARGUMENT', `${spec.runDir} is not a folder`);
  }
  chownSync(spec.runDir, spec.user.uid, spec.user.gid);
  chmodSync(spec.runDir, 0o700);
}

/** With KVM the guest sees the host's CPU: only hosts with the same one exchange state. */
function hostCpu(): string {
  const info = readFileSync('/proc/cpuinfo', 'utf8');
  const field = (name: string) => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(info)?.[1] ?? '';
  const flags = createHash('sha256').update(field('flags')).digest('hex').slice(0, 16);
  return `host: ${field('model name').slice(0, 80)}, flags ${flags}`;
}

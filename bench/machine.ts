/**
 * Which machine should VMs get? Boots the guest image on each candidate and forks it, and measures
 * what a user waits for and what a fork costs: time to the shell's prompt, size of the device state,
 * stop → captured → running again, start of a clone's QEMU, load of the state, first instruction.
 *
 * RAM is a file on tmpfs here, copied for the clone: this is about machines, not about memory. The
 * image's folder comes from SNOWFLOCK_IMAGE; its disk is served copy-on-write by nbdkit.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { chmodSync, chownSync, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { copyFile } from 'node:fs/promises';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { SnowflockError } from '../src/common/errors.js';
import type { VmSpec } from '../src/hypervisor/driver.js';
import { QemuDriver } from '../src/hypervisor/qemu/driver.js';
import { type Machine, machines } from '../src/hypervisor/qemu/machine.js';
import type { QemuVm } from '../src/hypervisor/qemu/vm.js';

interface Context {
  readonly quick: boolean;
  log(line: string): void;
  readonly signal: AbortSignal;
}

interface Image {
  kernel: string;
  initrd: string;
  disk: string;
  cmdline: string;
}

const USER = { uid: 65534, gid: 65534 };
const RAM_BYTES = 512 << 20;
const BOOT_LIMIT_MS = 20_000;
// A shell's prompt; busybox then asks for the cursor's position.
const PROMPT = /[#$] (.\[6n)?$/;

function readImage(): Image {
  const folder = process.env.SNOWFLOCK_IMAGE;
  if (folder === undefined || !existsSync(join(folder, 'image.json'))) {
    throw new SnowflockError('E_ARGUMENT', 'SNOWFLOCK_IMAGE must name the folder of a guest image');
  }
  const manifest = JSON.parse(readFileSync(join(folder, 'image.json'), 'utf8')) as Image;
  const at = (name: string) => join(folder, name);
  return {
    kernel: at(manifest.kernel),
    initrd: at(manifest.initrd),
    disk: at(manifest.disk),
    cmdline: manifest.cmdline,
  };
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? Number.NaN;
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? Number.NaN) + upper) / 2;
}

/** A disk server of its own for each VM: what one writes is not seen by another. */
class Disk {
  private constructor(
    readonly socket: string,
    private readonly child: ChildProcess,
  ) {}
  static async serve(socket: string, file: string): Promise<Disk> {
    const args = ['-f', '-U', socket, '--filter=cow', 'file', file];
    const child = spawn('nbdkit', args, { stdio: ['ignore', 'ignore', 'inherit'] });
    for (let i = 0; i < 500 && !existsSync(socket); i++) await sleep(10);
    chownSync(socket, USER.uid, USER.gid);
    return new Disk(socket, child);
  }
  async end(): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return;
    const gone = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.kill('SIGKILL');
    await gone;
  }
}

/** Milliseconds until the console shows a shell's prompt; undefined if it does not come. */
async function untilPrompt(vm: QemuVm, began: number): Promise<number | undefined> {
  for (;;) {
    const ms = performance.now() - began;
    if (ms > BOOT_LIMIT_MS || (await vm.status()) === 'exited') return undefined;
    const text = existsSync(vm.record.console_log)
      ? readFileSync(vm.record.console_log, 'latin1')
      : '';
    if (PROMPT.test(text)) return ms;
    await sleep(5);
  }
}

/** True if the guest answers on its console: it really runs. */
async function answers(vm: QemuVm): Promise<boolean> {
  const socket = createConnection(vm.record.console_socket);
  try {
    return await new Promise<boolean>((resolve) => {
      let text = '';
      const timer = setTimeout(() => resolve(false), BOOT_LIMIT_MS);
      socket.on('connect', () => socket.write('echo $((6*7))-$(cat /sys/block/vda/size)\n'));
      socket.on('error', () => resolve(false));
      socket.on('data', (chunk: Buffer) => {
        text += chunk.toString('latin1');
        if (!/42-\d+/.test(text)) return;
        clearTimeout(timer);
        resolve(true);
      });
    });
  } finally {
    socket.destroy();
  }
}

interface Figures {
  machine: string;
  boots: boolean;
  qemu_start_ms: number;
  boot_ms: number;
  state_bytes: number;
  pause_ms: number;
  stop_ms: number;
  capture_ms: number;
  cont_ms: number;
  clone_start_ms: number;
  load_ms: number;
  run_ms: number;
  clone_answers: boolean;
}

interface Samples {
  start: number[];
  boot: number[];
  bytes: number[];
  stop: number[];
  capture: number[];
  cont: number[];
  pause: number[];
  cloneStart: number[];
  load: number[];
  run: number[];
}

async function timed<T>(into: number[], work: () => Promise<T>): Promise<T> {
  const began = performance.now();
  const result = await work();
  into.push(performance.now() - began);
  return result;
}

async function oneRun(
  machine: Machine,
  image: Image,
  captures: number,
  samples: Samples,
): Promise<boolean> {
  const folder = mkdtempSync(join(tmpdir(), 'sf-machine-'));
  const shared = mkdtempSync('/dev/shm/sf-machine-');
  chmodSync(folder, 0o755);
  chmodSync(shared, 0o777);
  const ram = (id: string) => join(shared, id);
  const driver = new QemuDriver({
    user: USER,
    machine,
    memory: (spec) => ({
      'qom-type': 'memory-backend-file',
      'mem-path': ram(spec.id),
      share: true,
    }),
  });
  const spec = (id: string): VmSpec => ({
    id,
    runDir: join(folder, id),
    ramBytes: RAM_BYTES,
    vcpus: 1,
    disk: { nbdSocket: join(folder, `${id}.nbd`), exportName: '' },
    // Without it a machine with ACPI but without PIT and PM timer finds no clock under emulation.
    boot: { ...image, cmdline: `${image.cmdline}${clockHint(machine)}` },
    user: USER,
  });
  const owned: { destroy(o: { graceMs: number }): Promise<void> }[] = [];
  const disks: Disk[] = [];
  try {
    await driver.probe();
    disks.push(await Disk.serve(join(folder, 'parent.nbd'), image.disk));
    const began = performance.now();
    const parent = await driver.boot(spec('parent'));
    owned.push(parent);
    samples.start.push(parent.startMs);
    const bootMs = await untilPrompt(parent, began);
    if (bootMs === undefined) return false;
    samples.boot.push(bootMs);
    let state: Buffer = Buffer.alloc(0);
    for (let i = 0; i < captures; i++) {
      await sleep(50);
      const last = i === captures - 1;
      const paused = performance.now();
      await timed(samples.stop, () => parent.pause());
      state = await timed(samples.capture, () => parent.captureState());
      if (last) {
        await copyFile(ram('parent'), ram('clone'));
        chmodSync(ram('clone'), 0o666);
      }
      await timed(samples.cont, () => parent.resume());
      if (!last) samples.pause.push(performance.now() - paused);
    }
    samples.bytes.push(state.length);
    disks.push(await Disk.serve(join(folder, 'clone.nbd'), image.disk));
    const clone = await driver.prepareClone(spec('clone'), parent.shape);
    owned.push(clone);
    samples.cloneStart.push(clone.startMs);
    await timed(samples.load, () => clone.loadState(state));
    await timed(samples.run, () => clone.run());
    return (await answers(clone)) && (await answers(parent));
  } finally {
    for (const vm of owned) await vm.destroy({ graceMs: 0 });
    for (const disk of disks) await disk.end();
    rmSync(folder, { recursive: true, force: true });
    rmSync(shared, { recursive: true, force: true });
  }
}

function clockHint(machine: Machine): string {
  if (machine.name !== 'microvm-acpi') return '';
  const mhz = /^cpu MHz\s*: ([0-9.]+)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1];
  return ` tsc_early_khz=${Math.round(Number(mhz) * 1000)}`;
}

function noSamples(): Samples {
  const names = ['start', 'boot', 'bytes', 'stop', 'capture', 'cont', 'pause'] as const;
  const clone = ['cloneStart', 'load', 'run'] as const;
  return Object.fromEntries([...names, ...clone].map((name) => [name, []])) as unknown as Samples;
}

function summary(machine: Machine, samples: Samples, answered: boolean): Figures {
  return {
    machine: machine.name,
    boots: samples.boot.length > 0,
    qemu_start_ms: median(samples.start),
    boot_ms: median(samples.boot),
    state_bytes: median(samples.bytes),
    pause_ms: median(samples.pause),
    stop_ms: median(samples.stop),
    capture_ms: median(samples.capture),
    cont_ms: median(samples.cont),
    clone_start_ms: median(samples.cloneStart),
    load_ms: median(samples.load),
    run_ms: median(samples.run),
    clone_answers: answered && samples.run.length > 0,
  };
}

export default {
  name: 'machine',
  description: 'QEMU machine types: boot, device state, capture, restore, start of a clone',
  async run(context: Context) {
    const image = readImage();
    const only = process.env.SNOWFLOCK_BENCH_MACHINE;
    const runs = context.quick ? 1 : 3;
    const candidates = machines
      .filter((machine) => only === undefined || only === machine.name)
      .map((machine) => ({ machine, samples: noSamples(), answered: true }));
    // By turns, so that what else happens on this computer meets all of them alike.
    for (let i = 0; i < runs; i++) {
      for (const candidate of candidates) {
        if (!candidate.answered) continue;
        context.signal.throwIfAborted();
        context.log(`${candidate.machine.name}: run ${i + 1} of ${runs}`);
        const { machine, samples } = candidate;
        candidate.answered = await oneRun(machine, image, context.quick ? 4 : 10, samples);
      }
    }
    const figures = candidates.map(({ machine, samples, answered }) =>
      summary(machine, samples, answered),
    );
    const columns = Object.keys(figures[0] ?? {});
    const rows = figures.map((row) =>
      Object.values(row).map((value) =>
        typeof value === 'boolean' ? (value ? 'yes' : 'no') : value,
      ),
    );
    return {
      tables: [{ title: 'Machine types, 512 MiB, 1 vCPU (medians)', columns, rows }],
      figures: { machines: figures },
      notes: ['pause_ms is stop, capture and cont together; RAM and disk are not part of it.'],
    };
  },
};

/** What the driver's tests share: the tiny guest, folders, and VMs that are ended with the test. */
import { execFileSync } from 'node:child_process';
import { chmodSync, copyFileSync, mkdtempSync, readFileSync, rmSync, watch } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { VmRecord, VmSpec } from '../../src/hypervisor/driver.js';
import { QemuDriver, type QemuDriverOptions } from '../../src/hypervisor/qemu/driver.js';
import { isAlive, VmProcess } from '../../src/hypervisor/qemu/process.js';
import type { QemuVm } from '../../src/hypervisor/qemu/vm.js';

/** `nobody`: VM processes never run as root, in tests neither. */
export const USER = { uid: 65534, gid: 65534 };

const GUEST_SOURCE = join(dirname(fileURLToPath(import.meta.url)), 'guest.S');

export function buildGuest(folder: string): string {
  const elf = join(folder, 'guest.elf');
  const link = '-Wl,--build-id=none,--no-warn-rwx-segments,-N,-e,start,-Ttext=0x100000';
  const flags = ['-m32', '-nostdlib', '-static', '-no-pie', link];
  flags.push('-Wl,--section-start=.note.pvh=0x200000');
  execFileSync('gcc', [...flags, '-o', elf, GUEST_SOURCE]);
  chmodSync(elf, 0o644);
  return elf;
}

export interface Bed {
  folder: string;
  ramFolder: string;
  kernel: string;
  driver: QemuDriver;
  spec: (id: string, more?: Partial<VmSpec>) => VmSpec;
  /** Ends the VM with the bed. */
  own: (vm: QemuVm) => QemuVm;
  /** Ends the VM of this record with the bed, whoever started it. */
  ownPid: (record: VmRecord) => void;
  boot: (id: string, more?: Partial<VmSpec>) => Promise<QemuVm>;
  /** Copies the RAM of a paused VM for a clone to start from. */
  copyRam: (from: string, to: string) => void;
  end: () => Promise<void>;
}

/** Guest RAM is a file on tmpfs here, so that it can be copied for a clone without memtap. */
export function makeBed(options: Partial<QemuDriverOptions> = {}): Bed {
  const folder = mkdtempSync(join(tmpdir(), 'sf-hyper-'));
  const shared = mkdtempSync('/dev/shm/sf-hyper-');
  chmodSync(folder, 0o755);
  chmodSync(shared, 0o777);
  const kernel = buildGuest(folder);
  const vms: QemuVm[] = [];
  const records: VmRecord[] = [];
  const ram = (id: string) => join(shared, `${id}.ram`);
  const driver = new QemuDriver({
    user: USER,
    kvmCacheFile: join(tmpdir(), `sf-hyper-kvm-${process.pid}.json`),
    memory: (spec) => ({
      'qom-type': 'memory-backend-file',
      'mem-path': ram(spec.id),
      share: true,
    }),
    ...options,
  });
  const spec = (id: string, more: Partial<VmSpec> = {}): VmSpec => ({
    id,
    runDir: join(folder, id),
    ramBytes: 16 << 20,
    vcpus: 1,
    boot: { kernel, cmdline: '' },
    user: USER,
    ...more,
  });
  const own = (vm: QemuVm): QemuVm => {
    vms.push(vm);
    return vm;
  };
  return {
    folder,
    ramFolder: shared,
    kernel,
    driver,
    spec,
    own,
    ownPid: (record) => {
      records.push(record);
    },
    boot: async (id, more) => own(await driver.boot(spec(id, more))),
    copyRam: (from, to) => {
      copyFileSync(ram(from), ram(to));
      chmodSync(ram(to), 0o666);
    },
    end: async () => {
      await Promise.all(vms.map((vm) => vm.destroy({ graceMs: 0 })));
      for (const { pid, start_ticks, boot_id } of records) {
        const identity = { pid, startTicks: start_ticks, bootId: boot_id };
        if (isAlive(identity)) await VmProcess.adopt(identity).end(0);
      }
      rmSync(folder, { recursive: true, force: true });
      rmSync(shared, { recursive: true, force: true });
      rmSync(join(tmpdir(), `sf-hyper-kvm-${process.pid}.json`), { force: true });
    },
  };
}

/** Resolves with the file's text as soon as `test` accepts it. */
export async function fileSays(
  path: string,
  test: (text: string) => boolean,
  timeoutMs = 30_000,
): Promise<string> {
  const read = (): string => {
    try {
      return readFileSync(path, 'utf8');
    } catch {
      return '';
    }
  };
  const folder = dirname(path);
  return new Promise((resolve, reject) => {
    const watcher = watch(folder, look);
    const timer = setTimeout(() => {
      watcher.close();
      reject(new Error(`${path} never said it: ${read().slice(-300)}`));
    }, timeoutMs);
    function look(): void {
      const text = read();
      if (!test(text)) return;
      watcher.close();
      clearTimeout(timer);
      resolve(text);
    }
    look();
  });
}

/** The counts that the tiny guest printed. */
export function counts(text: string): number[] {
  return [...text.matchAll(/^n ([0-9a-f]{3})$/gm)].map((match) =>
    Number.parseInt(match[1] ?? '', 16),
  );
}

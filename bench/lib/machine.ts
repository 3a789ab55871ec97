import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';

/** What figures were measured on. */
export interface Machine {
  readonly cpu: string;
  readonly cores: number;
  readonly memory_bytes: number;
  readonly kernel: string;
  readonly node: string;
  readonly qemu: string;
  /** One-minute load average before the bench began: others on the machine show here. */
  readonly load: number;
}

export function machine(): Machine {
  const all = cpus();
  return {
    cpu: all[0]?.model.trim() ?? 'unknown',
    cores: all.length,
    memory_bytes: totalmem(),
    kernel: release(),
    node: process.version,
    qemu: qemuVersion(),
    load: Number(readFileSync('/proc/loadavg', 'utf8').split(' ')[0]),
  };
}

export function machineLine(of: Machine): string {
  const gib = (of.memory_bytes / 2 ** 30).toFixed(1);
  return (
    `${of.cpu}, ${of.cores} cores, ${gib} GiB; Linux ${of.kernel}, Node.js ${of.node}, ` +
    `QEMU ${of.qemu}; load ${of.load}`
  );
}

function qemuVersion(): string {
  try {
    const said = execFileSync('qemu-system-x86_64', ['--version'], { encoding: 'utf8' });
    return /version (\S+)/.exec(said)?.[1] ?? 'unknown';
  } catch {
    return 'none';
  }
}

/**
 * Does KVM execute guests here? A device node proves nothing (it may be there and every guest hang),
 * so a guest is run, on the machine and with the CPU model that VMs get: a 64 KiB firmware whose code
 * sums numbers through memory, in real mode and then in protected mode, and ends QEMU with an exit
 * status that only the right sums give. Both modes, because there are hosts whose KVM runs real mode
 * and then hangs in protected mode; the time limit is for them.
 * The verdict holds until the next boot.
 */
import { execFile } from 'node:child_process';
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { Type } from 'typebox';
import { Value } from 'typebox/value';
import type { VmUser } from '../driver.js';
import { accelArgs } from './args.js';
import type { Machine } from './machine.js';
import { bootId } from './process.js';

const EXIT_PORT = 0xf4;
/** isa-debug-exit ends QEMU with status (value << 1) | 1. */
const GOOD_VALUE = 0x2a;
const GOOD_STATUS = (GOOD_VALUE << 1) | 1;

// biome-ignore format: one instruction per line
const CODE = [
  0x31, 0xc0,                         //          xor   ax, ax
  0x8e, 0xd8,                         //          mov   ds, ax
  0x31, 0xdb,                         //          xor   bx, bx
  0xb9, 0xe8, 0x03,                   //          mov   cx, 1000
  0x89, 0x0e, 0x00, 0x10,             // again:   mov   [0x1000], cx
  0x03, 0x1e, 0x00, 0x10,             //          add   bx, [0x1000]
  0xe2, 0xf6,                         //          loop  again
  0x81, 0xfb, 0x14, 0xa3,             //          cmp   bx, 1000 * 1001 / 2 mod 2^16
  0x75, 0x3f,                         //          jne   stop
  0x66, 0x2e, 0x0f, 0x01, 0x16,       //          lgdt  cs:[GDT_POINTER]
  0x80, 0x00,
  0x0f, 0x20, 0xc0,                   //          mov   eax, cr0
  0x0c, 0x01,                         //          or    al, 1
  0x0f, 0x22, 0xc0,                   //          mov   cr0, eax
  0x66, 0xea, 0x30, 0x00, 0x0f, 0x00, //          jmp   far 8:0xf0030
  0x08, 0x00,
  0x66, 0xb8, 0x10, 0x00,             // (32 bit) mov   ax, 16
  0x8e, 0xd8,                         //          mov   ds, ax
  0x31, 0xdb,                         //          xor   ebx, ebx
  0xb9, 0x00, 0x00, 0x40, 0x00,       //          mov   ecx, 2^22
  0x89, 0x0d, 0x00, 0x10, 0x00, 0x00, // more:    mov   [0x1000], ecx
  0x03, 0x1d, 0x00, 0x10, 0x00, 0x00, //          add   ebx, [0x1000]
  0x49,                               //          dec   ecx
  0x75, 0xf1,                         //          jne   more
  0x81, 0xfb, 0x00, 0x00, 0x20, 0x00, //          cmp   ebx, 2^22 * (2^22 + 1) / 2 mod 2^32
  0x75, 0x04,                         //          jne   stop
  0xb0, GOOD_VALUE,                   //          mov   al, GOOD_VALUE
  0xe6, EXIT_PORT,                    //          out   EXIT_PORT, al
  0xf4,                               // stop:    hlt
  0xeb, 0xfd,                         //          jmp   stop
];
const RESET = [0xea, 0x00, 0x00, 0x00, 0xf0]; // jmp far F000:0000
const GDT_POINTER_AT = 0x80;
const GDT_AT = 0x90;
/** The firmware as guests see it below 1 MiB. */
const SEGMENT = 0xf0000;
// biome-ignore format: one descriptor per line
const GDT = [
  0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
  0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xcf, 0x00, // 8: code, 4 GiB from 0, 32 bit
  0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, // 16: data, likewise
];

function firmware(): Buffer {
  const rom = Buffer.alloc(64 << 10);
  rom.set(CODE, 0);
  rom.writeUInt16LE(GDT.length - 1, GDT_POINTER_AT);
  rom.writeUInt32LE(SEGMENT + GDT_AT, GDT_POINTER_AT + 2);
  rom.set(GDT, GDT_AT);
  rom.set(RESET, 0xfff0);
  return rom;
}

const Verdict = Type.Object({
  boot_id: Type.String(),
  binary: Type.String(),
  machine: Type.String(),
  uid: Type.Integer(),
  gid: Type.Integer(),
  works: Type.Boolean(),
  reason: Type.String(),
});

export interface ProbeVerdict {
  works: boolean;
  /** What the probe guest did. */
  reason: string;
}

/** Runs the probe guest on an accelerator, as the user that VMs run as. */
export async function runProbeGuest(
  binary: string,
  accel: string,
  machine: Machine,
  user: VmUser,
  timeoutMs = 3000,
): Promise<ProbeVerdict> {
  const folder = mkdtempSync(join(tmpdir(), 'snowflock-probe-'));
  try {
    chmodSync(folder, 0o755);
    const rom = join(folder, 'probe.rom');
    writeFileSync(rom, firmware(), { mode: 0o644 });
    const args = ['-M', machine.type, ...accelArgs(accel, machine, 1), '-m', '16', '-bios', rom];
    args.push('-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot');
    args.push('-device', `isa-debug-exit,iobase=${EXIT_PORT},iosize=1`);
    return await new Promise((resolve) => {
      const options = { timeout: timeoutMs, killSignal: 'SIGKILL', ...user, env: {} } as const;
      const child = execFile(binary, args, options, (error, _stdout, stderr) => {
        const said = stderr.trim().split('\n').at(-1)?.slice(0, 300) ?? '';
        if (child.exitCode === GOOD_STATUS) {
          resolve({ works: true, reason: `a probe guest ran on ${accel}` });
        } else if (error?.killed === true || child.signalCode === 'SIGKILL') {
          resolve({ works: false, reason: `a probe guest on ${accel} hung for ${timeoutMs} ms` });
        } else {
          resolve({ works: false, reason: `a probe guest on ${accel} failed: ${said}` });
        }
      });
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** As runProbeGuest() on KVM, remembered in `cacheFile` until the next boot. */
export async function probeKvm(
  binary: string,
  machine: Machine,
  user: VmUser,
  cacheFile: string | undefined,
): Promise<ProbeVerdict> {
  const key = { boot_id: bootId(), binary, machine: machine.type, uid: user.uid, gid: user.gid };
  if (cacheFile !== undefined) {
    const cached = readCache(cacheFile);
    const fits =
      cached &&
      cached.boot_id === key.boot_id &&
      cached.binary === binary &&
      cached.machine === key.machine &&
      cached.uid === user.uid &&
      cached.gid === user.gid;
    if (fits) return { works: cached.works, reason: cached.reason };
  }
  const verdict = await runProbeGuest(binary, 'kvm', machine, user);
  if (cacheFile !== undefined) {
    mkdirSync(dirname(cacheFile), { recursive: true });
    const temporary = `${cacheFile}.${process.pid}`;
    writeFileSync(temporary, JSON.stringify({ ...key, ...verdict }), { mode: 0o600 });
    renameSync(temporary, cacheFile);
  }
  return verdict;
}

function readCache(file: string): Type.Static<typeof Verdict> | undefined {
  try {
    const value: unknown = JSON.parse(readFileSync(file, 'utf8'));
    return Value.Check(Verdict, value) ? value : undefined;
  } catch {
    // No cache, or an unreadable one: the probe is run again.
    return undefined;
  }
}

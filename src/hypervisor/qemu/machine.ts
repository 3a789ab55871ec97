/**
 * Machine types that the driver can use, and the one it does: `pc` with the small firmware qboot.
 *
 * Measured by bench/machine.ts: minimal guest image, 512 MiB, 1 vCPU, virtio block, serial and rng,
 * TCG, QEMU 7.2; medians of 3 runs with 10 captures each, by turns, on 2 busy cores. Start is of a
 * clone's QEMU (the parent's loads a kernel too); state is what a fork carries apart from RAM; pause
 * is stop, capture and cont together.
 *
 *                   boot ms   start ms   state bytes   pause ms   load ms
 *   microvm              –         75             –          –         –   finds no devices
 *   microvm-acpi      1725         98       182 145        5.5       2.1   with a clock hint only
 *   pc                2663         88       351 275        7.4       7.3
 *   pc-qboot          2375         76       182 948        8.6       2.8
 *   pc-qboot-noacpi   2072        141       163 482        7.1       3.1
 *   pc-qboot-qemu64   2662        179       182 892        7.1       4.3
 *   q35               2535         83       370 388        9.2       5.9
 *   q35-qboot         2305         96       202 061        7.9       5.0
 *
 * Pause and start differ by less than the noise; what decides:
 * - microvm without ACPI names its devices on the kernel command line, which Debian's kernel ignores
 *   (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is off): no disk, no channel.
 * - microvm with ACPI has neither PIT nor PM timer that Linux would use: under TCG it hangs unless it
 *   is told the host's TSC rate (`tsc_early_khz`), and then lives by that rate on any host its clones
 *   go to. It boots half a second sooner, which a fork does not see.
 * - Half of the state of `pc` and `q35` is SeaBIOS; qboot is 64 KiB and boots the kernel through PVH.
 *   (Most of the rest is zeros, room for 1024 queues per virtio device, and packs to nothing.)
 * - `pc` with ACPI has a PM timer: a clock that does not depend on the host's CPU.
 * - CPU model `max` gives guests RDRAND, of use after a fork, and costs nothing.
 * Only TCG could be measured; under KVM the same machine is used.
 */
import type { RamRange } from '../shape.js';

export interface Machine {
  /** Name in tables and on the bench's command line. */
  name: string;
  /** Value of -M, without the memory backend. */
  type: string;
  /** Firmware (-bios); the machine's own unless given. */
  firmware?: string;
  /** Suffix of virtio device names: `virtio-blk-device` sits on MMIO, `virtio-blk-pci` on PCI. */
  transport: 'device' | 'pci';
  /** Value of -cpu under TCG; under KVM it is the host's CPU. */
  tcgCpu: string;
  /** RAM below the 32-bit hole: all of it up to `whole` bytes, else `low` bytes. */
  lowRam: { whole: number; low: number };
}

const GIB = 2 ** 30;

// Self-describing state is for humans and for analysis scripts: the loader does not read it.
const COMMON = 'suppress-vmdesc=on';
const MICROVM = {
  transport: 'device',
  tcgCpu: 'max',
  lowRam: { whole: 3 * GIB, low: 3 * GIB },
} as const;
const PC_TYPE = `pc,${COMMON},vmport=off,smm=off,hpet=off,usb=off,i8042=off`;
const PC = {
  transport: 'pci',
  tcgCpu: 'max',
  lowRam: { whole: 0xe0000000 - 1, low: 3 * GIB },
} as const;
const Q35_TYPE = `q35,${COMMON},vmport=off,smm=off,hpet=off,usb=off,i8042=off,sata=off,smbus=off`;
const Q35 = {
  transport: 'pci',
  tcgCpu: 'max',
  lowRam: { whole: 0xb0000000 - 1, low: 2 * GIB },
} as const;

const pcQboot: Machine = { name: 'pc-qboot', type: PC_TYPE, firmware: 'qboot.rom', ...PC };

export const machines: readonly Machine[] = [
  {
    name: 'microvm',
    type: `microvm,${COMMON},x-option-roms=off,isa-serial=on,acpi=off,pit=on,pic=on,rtc=on`,
    ...MICROVM,
  },
  {
    name: 'microvm-acpi',
    type: `microvm,${COMMON},x-option-roms=off,isa-serial=on,acpi=on,pit=off,pic=off,rtc=on`,
    ...MICROVM,
  },
  { name: 'pc', type: PC_TYPE, ...PC },
  pcQboot,
  { name: 'pc-qboot-noacpi', type: `${PC_TYPE},acpi=off`, firmware: 'qboot.rom', ...PC },
  { name: 'pc-qboot-qemu64', type: PC_TYPE, firmware: 'qboot.rom', ...PC, tcgCpu: 'qemu64' },
  { name: 'q35', type: Q35_TYPE, ...Q35 },
  { name: 'q35-qboot', type: Q35_TYPE, firmware: 'qboot.rom', ...Q35 },
];

export function findMachine(name: string): Machine | undefined {
  return machines.find((machine) => machine.name === name);
}

/** Where RAM is in guest-physical addresses. */
export function ramLayout(machine: Machine, ramBytes: number): RamRange[] {
  const low = ramBytes <= machine.lowRam.whole ? ramBytes : machine.lowRam.low;
  const layout: RamRange[] = [{ guest_address: 0, offset: 0, length: low }];
  if (ramBytes > low) {
    layout.push({ guest_address: 4 * GIB, offset: low, length: ramBytes - low });
  }
  return layout;
}

/** The machine VMs get. */
export const defaultMachine: Machine = pcQboot;

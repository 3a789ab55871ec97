/**
 * Machine types that the driver can use, and the one it does.
 */
import type { RamRange } from '../shape.js';

export interface Machine {
  /** Name in tables and on the bench's command line. */
  name: string;
  /** Value of -M, without the memory backend. */
  type: string;
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
const MICROVM = `microvm,${COMMON},x-option-roms=off,isa-serial=on`;
const MICROVM_RAM = { whole: 3 * GIB, low: 3 * GIB };

export const machines: readonly Machine[] = [
  {
    name: 'microvm',
    type: `${MICROVM},acpi=off,pit=on,pic=on,rtc=on`,
    transport: 'device',
    tcgCpu: 'max',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'microvm-qemu64',
    type: `${MICROVM},acpi=off,pit=on,pic=on,rtc=on`,
    transport: 'device',
    tcgCpu: 'qemu64',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'microvm-no-rtc',
    type: `${MICROVM},acpi=off,pit=on,pic=on,rtc=off`,
    transport: 'device',
    tcgCpu: 'max',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'microvm-no-pic',
    type: `${MICROVM},acpi=off,pit=on,pic=off,rtc=on`,
    transport: 'device',
    tcgCpu: 'max',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'microvm-no-pit',
    type: `${MICROVM},acpi=off,pit=off,pic=off,rtc=off`,
    transport: 'device',
    tcgCpu: 'max',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'microvm-acpi',
    type: `${MICROVM},acpi=on,pit=on,pic=on,rtc=off`,
    transport: 'device',
    tcgCpu: 'max',
    lowRam: MICROVM_RAM,
  },
  {
    name: 'q35',
    type: `q35,${COMMON},vmport=off,smm=off,sata=off,smbus=off`,
    transport: 'pci',
    tcgCpu: 'max',
    lowRam: { whole: 0xb0000000 - 1, low: 2 * GIB },
  },
  {
    name: 'pc',
    type: `pc,${COMMON},vmport=off,smm=off,hpet=off`,
    transport: 'pci',
    tcgCpu: 'max',
    lowRam: { whole: 0xe0000000 - 1, low: 3 * GIB },
  },
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
export const defaultMachine: Machine = machines[0] as Machine;

/**
 * The shape of a machine: everything two VM processes must have in common so that the device state
 * of one can be loaded into the other. It travels inside the descriptor; field names are wire names.
 */
import { type Static, Type } from 'typebox';
import { SnowflockError } from '../common/errors.js';

const Word = Type.String({ minLength: 1, maxLength: 128 });
const Bytes = Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER });

/** One stretch of guest-physical addresses backed by `length` bytes of the RAM image at `offset`. */
export const RamRange = Type.Object(
  { guest_address: Bytes, offset: Bytes, length: Bytes },
  { additionalProperties: false },
);
export type RamRange = Static<typeof RamRange>;

export const MachineShape = Type.Object(
  {
    /** Driver that made the state: `qemu`. */
    driver: Word,
    /** Version of the hypervisor, exactly: device state is compatible only with itself. */
    version: Word,
    /** Machine type with its options. */
    machine: Type.String({ minLength: 1, maxLength: 512 }),
    /** What executes guest code. */
    accel: Word,
    /** CPU model; for hardware acceleration it names the host's CPU too. */
    cpu: Type.String({ minLength: 1, maxLength: 256 }),
    vcpus: Type.Integer({ minimum: 1, maximum: 255 }),
    ram_bytes: Type.Integer({ minimum: 4096, maximum: 2 ** 42, multipleOf: 4096 }),
    ram_layout: Type.Array(RamRange, { minItems: 1, maxItems: 8 }),
    /** Devices in the order in which they are plugged (it decides their addresses). */
    devices: Type.Array(Type.String({ minLength: 1, maxLength: 1024 }), { maxItems: 32 }),
  },
  { additionalProperties: false },
);
export type MachineShape = Static<typeof MachineShape>;

function differs(a: unknown, b: unknown): boolean {
  return JSON.stringify(a) !== JSON.stringify(b);
}

/** Throws E_SHAPE, naming every difference, unless state of shape `state` fits a VM of shape `vm`. */
export function assertSameShape(state: MachineShape, vm: MachineShape): void {
  const keys = [
    'driver',
    'version',
    'machine',
    'accel',
    'cpu',
    'vcpus',
    'ram_bytes',
    'devices',
  ] as const;
  const wrong = keys.filter((key) => differs(state[key], vm[key]));
  // Objects are compared member by member: their keys may be in another order after a journey.
  const ranges = (shape: MachineShape) =>
    shape.ram_layout.map((range) => [range.guest_address, range.offset, range.length]);
  const layout = differs(ranges(state), ranges(vm)) && wrong.length === 0;
  if (wrong.length === 0 && !layout) return;
  const list = wrong.map(
    (key) => `${key} is ${JSON.stringify(state[key])} there and ${JSON.stringify(vm[key])} here`,
  );
  if (layout) list.push('the RAM layout differs');
  throw new SnowflockError('E_SHAPE', `device state does not fit this machine: ${list.join('; ')}`);
}

/**
 * QEMU's command line from a VmSpec. A clone's differs from its parent's only in what it waits for
 * (`-incoming`) and in that it has no kernel: its RAM holds one already, and reading a 50 MB kernel
 * costs 40 to 60 ms of QEMU's start.
 *
 * What is on the line, and why:
 * - `-nodefaults -no-user-config`: nothing that was not asked for, on any host.
 * - `-sandbox`: QEMU's seccomp filter; it also sets no-new-privileges.
 * - `tb-size=128` (MiB): TCG would take up to 1 GiB of translated code per VM. Booting a Debian
 *   kernel to user space fills about 40 MiB; memory is touched as it is used, and when the buffer is
 *   full TCG empties it and goes on.
 * - `-no-reboot`: a guest that resets itself ends its VM instead of booting a kernel it has not got.
 * - Memory: shared memfd, so that the state can leave RAM out (`x-ignore-shared`).
 * - Disk: `reconnect-delay` lets requests wait while the block server restarts; guest flushes are
 *   passed on; 4 KiB physical blocks, so that guests write whole pages of the generation.
 * - No machine here has a VM generation id (microvm has no place for it): a clone's kernel is
 *   reseeded by the guest agent, from virtio-rng and from the seed that comes with its identity.
 */
import { SnowflockError } from '../../common/errors.js';
import type { VmSpec } from '../driver.js';
import type { MachineShape } from '../shape.js';
import { type Machine, ramLayout } from './machine.js';

/** How long disk requests wait for the block server before the guest sees an I/O error. */
const DISK_WAIT_S = 600;
const DISK_OPEN_S = 10;
const TCG_BUFFER_MIB = 128;

/** Id of the network card's back end. */
export const NETDEV = 'net0';
/** fd number of the tap in the QEMU process. */
const TAP_FD = 3;

export interface VmPaths {
  qmp: string;
  watchdog: string;
  console: string;
  consoleLog: string;
  channel: string;
  capture: string;
  incoming: string;
  log: string;
}

export function vmPaths(spec: Pick<VmSpec, 'runDir' | 'channelSocket'>): VmPaths {
  const at = (name: string) => `${spec.runDir}/${name}`;
  return {
    qmp: at('qmp.sock'),
    watchdog: at('watchdog.sock'),
    console: at('console.sock'),
    consoleLog: at('console.log'),
    channel: spec.channelSocket ?? at('channel.sock'),
    capture: at('capture.sock'),
    incoming: at('incoming.sock'),
    log: at('qemu.log'),
  };
}

/** `key=value,...`; a comma inside a value is doubled, as QEMU wants it. */
function options(values: Record<string, string | number>, first?: string): string {
  const pairs = Object.entries(values).map(
    ([key, value]) => `${key}=${String(value).replaceAll(',', ',,')}`,
  );
  return (first === undefined ? pairs : [first, ...pairs]).join(',');
}

const SOCKET_MAX = 107;

/** @throws E_ARGUMENT for a specification QEMU would misread or could not serve. */
export function validateSpec(spec: VmSpec): void {
  const bad = (what: string): never => {
    throw new SnowflockError('E_ARGUMENT', `VM ${JSON.stringify(spec.id)}: ${what}`);
  };
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(spec.id)) bad('its id is not a plain name');
  if (!spec.runDir.startsWith('/')) bad(`runDir ${spec.runDir} is not absolute`);
  const paths = vmPaths(spec);
  const sockets = [paths.qmp, paths.watchdog, paths.console, paths.channel, paths.capture];
  sockets.push(paths.incoming);
  if (spec.disk) sockets.push(spec.disk.nbdSocket);
  if (spec.memtap) sockets.push(spec.memtap.socket);
  for (const path of sockets) {
    if (Buffer.byteLength(path) > SOCKET_MAX) bad(`socket path ${path} is longer than 107 bytes`);
  }
  const mib = spec.ramBytes / 2 ** 20;
  if (!Number.isInteger(mib) || mib < 1 || mib > 2 ** 22) bad('ramBytes must be whole MiB');
  if (!Number.isInteger(spec.vcpus) || spec.vcpus < 1 || spec.vcpus > 255) {
    bad('vcpus must be 1 to 255');
  }
  if (spec.nic && !/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/.test(spec.nic.mac)) bad('malformed MAC');
  if (spec.nic && (!Number.isInteger(spec.nic.tapFd) || spec.nic.tapFd < 0)) bad('bad tap fd');
  if (spec.user.uid === 0) bad('VM processes do not run as root');
  const logMax = spec.console?.logMaxBytes;
  if (logMax !== undefined && (!Number.isInteger(logMax) || logMax < 4096)) {
    bad('console.logMaxBytes must be at least 4096');
  }
  if (Buffer.byteLength(spec.boot.cmdline) > 2000) bad('the kernel command line is too long');
}

/** Guest-visible devices, in plugging order; QEMU gets each of them as one -device. */
function devices(spec: VmSpec, machine: Machine): Record<string, string | number | boolean>[] {
  const list: Record<string, string | number | boolean>[] = [];
  const bus = machine.transport;
  if (spec.disk) {
    list.push({
      driver: `virtio-blk-${bus}`,
      drive: 'disk0',
      serial: 'snowflock-root',
      discard: true,
      'write-zeroes': true,
      'num-queues': 1,
      logical_block_size: 512,
      physical_block_size: 4096,
      min_io_size: 4096,
      // Said, or QEMU reads the first sector to guess it: a clone would wait for its source before it
      // answers, and its daemon for it.
      cyls: 16383,
      heads: 16,
      secs: 63,
      rerror: 'report',
      werror: 'report',
    });
  }
  if (spec.nic) {
    // A clone announces itself when it has its own address, not when its state arrives.
    list.push({ driver: `virtio-net-${bus}`, netdev: NETDEV, guest_announce: false });
  }
  list.push({ driver: `virtio-serial-${bus}`, id: 'serial0', max_ports: 2 });
  list.push({ driver: 'virtserialport', bus: 'serial0.0', chardev: 'channel', nr: 1 });
  list.push({ driver: `virtio-rng-${bus}`, rng: 'rng0' });
  return list;
}

/** Machine type, options and firmware, as shapes name them. */
export function machineName(machine: Machine): string {
  const { type, firmware } = machine;
  return firmware === undefined ? type : `${type} ${firmware}`;
}

/** Shape of a VM of this specification; `accel` and `hostCpu` as probed. */
export function shapeOf(
  spec: VmSpec,
  machine: Machine,
  host: { version: string; accel: string; cpu: string },
): MachineShape {
  return {
    driver: 'qemu',
    version: host.version,
    machine: machineName(machine),
    accel: host.accel,
    cpu: host.cpu,
    vcpus: spec.vcpus,
    ram_bytes: spec.ramBytes,
    ram_layout: ramLayout(machine, spec.ramBytes),
    devices: devices(spec, machine).map((device) => JSON.stringify(device)),
  };
}

export interface ArgsOptions {
  machine: Machine;
  accel: string;
  incoming: boolean;
  /** The `-object` that is guest RAM (id `ram0`); a shared memfd unless given. */
  memory?: Record<string, string | number | boolean>;
}

/** What executes guest code; the probe guest is run with the very same. */
export function accelArgs(accel: string, machine: Machine, vcpus: number): string[] {
  if (accel === 'kvm') return ['-accel', 'kvm', '-cpu', 'host,migratable=on'];
  if (accel !== 'tcg') return ['-accel', accel];
  const thread = vcpus > 1 ? 'multi' : 'single';
  const tcg = options({ thread, 'tb-size': TCG_BUFFER_MIB }, 'tcg');
  return ['-accel', tcg, '-cpu', machine.tcgCpu];
}

export function buildArgs(spec: VmSpec, choice: ArgsOptions): string[] {
  const { machine } = choice;
  const paths = vmPaths(spec);
  const args: string[] = [];
  const add = (flag: string, value?: string | object): void => {
    args.push(flag);
    if (value !== undefined) args.push(typeof value === 'string' ? value : JSON.stringify(value));
  };
  const server = { server: 'on', wait: 'off' };

  add('-name', options({ guest: spec.id }));
  add('-nodefaults');
  add('-no-user-config');
  add('-display', 'none');
  add('-no-reboot');
  add('-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny');
  add('-M', `${machine.type},memory-backend=ram0`);
  if (machine.firmware !== undefined) add('-bios', machine.firmware);
  if (machine.transport === 'device') add('-global', 'virtio-mmio.force-legacy=false');
  args.push(...accelArgs(choice.accel, machine, spec.vcpus));
  add('-smp', String(spec.vcpus));
  add('-m', `${spec.ramBytes / 2 ** 20}M`);
  add('-object', {
    ...(choice.memory ?? { 'qom-type': 'memory-backend-memfd', share: true }),
    id: 'ram0',
    size: spec.ramBytes,
    merge: false,
    dump: false,
  });
  add('-object', { 'qom-type': 'rng-random', id: 'rng0', filename: '/dev/urandom' });

  add('-chardev', options({ id: 'qmp', path: paths.qmp, ...server }, 'socket'));
  add('-mon', 'chardev=qmp,mode=control');
  add('-chardev', options({ id: 'watchdog', path: paths.watchdog, ...server }, 'socket'));
  add('-mon', 'chardev=watchdog,mode=control');
  const log = { logfile: paths.consoleLog, logappend: 'on' };
  add('-chardev', options({ id: 'console', path: paths.console, ...server, ...log }, 'socket'));
  add('-serial', 'chardev:console');
  add('-chardev', options({ id: 'channel', path: paths.channel, ...server }, 'socket'));

  if (spec.disk) {
    add('-blockdev', {
      driver: 'nbd',
      'node-name': 'disk0',
      server: { type: 'unix', path: spec.disk.nbdSocket },
      export: spec.disk.exportName,
      'reconnect-delay': DISK_WAIT_S,
      'open-timeout': DISK_OPEN_S,
      discard: 'unmap',
      cache: { direct: false, 'no-flush': false },
    });
  }
  if (spec.nic) add('-netdev', options({ id: NETDEV, fd: TAP_FD, vhost: 'off' }, 'tap'));
  for (const device of devices(spec, machine)) {
    const kind = String(device.driver);
    const hidden: Record<string, string | number> = {};
    if (kind.startsWith('virtio-net') && spec.nic) hidden.mac = spec.nic.mac;
    if (kind.startsWith('virtio-net') && machine.transport === 'pci') hidden.romfile = '';
    if (kind === 'virtserialport') hidden.name = CHANNEL_NAME;
    add('-device', { ...device, ...hidden });
  }

  if (choice.incoming) {
    add('-S');
    add('-incoming', 'defer');
  } else {
    add('-kernel', spec.boot.kernel);
    if (spec.boot.initrd !== undefined) add('-initrd', spec.boot.initrd);
    add('-append', spec.boot.cmdline);
  }
  return args;
}

/** Name of the guest channel's port: `/dev/virtio-ports/org.snowflock.0` in the guest. */
export const CHANNEL_NAME = 'org.snowflock.0';

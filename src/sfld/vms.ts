/**
 * VMs of this host: starting a family's first VM, finding VMs again after a restart, ending them.
 * Clones are made in clones.ts; both end here.
 */
import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { chown, mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { GuestChannel, type GuestIdentity } from '../api/guest-channel.js';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { newEpoch, newSecretId, newVmId } from '../common/ids.js';
import { tscKhz } from '../common/tsc.js';
import { Undo } from '../common/undo.js';
import { DhcpService } from '../dhcp/service.js';
import type { Vm, VmSpec } from '../hypervisor/driver.js';
import { findImage } from '../image/images.js';
import { kernelCommandLine } from '../image/manifest.js';
import { addressOfVmid, GATEWAY, GUEST_MAC, MTU, PREFIX_BITS } from '../network/addresses.js';
import { openTap } from '../network/tap.js';
import { TcpGuard } from '../network/tcp-guard.js';
import { closeReplicas, expectVm, openDisk } from './bases.js';
import { cloneEnded, endForksOf } from './fork.js';
import { handleGuestCall } from './guest-calls.js';
import { agentPath, type Host, type LiveVm, liveVm, placeBootFiles, vmPaths } from './host.js';
import { leaseTaken } from './readdress.js';
import type { Addressing, EndReport, PendingReply, VmRecord } from './records.js';
import { revokeTickets } from './tickets.js';

const READY_LIMIT_MS = 120_000;
const ATTACH_LIMIT_MS = 10_000;
const START_LIMIT_MS = 60_000;
/**
 * Where DHCP alone makes a guest follow a fork, a client that does not watch the carrier asks soon, and
 * then to all: it cannot reach the server alone while it has its parent's address.
 */
const FOLLOWED_LEASE = { renewSeconds: 10, rebindSeconds: 15 };
const CHANNEL_RETRY_MS = 500;
/** Each waits for the VM process's answer for some seconds. */
const ADOPT_TRIES = 4;

export interface RunRequest {
  image: string;
  name: string;
  ram_bytes: number;
  vcpus: number;
  /** Default agent. */
  addressing?: Addressing;
}

/** Boots a VM, the first of a new family, and waits until its guest agent answers. */
export async function runVm(host: Host, request: RunRequest): Promise<VmRecord> {
  const image = await findImage(host.config.imageDir, request.image);
  const family = await host.families.take(new Set(host.vms.all().map((vm) => vm.family)));
  // From here to the record nothing is awaited.
  if (host.vms.all().some((vm) => vm.name === request.name && vm.state !== 'ended')) {
    throw new SnowflockError('E_EXISTS', `a VM named ${request.name} exists`);
  }
  const undo = new Undo();
  const id = newVmId();
  try {
    const reservation = newSecretId('res');
    const need = { memoryBytes: request.ram_bytes, vcpus: request.vcpus };
    host.resources.reserve(reservation, need, START_LIMIT_MS);
    undo.add('reservation', () => host.resources.release(reservation));
    host.resources.commit(reservation);
    const record: VmRecord = {
      id,
      name: request.name,
      kind: 'parent',
      image: request.image,
      family,
      family_host: host.config.name,
      vmid: 0,
      ram_bytes: request.ram_bytes,
      disk_bytes: image.manifest.disk_bytes,
      vcpus: request.vcpus,
      ...(request.addressing === 'dhcp' ? { addressing: 'dhcp' } : {}),
      state: 'starting',
      created_ms: Date.now(),
      token: randomBytes(16).toString('hex'),
      epoch: newEpoch(),
      reservation,
      disk_directory: join(host.config.stateDir, 'disk', id),
      tap: tapName(id),
      uid: freeUid(host),
      hypervisor: null,
      shape: null,
      next_vmid: 1,
      base: null,
      parent: null,
      disjoint: { ram: [], disk: [] },
      end: null,
    };
    await host.vms.save(record);
    undo.add('record', () => host.vms.remove(id));
    undo.add('disk', () => rm(record.disk_directory, { recursive: true, force: true }));
    await host.dataplane.call('disk.create', {
      directory: record.disk_directory,
      size_bytes: image.manifest.disk_bytes,
      image: image.diskPath,
    });
    const bootFiles = await placeBootFiles(host.config, image);
    // An emulated guest cannot measure its counter's rate on a busy host; it is the host's.
    const { accel } = await host.driver.probe();
    const clockKhz = accel === 'kvm' ? undefined : await tscKhz();
    const { spec, dhcp, tapFd } = await makeParts(host, record, undo);
    const vm = await host.driver
      .boot({
        ...spec,
        boot: {
          ...bootFiles,
          // Read by the minimal image's init; others have their own DHCP client.
          cmdline:
            kernelCommandLine(image.manifest, clockKhz) +
            (record.addressing === 'dhcp' ? ' sf.addressing=dhcp' : ''),
        },
      })
      .finally(() => closeSync(tapFd)); // the VM's process has its own; the tap goes with the last
    undo.add('VM', () => vm.destroy());
    stillStarting(record);
    record.hypervisor = vm.record;
    record.shape = vm.shape;
    await host.vms.save(record);
    await host.dataplane.call('vm.attached', { vm: id, timeout_ms: ATTACH_LIMIT_MS });
    const live = await goLive(host, record, vm, dhcp);
    undo.add('channel', () => live.channel.close());
    await (record.addressing === 'dhcp'
      ? Promise.any([greet(live), leaseTaken(dhcp, READY_LIMIT_MS)])
      : greet(live));
    stillStarting(record);
    record.state = 'running';
    await host.vms.save(record);
    return record;
  } catch (error) {
    const record = host.vms.get(id);
    const ended = ending.get(id);
    if (ended !== undefined) await ended;
    else if (record !== undefined) record.state = 'ending'; // the end of its process is no news
    host.live.delete(id);
    await undo.run(host.log);
    throw error;
  }
}

/** A user number that no VM of this host has. The caller saves its record before it awaits. */
export function freeUid(host: Host): number {
  const taken = new Set(host.vms.all().map((vm) => vm.uid));
  let uid = host.config.vmUid;
  while (taken.has(uid)) uid++;
  return uid;
}

/** For who makes a VM, after each wait: it may have been ended meanwhile. Errors: E_CLOSED. */
export function stillStarting(record: VmRecord): void {
  if (record.state === 'starting') return;
  throw new SnowflockError('E_CLOSED', `VM ${record.name} was ended while it was being made`);
}

/** Tap names are limited to 15 bytes and unique per network namespace. */
export function tapName(vm: string): string {
  return `sf-${vm}`;
}

/** What `hello` tells the guest; the seed is new each time. */
function identity(record: VmRecord, seed?: string): GuestIdentity {
  const network = {
    ip: addressOfVmid(record.vmid),
    prefix: PREFIX_BITS,
    gateway: GATEWAY,
    mtu: MTU,
  };
  return {
    epoch: record.epoch,
    vmid: record.vmid,
    family: record.family,
    ...(record.addressing === 'dhcp' ? {} : network),
    hostname: record.name,
    seed: seed ?? randomBytes(32).toString('hex'),
    ...(record.base === null ? {} : { generation: record.base.ram.generation }),
  };
}

/** The host's side of a VM: memory server, disk, network; then the driver's specification of it. */
export async function makeParts(
  host: Host,
  record: VmRecord,
  undo: Undo,
): Promise<{ spec: VmSpec; dhcp: DhcpService; tapFd: number }> {
  const { config } = host;
  const paths = vmPaths(config, record.id);
  await mkdir(paths.run, { recursive: true, mode: 0o700 });
  await chown(paths.run, record.uid, config.vmGid);
  undo.add('run folder', () => rm(paths.run, { recursive: true, force: true }));
  await expectVm(host.dataplane.call, host, record);
  undo.add('memtap', () => host.dataplane.call('vm.remove', { vm: record.id }));
  await openDisk(host.dataplane.call, host, record);
  undo.add('disk server', () => host.dataplane.call('disk.close', { disk: record.id }));
  const tapFd = openTap(record.tap);
  let dhcp: DhcpService;
  try {
    host.filter.addVm(record);
    undo.add('filter', () => removeFromFilter(host, record));
    host.nat?.changed();
    dhcp = dhcpOf(host, record);
  } catch (error) {
    closeSync(tapFd);
    throw error;
  }
  undo.add('DHCP', () => dhcp.stop());
  const spec: VmSpec = {
    id: record.id,
    runDir: paths.run,
    ramBytes: record.ram_bytes,
    vcpus: record.vcpus,
    disk: { nbdSocket: paths.nbd, exportName: record.id },
    nic: { tapFd, mac: GUEST_MAC },
    memtap: {
      socket: memtapSocket(config),
      vm: record.id,
      token: record.token,
      agentPath: agentPath(config),
    },
    user: { uid: record.uid, gid: config.vmGid },
    boot: { kernel: '', cmdline: '' },
  };
  return { spec, dhcp, tapFd };
}

export function memtapSocket(config: { runDir: string }): string {
  return join(config.runDir, 'memtap.sock');
}

/** Joins a started VM with its guest channel and watches for its end. */
export async function goLive(
  host: Host,
  record: VmRecord,
  vm: Vm,
  dhcp: DhcpService,
): Promise<LiveVm> {
  const channel = newChannel(host, vm);
  const ready = Promise.resolve();
  const live: LiveVm = { record, vm, dhcp, channel, ready, forking: false, forks: new Set() };
  if (record.addressing === 'dhcp') {
    const { tap, family, vmid } = record;
    live.guard = new TcpGuard({ tap, family, address: addressOfVmid(vmid) });
  }
  useChannel(host, live);
  host.live.set(record.id, live);
  vm.on('exited', ({ status, signal, logTail }) => {
    if (record.state === 'ending' || record.state === 'ended') return;
    // With -no-reboot a guest's orderly shutdown ends the process with status 0.
    const clean = status === 0;
    endSoon(host, record.id, {
      status: clean ? 0 : null,
      reason: clean ? 'shutdown' : 'crashed',
      message: clean ? 'the guest shut down' : `VM process ended (${signal ?? status}): ${logTail}`,
    });
  });
  await live.channel.connect();
  return live;
}

function newChannel(host: Host, vm: Vm): GuestChannel {
  return new GuestChannel({ socketPath: vm.record.channel_socket, log: host.log });
}

/**
 * Serves the guest's calls on its channel. A guest that breaks the channel loses its sessions and
 * gets a new one, under the same identity, a little later.
 */
function useChannel(host: Host, live: LiveVm): void {
  const { record } = live;
  live.channel.setCallHandler((call) => handleGuestCall(host, live, call));
  live.channel.once('closed', (error) => {
    const over = record.state === 'ending' || record.state === 'ended' || host.closing;
    if (over || error.code === 'E_STATE') return;
    host.log.warn({ vm: record.id, code: error.code }, `guest channel: ${error.message}`);
    setTimeout(() => {
      if (host.live.get(record.id) !== live || host.closing) return;
      live.channel = newChannel(host, live.vm);
      useChannel(host, live);
      live.channel
        .connect()
        .then(() => greet(live))
        .catch((failure: unknown) => {
          host.log.warn({ vm: record.id, error: String(failure) }, 'guest agent does not answer');
          live.channel.close(); // and a new one is tried
        });
    }, CHANNEL_RETRY_MS);
  });
}

/**
 * Tells the guest who it is; resolves when it has taken that on. Under the identity it has already
 * (same epoch) it only resumes its pending calls.
 */
export function greet(live: LiveVm, seed?: string, reply?: PendingReply): Promise<unknown> {
  const limit = { timeoutMs: READY_LIMIT_MS };
  live.ready = live.channel.hello(identity(live.record, seed), reply, limit);
  live.ready.catch(() => {}); // whoever waits gets it
  return live.ready;
}

function dhcpOf(host: Host, record: VmRecord): DhcpService {
  return new DhcpService({
    tap: record.tap,
    family: record.family,
    totals: host.dhcp,
    identity: {
      address: addressOfVmid(record.vmid),
      guestMac: GUEST_MAC,
      hostname: record.name,
      ...host.nat?.lease,
      ...(record.addressing === 'dhcp' ? FOLLOWED_LEASE : {}),
    },
  });
}

function removeFromFilter(host: Host, record: VmRecord): void {
  try {
    host.filter.removeVm(record.tap);
  } catch (error) {
    // The tap, and with it its entry, goes when the VM process does.
    if (!(error instanceof SnowflockError) || error.code !== 'E_NOT_FOUND') throw error;
  } finally {
    host.nat?.changed();
  }
}

/** Finds the VMs of an earlier daemon again; those whose process is gone are cleaned up. */
export async function adoptVms(host: Host): Promise<void> {
  await Promise.all(host.vms.all().map((record) => adoptOrEnd(host, record)));
}

async function adoptOrEnd(host: Host, record: VmRecord): Promise<void> {
  try {
    const vm = await findProcess(host, record);
    const halfMade = record.state === 'starting' || givenUp(host, record);
    if (vm === null || halfMade || record.state === 'ending') {
      await vm?.destroy();
      const report: EndReport = {
        status: null,
        reason: halfMade ? 'failed' : 'crashed',
        message: halfMade ? 'the daemon ended while the VM was being made' : 'VM process is gone',
      };
      await endVm(host, record.id, report, !halfMade && record.state === 'running');
      return;
    }
    await adoptVm(host, record, vm);
    host.log.info({ vm: record.id, name: record.name }, 'VM found again');
  } catch (error) {
    // It lives, and runs on without a daemon until the next start of one: better than ending it.
    const { code, message } = asSnowflockError(error);
    host.log.error({ vm: record.id, code }, `cannot take the VM over: ${message}`);
  }
}

async function adoptVm(host: Host, record: VmRecord, vm: Vm): Promise<void> {
  // The daemon may have died while it held the VM paused; a guest must never stay so.
  if ((await vm.status()) !== 'running') await vm.resume();
  if (record.addressing === 'dhcp') await vm.setLink(true); // it may have died while it was off
  host.filter.addVm(record);
  const live = await goLive(host, record, vm, dhcpOf(host, record));
  record.state = 'running';
  await host.vms.save(record);
  // Same epoch: the guest only resumes its pending calls. It may be slow; nothing waits for it.
  greet(live).catch((error: unknown) => {
    if (record.addressing === 'dhcp') return; // there may be none
    host.log.warn({ vm: record.id, error: String(error) }, 'guest agent does not answer');
    live.channel.close(); // and a new one is tried, see useChannel
  });
}

/** A clone of this host's own whose fork was not finished: its generations are gone. */
function givenUp(host: Host, record: VmRecord): boolean {
  if (record.parent === null || record.parent.host !== host.config.name) return false;
  const fork = host.forks.get(record.parent.fork);
  const clone = fork?.clones.find((one) => one.vm === record.id);
  return clone === undefined || clone.end !== null;
}

async function findProcess(host: Host, record: VmRecord): Promise<Vm | null> {
  if (record.hypervisor === null) return null;
  for (let tries = 1; ; tries++) {
    try {
      return await host.driver.adopt(record.hypervisor);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (code === 'E_NOT_FOUND') return null;
      // The process lives but does not answer, as on a host that has just come under load.
      if (tries === ADOPT_TRIES) throw error;
      host.log.warn({ vm: record.id, code }, message);
    }
  }
}

/** Ends under way in this process. */
const ending = new Map<string, Promise<void>>();

/**
 * Ends a VM and removes all that belongs to it, its own clones first. If that is under way already,
 * waits for it: the first report counts. Takes up an end that an earlier daemon did not finish.
 * `lostWithHost`: nobody ended it, so its clones on other hosts may live on.
 */
export function endVm(
  host: Host,
  id: string,
  report: EndReport,
  lostWithHost = false,
): Promise<void> {
  const underWay = ending.get(id);
  if (underWay !== undefined) return underWay;
  const record = host.vms.get(id);
  if (record === undefined) return Promise.resolve();
  record.state = 'ending';
  const end = finishVm(host, record, report, lostWithHost).finally(() => ending.delete(id));
  ending.set(id, end);
  return end;
}

async function finishVm(
  host: Host,
  record: VmRecord,
  report: EndReport,
  lostWithHost: boolean,
): Promise<void> {
  const { id } = record;
  const counted = await host.dataplane.call('vm.stats', { vm: id }).catch(() => undefined);
  const fetched = counted?.pagesFetched;
  record.end = fetched === undefined ? report : { ...report, pages_fetched: fetched };
  await host.vms.save(record);
  const live = host.live.get(id);
  const undo = new Undo();
  // In reverse order: the clones end while their source still lives, then the VM, then its parts.
  undo.add('run folder', () => rm(vmPaths(host.config, id).run, { recursive: true, force: true }));
  undo.add('reservation', () => host.resources.release(record.reservation));
  undo.add('disk', () => rm(record.disk_directory, { recursive: true, force: true }));
  undo.add('disk server', () => host.dataplane.call('disk.close', { disk: id }));
  undo.add('memtap', () => host.dataplane.call('vm.remove', { vm: id }));
  undo.add('filter', () => removeFromFilter(host, record));
  if (live !== undefined) {
    undo.add('DHCP', () => live.dhcp.stop());
    undo.add('TCP', () => live.guard?.close());
    undo.add('channel', () => live.channel.close());
    undo.add('VM', () => live.vm.destroy());
  } else if (record.hypervisor !== null) {
    // Not taken over, or not started yet: its process is there all the same.
    const { hypervisor } = record;
    undo.add('VM', () => host.driver.end(hypervisor));
  }
  undo.add('tickets', () => revokeTickets(host, id));
  undo.add('clones', async () => {
    // A fork under way ends first (its waits are bounded): then all its clones are known.
    await Promise.allSettled([...(live?.forks ?? [])]);
    await endForksOf(host, id, 'the parent ended', lostWithHost);
  });
  await undo.run(host.log);
  host.live.delete(id);
  record.state = 'ended';
  await host.vms.remove(id);
  // After the record is gone: of clones that end at once the last one finds no other.
  const last = new Undo();
  last.add('replicas', () => closeReplicas(host, record));
  await last.run(host.log);
  if (record.parent !== null) await cloneEnded(host, record, record.end);
}

/** Ends a VM that nobody waits for. */
export function endSoon(host: Host, id: string, report: EndReport): void {
  endVm(host, id, report).catch((error: unknown) =>
    host.log.error({ vm: id, error: String(error) }, 'cannot end a VM'),
  );
}

/** A VM by id or name, on this host. */
export function findVm(host: Host, ref: string): LiveVm {
  const found = host.vms
    .all()
    .find((vm) => (vm.id === ref || vm.name === ref) && vm.state !== 'ended');
  if (found === undefined) {
    throw new SnowflockError('E_NOT_FOUND', `no VM ${ref} on host ${host.config.name}`);
  }
  return liveVm(host, found.id);
}

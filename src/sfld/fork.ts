/**
 * VM fork on the parent's host (paper sections 1 and 3.8): capture once, start clones on many hosts.
 * The hosts make their clones ready once the parent runs again, while the descriptor is being put
 * together. A host that fails costs its own clones only; each clone has its own result.
 */

import { randomBytes } from 'node:crypto';
import { EventEmitter } from 'node:events';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Placement } from '../allocator/placement.js';
import type { Ticket } from '../allocator/tickets.js';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import {
  newEpoch,
  newGenerationId,
  newGenerationKey,
  newSecretId,
  newVmId,
} from '../common/ids.js';
import { addressOfVmid, wireMac } from '../network/addresses.js';
import { captureVm, closeFork } from './capture.js';
import type { Host, LiveVm } from './host.js';
import type {
  CloneResult,
  EndReport,
  ForkRecord,
  GenerationRef,
  PrepareRequest,
  VmRecord,
} from './records.js';
import { useTicket } from './tickets.js';

/** Emits the fork's id whenever one of its clones changed. */
const changes = new EventEmitter<{ changed: [string] }>();
changes.setMaxListeners(0);

const CLOSED_FORKS_KEPT = 64;
const REPORT_EVERY_MS = 2_000;

/** Forks a running VM with a ticket. Resolves when every clone runs or has failed. */
export function forkVm(
  host: Host,
  live: LiveVm,
  ticketId: string,
  pendingId: string | null,
): Promise<ForkRecord> {
  return underWay(live, forkNow(host, live, ticketId, pendingId));
}

async function forkNow(
  host: Host,
  live: LiveVm,
  ticketId: string,
  pendingId: string | null,
): Promise<ForkRecord> {
  const requestedAt = performance.now();
  const { record } = live;
  begin(live);
  let unspent: Ticket | undefined;
  try {
    const ticket = await useTicket(host, record.id, ticketId);
    unspent = ticket;
    const fork = newFork(host, live, ticketId, false, pendingId);
    // The clones' VM processes are started only when the parent runs again: on a shared machine
    // they would take the processors from the capture, and the parent would pause longer.
    const { resumed, descriptor } = captureVm(host, live, fork);
    descriptor.catch(() => {});
    await resumed; // a failed capture fails the fork as a whole
    unspent = undefined; // from here each clone's host gives its room back
    await spawnClones(host, record, fork, ticket, descriptor, requestedAt);
    await descriptor;
    await forgetOldForks(host, record.id);
    return fork;
  } catch (error) {
    if (unspent !== undefined) giveBack(host, unspent);
    throw error;
  } finally {
    end(live);
  }
}

/** `sf_checkpoint_parent`: captures, and holds the generations until they are released. */
export function checkpointVm(
  host: Host,
  live: LiveVm,
  pendingId: string | null,
): Promise<ForkRecord> {
  return underWay(live, checkpointNow(host, live, pendingId));
}

async function checkpointNow(
  host: Host,
  live: LiveVm,
  pendingId: string | null,
): Promise<ForkRecord> {
  begin(live);
  try {
    const fork = newFork(host, live, null, true, pendingId);
    await captureVm(host, live, fork).descriptor;
    return fork;
  } finally {
    end(live);
  }
}

/** `sf_create_clones`: clones of an earlier checkpoint. */
export function createClones(
  host: Host,
  live: LiveVm,
  checkpoint: string,
  ticketId: string,
): Promise<ForkRecord> {
  return underWay(live, createNow(host, live, checkpoint, ticketId));
}

async function createNow(
  host: Host,
  live: LiveVm,
  checkpoint: string,
  ticketId: string,
): Promise<ForkRecord> {
  const requestedAt = performance.now();
  if (live.record.state !== 'running') {
    throw new SnowflockError('E_STATE', `VM ${live.record.name} is ${live.record.state}`);
  }
  const known = (): ForkRecord => {
    const fork = host.forks.get(checkpoint);
    if (fork === undefined || fork.vm !== live.record.id || !fork.held || fork.state !== 'open') {
      throw new SnowflockError(
        'E_NOT_FOUND',
        `VM ${live.record.name} has no checkpoint ${checkpoint}`,
      );
    }
    return fork;
  };
  known();
  const ticket = await useTicket(host, live.record.id, ticketId);
  let fork: ForkRecord;
  try {
    fork = known(); // it may have been released meanwhile
  } catch (error) {
    giveBack(host, ticket);
    throw error;
  }
  const descriptor = readFile(fork.descriptor_path);
  descriptor.catch(() => {}); // each host that needs it fails with it
  await spawnClones(host, live.record, fork, ticket, descriptor, requestedAt);
  fork.ticket = ticketId;
  await host.forks.save(fork);
  return fork;
}

/** Lets a checkpoint go: its generations end with the last clone made of them. */
export async function releaseCheckpoint(host: Host, fork: ForkRecord): Promise<void> {
  fork.held = false;
  await settle(host, fork);
}

function underWay<T>(live: LiveVm, work: Promise<T>): Promise<T> {
  live.forks.add(work);
  const done = (): void => {
    live.forks.delete(work);
  };
  work.then(done, done);
  return work;
}

/** A ticket that was used up and came to nothing: its room is free at once, not when it lapses. */
function giveBack(host: Host, ticket: Ticket): void {
  for (const placement of ticket.placements) {
    const failed = (error: unknown): void => {
      // It lapses by itself.
      host.log.warn({ host: placement.host, error: String(error) }, 'cannot give room back');
    };
    try {
      host.peers.get(placement.host).release(ticket.id).catch(failed);
    } catch (error) {
      failed(error);
    }
  }
}

function begin(live: LiveVm): void {
  if (live.forking || live.record.state !== 'running') {
    throw new SnowflockError(
      'E_STATE',
      `VM ${live.record.name} is ${live.forking ? 'being forked' : live.record.state}`,
    );
  }
  live.forking = true;
}

function end(live: LiveVm): void {
  live.forking = false;
}

function newFork(
  host: Host,
  live: LiveVm,
  ticket: string | null,
  held: boolean,
  pending: string | null,
): ForkRecord {
  const { config } = host;
  const { record } = live;
  const id = newSecretId('fork');
  const ram = newGeneration(host, record.ram_bytes);
  return {
    id,
    vm: record.id,
    state: 'capturing',
    held,
    pending,
    ticket,
    ram,
    disk: newGeneration(host, record.disk_bytes),
    ram_directory: join(config.ramDir, 'generation', ram.generation),
    descriptor_path: join(config.stateDir, 'descriptor', id),
    descriptor_bytes: 0,
    created_ms: Date.now(),
    parent_pause_ms: null,
    fork_ms: null,
    dirty_pages: null,
    wire: null,
    disjoint: record.disjoint,
    clones: [],
  };
}

function newGeneration(host: Host, bytes: number): GenerationRef {
  const id = newGenerationId();
  const { group, port } = host.groups.take();
  return {
    generation: id,
    pages: Math.ceil(bytes / 4096),
    source: {
      address: host.config.address,
      port: host.config.mcdistPort,
      group,
      group_port: port,
      key: newGenerationKey(),
    },
  };
}

async function spawnClones(
  host: Host,
  record: VmRecord,
  fork: ForkRecord,
  ticket: Ticket,
  descriptor: Promise<Buffer>,
  requestedAt: number,
): Promise<void> {
  const vmids = [...ticket.vmids];
  const first = fork.clones.length;
  const jobs = ticket.placements.map((placement) => {
    const mine = vmids.splice(0, placement.clones).map((vmid) => ({ vm: newVmId(), vmid }));
    for (const { vm, vmid } of mine) {
      fork.clones.push({
        vm,
        vmid,
        ticket: ticket.id,
        host: placement.host,
        ip: addressOfVmid(vmid),
        wire_mac: wireMac({ family: record.family, vmid }),
        ok: false,
        asked_ms: 0,
        running_ms: null,
        reply_ms: null,
        error: null,
        end: null,
      });
    }
    return { placement, mine };
  });
  const added = fork.clones.slice(first);
  const summary = {
    ticket: ticket.id,
    granted: String(ticket.granted),
  };
  await Promise.all(
    jobs.map(async ({ placement, mine }) => {
      const sentAt = performance.now() - requestedAt;
      for (const clone of added) {
        if (clone.host === placement.host) clone.asked_ms = sentAt;
      }
      try {
        await spawnOnHost(
          host,
          record,
          fork,
          placement,
          mine,
          descriptor,
          ticket.id,
          summary,
          sentAt,
        );
      } catch (error) {
        const { code, message } = asSnowflockError(error, 'E_CLONE_START');
        for (const { vmid } of mine) {
          const clone = added.find((one) => one.vmid === vmid);
          if (clone === undefined || clone.ok) continue;
          clone.error = { code, message };
          clone.end = { status: null, reason: 'failed', message };
        }
      }
    }),
  );
  const running = added.map((clone) => clone.running_ms).filter((ms) => ms !== null);
  fork.fork_ms = running.length === 0 ? null : Math.max(...running);
  await settle(host, fork);
}

async function spawnOnHost(
  host: Host,
  record: VmRecord,
  fork: ForkRecord,
  placement: Placement,
  mine: { vm: string; vmid: number }[],
  descriptor: Promise<Buffer>,
  ticketId: string,
  summary: Record<string, string>,
  sentAt: number,
): Promise<void> {
  const peer = host.peers.get(placement.host);
  const { shape } = record;
  if (shape === null) throw new SnowflockError('E_STATE', `VM ${record.name} has no shape yet`);
  const request: PrepareRequest = {
    fork: fork.id,
    parent: { host: host.config.name, vm: record.id },
    family: record.family,
    family_host: record.family_host,
    image: record.image,
    name: record.name,
    ram_bytes: record.ram_bytes,
    vcpus: record.vcpus,
    shape,
    ram: fork.ram,
    disk: fork.disk,
    reservation: ticketId,
    ...(record.addressing === undefined ? {} : { addressing: record.addressing }),
    ...(fork.connections === undefined
      ? {}
      : {
          inherited: { address: addressOfVmid(record.vmid), connections: fork.connections },
        }),
    clones: mine.map(({ vm, vmid }) => ({
      vm,
      vmid,
      epoch: newEpoch(),
      seed: randomBytes(32).toString('hex'),
      reply:
        fork.pending === null
          ? null
          : { id: fork.pending, args: { vmid: String(vmid), ...summary } },
    })),
  };
  try {
    await peer.prepare(request);
    const bytes = await descriptor;
    const reports = await peer.start(fork.id, bytes);
    for (const report of reports) {
      const clone = fork.clones.find((one) => one.vmid === report.vmid);
      if (clone === undefined) continue;
      clone.ok = report.ok;
      clone.running_ms = report.running_ms === null ? null : sentAt + report.running_ms;
      clone.error = report.error;
      if (!report.ok && clone.end === null) {
        const message = report.error?.message ?? 'the clone did not start';
        clone.end = { status: null, reason: 'failed', message };
      }
    }
  } catch (error) {
    // Also when the host cannot be reached: it removes what it prepared by itself after a while.
    peer
      .abort(
        fork.id,
        mine.map(({ vm }) => vm),
      )
      .catch((abortError: unknown) => {
        host.log.warn({ host: placement.host, error: String(abortError) }, 'cannot abort a fork');
      });
    throw error;
  }
}

/** A clone's guest answered under its new identity, `replyMs` after its host was asked. */
export function cloneReplied(host: Host, forkId: string, vmid: number, replyMs: number): void {
  const clone = host.forks.get(forkId)?.clones.find((one) => one.vmid === vmid);
  if (clone === undefined) return;
  clone.reply_ms = clone.asked_ms + replyMs;
  changes.emit('changed', forkId);
}

/** Called on the clone's host: tells the parent's host that a clone ended. */
export async function cloneEnded(host: Host, record: VmRecord, end: EndReport): Promise<void> {
  if (record.parent === null) return;
  const { host: parentHost, fork } = record.parent;
  const port = host.peers.get(parentHost);
  const report = (): Promise<void> => port.reportEnd(fork, record.vmid, end);
  try {
    await report();
  } catch {
    // Out of reach now. Tried again in the background until the lease tells the parent anyway.
    const again = async (): Promise<void> => {
      const limit = Date.now() + host.config.leaseMs;
      while (Date.now() < limit && !host.closing) {
        await new Promise((resolve) => setTimeout(resolve, REPORT_EVERY_MS).unref());
        try {
          await report();
          return;
        } catch (error) {
          const { code, message } = asSnowflockError(error);
          host.log.warn({ vm: record.id, code }, `cannot report the end of a clone: ${message}`);
        }
      }
    };
    void again();
  }
}

/** Called on the parent's host. */
export async function noteEnd(
  host: Host,
  forkId: string,
  vmid: number,
  end: EndReport,
): Promise<void> {
  const fork = host.forks.get(forkId);
  const clone = fork?.clones.find((one) => one.vmid === vmid);
  if (fork === undefined || clone === undefined || clone.end !== null) return;
  clone.end = end;
  await settle(host, fork);
}

async function settle(host: Host, fork: ForkRecord): Promise<void> {
  changes.emit('changed', fork.id);
  if (fork.state === 'capturing') return;
  const over = !fork.held && fork.clones.every((clone) => clone.end !== null);
  if (over) await closeFork(host, fork);
  else await host.forks.save(fork);
}

/** Waits until every clone of a ticket's fork has ended. Errors: E_TICKET_UNKNOWN, E_TIMEOUT. */
export async function joinFork(
  host: Host,
  live: LiveVm,
  ref: string,
  timeoutMs: number,
): Promise<CloneResult[]> {
  const fork = host.forks
    .all()
    .find((one) => one.vm === live.record.id && (one.id === ref || ticketsOf(one).includes(ref)));
  if (fork === undefined) {
    throw new SnowflockError('E_TICKET_UNKNOWN', `VM ${live.record.name} has no fork ${ref}`);
  }
  // Of a checkpoint several tickets may have made clones; each joins its own.
  const wanted = (): CloneResult[] =>
    fork.clones.filter((clone) => ref === fork.id || clone.ticket === ref);
  await new Promise<void>((resolve, reject) => {
    const timer = setTimeout(() => {
      changes.off('changed', check);
      reject(new SnowflockError('E_TIMEOUT', `clones of ${ref} still run after ${timeoutMs} ms`));
    }, timeoutMs);
    const check = (): void => {
      if (wanted().some((clone) => clone.end === null)) return;
      clearTimeout(timer);
      changes.off('changed', check);
      resolve();
    };
    changes.on('changed', check);
    check();
  });
  return wanted();
}

function ticketsOf(fork: ForkRecord): string[] {
  return [fork.ticket ?? '', ...fork.clones.map((clone) => clone.ticket)];
}

/** Kills clones of a VM: all of a fork, or one by its vmid. Returns how many were asked to end. */
export async function killClones(
  host: Host,
  live: LiveVm,
  which: { fork: string } | { vmid: number },
): Promise<number> {
  const targets = host.forks
    .all()
    .filter((fork) => fork.vm === live.record.id)
    .flatMap((fork) => fork.clones.map((clone) => ({ fork, clone })))
    .filter(({ fork, clone }) =>
      'vmid' in which
        ? clone.vmid === which.vmid
        : fork.id === which.fork || clone.ticket === which.fork,
    );
  if (targets.length === 0) {
    throw new SnowflockError('E_NOT_FOUND', `VM ${live.record.name} has no such clone`);
  }
  const alive = targets.filter(({ clone }) => clone.end === null);
  await Promise.all(
    alive.map(({ fork, clone }) => kill(host, fork, clone, 'killed by its parent')),
  );
  return alive.length;
}

async function kill(
  host: Host,
  fork: ForkRecord,
  clone: CloneResult,
  message: string,
): Promise<void> {
  const end: EndReport = { status: null, reason: 'killed', message };
  await host.peers.get(clone.host).endClone(clone.vm, end);
  await noteEnd(host, fork.id, clone.vmid, end);
}

/**
 * The parent is ending: so do its clones, and its forks are forgotten. A fork with a clone that could
 * not be told stays in the records, so that the clone's host learns it later (see orphans.ts).
 * `lost`: the parent was lost with its host. Its clones elsewhere live on while their hosts hold what
 * they need; those here do not, since the generations are gone.
 */
export async function endForksOf(host: Host, vm: string, why: string, lost = false): Promise<void> {
  for (const fork of host.forks.all().filter((one) => one.vm === vm)) {
    fork.held = false;
    const alive = fork.clones.filter(
      (clone) => clone.end === null && !(lost && clone.host !== host.config.name),
    );
    let untold = false;
    await Promise.all(
      alive.map((clone) =>
        kill(host, fork, clone, why).catch(async (error: unknown) => {
          untold = true;
          const { message } = asSnowflockError(error);
          await noteEnd(host, fork.id, clone.vmid, { status: null, reason: 'lost', message });
        }),
      ),
    );
    await closeFork(host, fork).catch((error: unknown) =>
      host.log.error({ fork: fork.id, error: String(error) }, 'cannot close a fork'),
    );
    if (!untold) await host.forks.remove(fork.id);
  }
  const old = host.forks.all().filter((fork) => host.vms.get(fork.vm) === undefined);
  await forgetAllBut(host, CLOSED_FORKS_KEPT, old);
}

async function forgetOldForks(host: Host, vm: string): Promise<void> {
  const closed = host.forks.all().filter((fork) => fork.vm === vm && fork.state === 'closed');
  await forgetAllBut(host, CLOSED_FORKS_KEPT, closed);
}

async function forgetAllBut(host: Host, newest: number, forks: ForkRecord[]): Promise<void> {
  const sorted = forks.sort((a, b) => b.created_ms - a.created_ms);
  for (const fork of sorted.slice(newest)) await host.forks.remove(fork.id);
}

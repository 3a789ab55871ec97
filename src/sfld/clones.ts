/**
 * Clones on the host where they run.
 *
 * States of a clone's start: prepared (VM process waits for its device state) -> started (runs) or
 * ended. `prepare` does all that needs no descriptor while that is still being put together;
 * `start` takes the descriptor. If no descriptor comes within PREPARED_LIMIT_MS, what was prepared
 * is removed: the parent's host may be gone.
 */

import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { Undo } from '../common/undo.js';
import { checkShape, type Descriptor, decodeDescriptor } from '../descriptor/index.js';
import { runsOfBitmap } from '../descriptor/zero-map.js';
import type { DhcpService } from '../dhcp/service.js';
import type { Vm } from '../hypervisor/driver.js';
import { fill } from './bases.js';
import type { Host } from './host.js';
import { readdress } from './readdress.js';
import type { PendingReply, PrepareRequest, StartReport, VmRecord } from './records.js';
import { shareOf } from './tickets.js';
import { endVm, freeUid, goLive, greet, makeParts, stillStarting, tapName } from './vms.js';

const PREPARED_LIMIT_MS = 20_000;

/** A clone's guest answered under its new identity; counted from the request to this host. */
export interface Reply {
  parentHost: string;
  vmid: number;
  replyMs: number;
}

interface Prepared {
  record: VmRecord;
  undo: Undo;
  reply: PendingReply | null;
  seed: string;
  parts: { vm: Vm; dhcp: DhcpService };
}

interface PreparedFork {
  request: PrepareRequest;
  startedMs: number;
  clones: { vmid: number; made: Promise<Prepared> }[];
  expiry: NodeJS.Timeout;
}

export class Clones {
  readonly #host: Host;
  readonly #prepared = new Map<string, PreparedFork>();

  constructor(host: Host) {
    this.#host = host;
  }

  /** The host that prepared a fork here, if it is prepared. */
  preparedBy(fork: string): string | undefined {
    return this.#prepared.get(fork)?.request.parent.host;
  }

  /** Starts making the clones ready; returns at once. Each one's own failure shows in `start`. */
  prepare(request: PrepareRequest): void {
    if (this.#prepared.has(request.fork)) {
      throw new SnowflockError('E_EXISTS', `fork ${request.fork} is prepared here already`);
    }
    const host = this.#host;
    const clones = request.clones.map((clone, share) => {
      const made = this.#prepareOne(request, clone, shareOf(request.reservation, share));
      made.catch(() => {});
      return { vmid: clone.vmid, made };
    });
    const expiry = setTimeout(() => {
      host.log.warn({ fork: request.fork }, 'no descriptor came: removing what was prepared');
      void this.abort(request.fork);
    }, PREPARED_LIMIT_MS);
    this.#prepared.set(request.fork, {
      request,
      startedMs: performance.now(),
      clones,
      expiry,
    });
  }

  /** Runs the prepared clones of a fork. Resolves when each has run its first instruction or failed. */
  async start(
    fork: string,
    descriptor: Buffer,
    onReply: (reply: Reply) => void,
  ): Promise<StartReport[]> {
    const prepared = this.#prepared.get(fork);
    if (prepared === undefined) {
      throw new SnowflockError('E_NOT_FOUND', `fork ${fork} is not prepared on this host`);
    }
    let decoded: Descriptor;
    try {
      decoded = decodeDescriptor(descriptor);
      await this.#check(prepared.request, decoded);
    } catch (error) {
      await this.abort(fork);
      throw error;
    }
    if (this.#prepared.get(fork) !== prepared) {
      throw new SnowflockError('E_CLOSED', `fork ${fork} was given up, or is started already`);
    }
    clearTimeout(prepared.expiry);
    this.#prepared.delete(fork);
    let zeroed: Promise<unknown> | undefined;
    const markZero = (): Promise<unknown> => {
      const { call } = this.#host.dataplane;
      const { generation, pages } = decoded.ram;
      zeroed ??= call('replica.zero', {
        generation,
        runs: runsOfBitmap(decoded.zero_map, pages),
      }).then(() => fill(call, this.#host, generation, 'ram'));
      return zeroed;
    };
    return Promise.all(
      prepared.clones.map(({ vmid, made }) =>
        this.#startOne(prepared, vmid, made, decoded, markZero, onReply),
      ),
    );
  }

  /** Removes what was prepared for a fork; nothing happens if there is nothing. */
  async abort(fork: string): Promise<void> {
    const prepared = this.#prepared.get(fork);
    if (prepared === undefined) return;
    clearTimeout(prepared.expiry);
    this.#prepared.delete(fork);
    for (const { made } of prepared.clones) {
      const clone = await made.catch(() => undefined);
      if (clone !== undefined) await this.#remove(clone);
    }
  }

  async #remove(clone: Prepared): Promise<void> {
    clone.record.parent = null; // it never ran: nobody waits for its end
    await endVm(this.#host, clone.record.id, {
      status: null,
      reason: 'failed',
      message: 'the fork was given up',
    });
    await clone.undo.run(this.#host.log);
  }

  async #check(request: PrepareRequest, descriptor: Descriptor): Promise<void> {
    checkShape(descriptor, await this.#host.driver.probe(), {
      ramBytes: request.ram_bytes,
      vcpus: request.vcpus,
    });
    const same =
      descriptor.ram.generation === request.ram.generation &&
      descriptor.disk?.generation === request.disk.generation &&
      descriptor.ram.pages === request.ram.pages &&
      descriptor.identity.family === request.family &&
      descriptor.machine.ram_bytes === request.ram_bytes;
    if (!same) {
      throw new SnowflockError('E_SHAPE', `descriptor is not of fork ${request.fork}`);
    }
  }

  async #prepareOne(
    request: PrepareRequest,
    clone: PrepareRequest['clones'][number],
    reservation: string,
  ): Promise<Prepared> {
    const host = this.#host;
    const undo = new Undo();
    const record: VmRecord = {
      id: clone.vm,
      name: `${request.name}-${clone.vmid}`,
      kind: 'clone',
      image: request.image,
      family: request.family,
      family_host: request.family_host,
      vmid: clone.vmid,
      ram_bytes: request.ram_bytes,
      disk_bytes: request.disk.pages * 4096,
      vcpus: request.vcpus,
      ...(request.addressing === undefined ? {} : { addressing: request.addressing }),
      state: 'starting',
      created_ms: Date.now(),
      token: randomBytes(16).toString('hex'),
      epoch: clone.epoch,
      reservation,
      disk_directory: join(host.config.stateDir, 'disk', clone.vm),
      tap: tapName(clone.vm),
      uid: freeUid(host),
      hypervisor: null,
      shape: request.shape,
      next_vmid: 0,
      base: { ram: request.ram, disk: request.disk, fork: request.fork },
      parent: { host: request.parent.host, vm: request.parent.vm, fork: request.fork },
      disjoint: { ram: [], disk: [] },
      end: null,
    };
    // Checked first: what fails below ends the VM of this id.
    if (host.vms.get(clone.vm) !== undefined) {
      throw new SnowflockError('E_EXISTS', `host ${host.config.name} has a VM ${clone.vm} already`);
    }
    try {
      host.resources.commit(reservation);
      await host.vms.save(record);
      await host.dataplane.call('disk.create', {
        directory: record.disk_directory,
        size_bytes: record.disk_bytes,
        replica: request.disk.generation,
      });
      stillStarting(record);
      const { spec, dhcp, tapFd } = await makeParts(host, record, undo);
      const vm = await host.driver
        .prepareClone(spec, request.shape)
        .finally(() => closeSync(tapFd)); // the VM's process has its own; the tap goes with the last
      undo.add('VM', () => vm.destroy());
      stillStarting(record);
      record.hypervisor = vm.record;
      await host.vms.save(record);
      return { record, undo, reply: clone.reply, seed: clone.seed, parts: { vm, dhcp } };
    } catch (error) {
      await undo.run(host.log);
      record.parent = null;
      // Ended while it was being made: what came after that (replicas, its disk) goes with a second end.
      if (host.vms.get(record.id) === undefined) await host.vms.save(record);
      await endVm(host, record.id, { status: null, reason: 'failed', message: String(error) });
      throw error;
    }
  }

  async #startOne(
    fork: PreparedFork,
    vmid: number,
    made: Promise<Prepared>,
    descriptor: Descriptor,
    markZero: () => Promise<unknown>,
    onReply: (reply: Reply) => void,
  ): Promise<StartReport> {
    const host = this.#host;
    const report: StartReport = { vmid, ok: false, running_ms: null, reply_ms: null, error: null };
    const elapsed = (): number => performance.now() - fork.startedMs;
    let clone: Prepared | undefined;
    try {
      clone = await made;
      const { record, parts } = clone;
      await markZero();
      stillStarting(record);
      const loaded = parts.vm.loadState(descriptor.state);
      const live = await goLive(host, record, parts.vm, parts.dhcp);
      await loaded;
      // The identity waits in the guest channel before the clone's first instruction.
      stillStarting(record);
      const ready = greet(live, clone.seed, clone.reply ?? undefined);
      await parts.vm.run();
      stillStarting(record);
      report.running_ms = elapsed();
      report.ok = true;
      record.state = 'running';
      const settled =
        record.addressing === 'dhcp' ? readdress(host.log, live, fork.request.inherited) : ready;
      settled.catch(() => {}); // looked at below
      await host.vms.save(record);
      void settled.then(
        () => onReply({ parentHost: fork.request.parent.host, vmid, replyMs: elapsed() }),
        (error: unknown) =>
          host.log.error({ vm: record.id, error: String(error) }, 'clone does not answer'),
      );
    } catch (error) {
      const { code, message } = asSnowflockError(error, 'E_CLONE_START');
      report.ok = false;
      report.error = { code, message: `clone ${vmid} on ${host.config.name}: ${message}` };
      host.log.error({ vmid, fork: fork.request.fork, code }, message);
      if (clone !== undefined) await this.#remove(clone);
    }
    return report;
  }
}

/**
 * Parent and clone hosts watch each other. The parent's host renews a lease on its clones; a clone
 * whose lease ran out is an orphan (its parent's host or the way to it is gone) and ends. A clone
 * whose host did not answer for as long is lost, and its parent's join learns so.
 */
import { noteEnd } from './fork.js';
import type { Host } from './host.js';
import { endVm } from './vms.js';

const RENEW_EVERY_MS = 2_000;
/** A clone that its host no longer knows has ended; its own report gets this long to arrive. */
const REPORT_GRACE_MS = 5_000;

export class Leases {
  readonly #host: Host;
  /** Clones here: when their lease was last renewed. */
  readonly #renewed = new Map<string, number>();
  /** Clones elsewhere: when they were last known alive. */
  readonly #seen = new Map<string, number>();
  readonly #timer: NodeJS.Timeout;
  #busy = false;

  constructor(host: Host) {
    this.#host = host;
    this.#timer = setInterval(() => {
      if (this.#busy) return;
      this.#busy = true;
      this.#round()
        .catch((error: unknown) =>
          this.#host.log.error({ error: String(error) }, 'lease round failed'),
        )
        .finally(() => {
          this.#busy = false;
        });
    }, RENEW_EVERY_MS);
  }

  close(): void {
    clearInterval(this.#timer);
  }

  /** Host `from` renews its clones here; tells which of them are alive. */
  renewed(from: string, vms: string[]): string[] {
    const alive = vms.filter((id) => {
      const record = this.#host.vms.get(id);
      return record !== undefined && record.parent?.host === from && record.state !== 'ended';
    });
    const now = Date.now();
    for (const id of alive) this.#renewed.set(id, now);
    return alive;
  }

  async #round(): Promise<void> {
    const host = this.#host;
    const now = Date.now();
    const byHost = new Map<string, { vm: string; fork: string; vmid: number }[]>();
    for (const fork of host.forks.all()) {
      for (const clone of fork.clones) {
        if (clone.end !== null || !clone.ok || clone.host === host.config.name) continue;
        const list = byHost.get(clone.host) ?? [];
        list.push({ vm: clone.vm, fork: fork.id, vmid: clone.vmid });
        byHost.set(clone.host, list);
      }
    }
    await Promise.all([...byHost].map(([name, clones]) => this.#renewAt(name, clones, now)));
    const known = new Set([...byHost.values()].flat().map(({ vm }) => vm));
    for (const vm of this.#seen.keys()) if (!known.has(vm)) this.#seen.delete(vm);
    await this.#endOrphans(now);
  }

  async #renewAt(
    name: string,
    clones: { vm: string; fork: string; vmid: number }[],
    now: number,
  ): Promise<void> {
    const host = this.#host;
    let alive: Set<string> | undefined;
    try {
      const answer = await host.peers.get(name).renew(
        host.config.name,
        clones.map((c) => c.vm),
      );
      alive = new Set(answer);
    } catch {
      // Not reachable now; what that means is decided below, after the lease.
    }
    for (const { vm, fork, vmid } of clones) {
      if (alive?.has(vm) === true) {
        this.#seen.set(vm, now);
        continue;
      }
      const since = this.#seen.get(vm) ?? now;
      this.#seen.set(vm, since);
      const gone = alive !== undefined;
      if (now - since < (gone ? REPORT_GRACE_MS : host.config.leaseMs)) continue;
      const message = gone
        ? `host ${name} no longer knows the clone`
        : `host ${name} did not answer for ${now - since} ms`;
      await noteEnd(host, fork, vmid, { status: null, reason: 'lost', message });
    }
  }

  async #endOrphans(now: number): Promise<void> {
    const host = this.#host;
    const here = new Set<string>();
    for (const record of host.vms.all()) {
      const parentHost = record.parent?.host;
      if (parentHost === undefined || parentHost === host.config.name) continue;
      if (record.state !== 'running') continue;
      here.add(record.id);
      const last = this.#renewed.get(record.id);
      if (last === undefined) {
        this.#renewed.set(record.id, now); // new here, or this daemon is: a full lease from now
      } else if (now - last > host.config.leaseMs) {
        await endVm(host, record.id, {
          status: null,
          reason: 'lost',
          message: `the parent's host ${parentHost} did not renew the lease for ${now - last} ms`,
        });
      }
    }
    for (const id of this.#renewed.keys()) if (!here.has(id)) this.#renewed.delete(id);
  }
}

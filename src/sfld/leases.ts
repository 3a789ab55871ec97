/**
 * Clones on other hosts, seen from their parent's: it renews a lease on them. A clone whose host did
 * not answer for as long as the lease is lost, and its parent's join learns so. The clones' side is
 * in orphans.ts.
 */
import { noteEnd } from './fork.js';
import type { Host } from './host.js';

const RENEW_EVERY_MS = 2_000;
/** A clone that its host no longer knows has ended; its own report gets this long to arrive. */
const REPORT_GRACE_MS = 5_000;

interface RemoteClone {
  vm: string;
  fork: string;
  vmid: number;
}

export class Leases {
  readonly #host: Host;
  /** Clones elsewhere: when they were last known alive. */
  readonly #seen = new Map<string, number>();
  /** Hosts being asked: one that is slow or dead does not delay the others' renewals. */
  readonly #asking = new Set<string>();
  readonly #timer: NodeJS.Timeout;

  constructor(host: Host) {
    this.#host = host;
    this.#timer = setInterval(
      () => this.#round(),
      Math.min(RENEW_EVERY_MS, host.config.leaseMs / 4),
    );
  }

  close(): void {
    clearInterval(this.#timer);
  }

  #round(): void {
    const host = this.#host;
    const byHost = new Map<string, RemoteClone[]>();
    for (const fork of host.forks.all()) {
      for (const clone of fork.clones) {
        if (clone.end !== null || !clone.ok || clone.host === host.config.name) continue;
        const list = byHost.get(clone.host) ?? [];
        list.push({ vm: clone.vm, fork: fork.id, vmid: clone.vmid });
        byHost.set(clone.host, list);
      }
    }
    const known = new Set([...byHost.values()].flat().map(({ vm }) => vm));
    for (const vm of this.#seen.keys()) if (!known.has(vm)) this.#seen.delete(vm);
    for (const [name, clones] of byHost) {
      if (this.#asking.has(name)) continue;
      this.#asking.add(name);
      this.#renewAt(name, clones, Date.now())
        .catch((error: unknown) =>
          host.log.error({ host: name, error: String(error) }, 'lease round failed'),
        )
        .finally(() => this.#asking.delete(name));
    }
  }

  async #renewAt(name: string, clones: RemoteClone[], now: number): Promise<void> {
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
}

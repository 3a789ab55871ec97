/**
 * Clones whose parent is on another host, seen from where they run.
 *
 * States of such a clone:
 *   live      its parent's host renews its lease
 *   suspect   no renewal for SUSPECT_MS at most: is what it needs held by hosts that live?
 *   orphan    no renewal for lease_ms; it lives on as long as the answer to that is yes
 *   ended     the answer was no for lease_ms, or its parent's host says that it gave the clone up
 * live <- suspect, orphan when the parent's host is back and still counts the clone as alive.
 *
 * Invariants:
 *  - A clone that its parent was told to be lost does not go on once the hosts hear of each other: a
 *    join that named it ended was the truth. So nobody owns a clone twice.
 *  - What hosts say about what they hold decides only how long a clone waits and for whom. Each page
 *    is authentic or absent (mcdist), so a wrong answer costs a clone, never a byte.
 *  - Each request has its limit; a host that does not answer holds nothing.
 *
 * The data plane finds other servers of a generation by itself, by their announces (docs/mcdist.md).
 * It is told of a server from here, too, where it cannot know: it has just been started, or hears no
 * multicast. Of one that holds all that is needed, if there is one; else of all that hold some.
 *
 * Left out: a parent that moves. A clone without its parent's host cannot be joined, and cannot fork
 * if that host gives out its family's vmids.
 */
import { asSnowflockError } from '../common/errors.js';
import { fill, isRemote, KINDS, type Kind } from './bases.js';
import { type Coverage, coverage, type Holding } from './holdings.js';
import type { Host } from './host.js';
import type { VmRecord } from './records.js';
import { endVm } from './vms.js';

const ROUND_MS = 2_000;
const SUSPECT_MS = 5_000;

/** What is known of the source of a base. */
export interface SourceState {
  /** `lost`: its host has not been heard of for too long. `ended`: it has no such parent any more. */
  state: 'live' | 'lost' | 'ended';
  /** When its host was heard last; null while it lives. Unix time. */
  heard_ms: number | null;
  /** Of RAM and disk, as of the last look; empty while the source lives. */
  coverage: Coverage[];
}

type Based = VmRecord & { base: NonNullable<VmRecord['base']> };

export class Orphans {
  readonly #host: Host;
  /** Clones here: when they were last known to be wanted. */
  readonly #renewed = new Map<string, number>();
  /** ... when what they need was last held by living hosts. */
  readonly #covered = new Map<string, number>();
  /** By RAM generation: clones of one base share it. */
  readonly #sources = new Map<string, SourceState>();
  /** By generation: server the data plane was told of instead of the source, and in which life. */
  readonly #told = new Map<string, string>();
  readonly #timer: NodeJS.Timeout;
  #busy = false;

  constructor(host: Host) {
    this.#host = host;
    this.#timer = setInterval(
      () => {
        if (this.#busy) return;
        this.#busy = true;
        this.#round()
          .catch((error: unknown) =>
            this.#host.log.error({ error: String(error) }, 'look at orphans failed'),
          )
          .finally(() => {
            this.#busy = false;
          });
      },
      Math.min(ROUND_MS, this.#host.config.leaseMs / 4),
    );
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

  source(ram_generation: string): SourceState {
    return this.#sources.get(ram_generation) ?? { state: 'live', heard_ms: null, coverage: [] };
  }

  async #round(): Promise<void> {
    const host = this.#host;
    const now = Date.now();
    const suspects = new Map<string, Based[]>();
    const here = new Set<string>();
    const bases = new Map<string, Based['base']>();
    for (const record of host.vms.all()) {
      if (record.parent === null || record.state !== 'running' || !isRemote(host, record)) continue;
      here.add(record.id);
      bases.set(record.base.ram.generation, record.base);
      const last = this.#renewed.get(record.id);
      // New here, or this daemon is: a full lease from now.
      if (last === undefined) this.#renewed.set(record.id, now);
      else if (now - last > Math.min(SUSPECT_MS, host.config.leaseMs / 2)) {
        const group = suspects.get(record.base.ram.generation) ?? [];
        group.push(record);
        suspects.set(record.base.ram.generation, group);
      }
    }
    for (const map of [this.#renewed, this.#covered]) {
      for (const id of map.keys()) if (!here.has(id)) map.delete(id);
    }
    for (const generation of this.#sources.keys()) {
      if (suspects.has(generation)) continue;
      this.#sources.delete(generation);
      const base = bases.get(generation);
      if (base === undefined) continue; // no clone stands on it any more
      host.log.info({ generation }, 'the source is back');
      // Also if no other server was found: what gave up is tried again.
      for (const kind of KINDS) {
        if (!this.#told.has(base[kind].generation)) this.#told.set(base[kind].generation, '');
      }
    }
    await Promise.all([...suspects.values()].map((clones) => this.#attend(clones, now)));
    await this.#backToSource(suspects);
  }

  /** Clones of one base whose parent's host is silent. */
  async #attend(clones: Based[], now: number): Promise<void> {
    const host = this.#host;
    const [first] = clones;
    if (first?.parent === undefined || first.parent === null) return;
    const { base, parent } = first;
    const [standings, found] = await Promise.all([
      this.#ask(parent.host, clones),
      Promise.all(KINDS.map((kind) => this.#look(first, kind))),
    ]);
    const unheld = found.reduce((sum, { unheld_pages }) => sum + unheld_pages, 0);
    const heard = Math.max(...clones.map((one) => this.#renewed.get(one.id) ?? now));
    const before = this.#sources.get(base.ram.generation);
    const gone = [...standings.values()].some((standing) => standing === 'unknown');
    this.#sources.set(base.ram.generation, {
      state: gone ? 'ended' : 'lost',
      heard_ms: heard,
      coverage: found,
    });
    if (before === undefined) {
      host.log.warn(
        { generation: base.ram.generation, host: parent.host, unheld_pages: unheld },
        'the source is silent; its clones here live on with what living hosts hold',
      );
    }
    for (const clone of clones) {
      const standing = standings.get(clone.id);
      if (standing === 'alive') this.#renewed.set(clone.id, now);
      if (unheld === 0) this.#covered.set(clone.id, now);
      const last = Math.max(this.#renewed.get(clone.id) ?? 0, this.#covered.get(clone.id) ?? 0);
      const message =
        standing === 'ended'
          ? `the parent's host ${parent.host} had given it up: they did not hear of each other`
          : now - last > host.config.leaseMs
            ? `the parent's host ${parent.host} did not renew the lease for ${now - last} ms, and ${unheld} pages of its generations are on no other host`
            : undefined;
      if (message !== undefined) {
        host.log.error({ vm: clone.id, code: 'E_SOURCE_LOST' }, message);
        await endVm(host, clone.id, { status: null, reason: 'lost', message });
      }
    }
  }

  /** What the parent's host says of the clones, if it can be asked. */
  async #ask(parentHost: string, clones: Based[]): Promise<Map<string, Standing>> {
    try {
      const standings = await this.#host.peers.get(parentHost).standings(
        this.#host.config.name,
        clones.map(({ id, parent }) => ({
          vm: id,
          fork: parent?.fork ?? '',
          parent: parent?.vm ?? '',
        })),
      );
      return new Map(clones.map((clone, i) => [clone.id, standings[i] ?? 'unknown']));
    } catch {
      return new Map(); // silent, as it was
    }
  }

  async #look(record: Based, kind: Kind): Promise<Coverage> {
    const host = this.#host;
    const { generation, pages } = record.base[kind];
    const { needed } = await host.dataplane.call('replica.missing', { generation });
    if (needed !== null && needed.length === 0) return coverage(kind, generation, pages, [], []);
    const answers = await Promise.all(
      host.peers.all().map(async (port): Promise<{ host: string; holding: Holding }[]> => {
        if (port.name === host.config.name || port.name === record.parent?.host) return [];
        const found = await port.holdings([generation]).catch(() => []);
        return found
          .filter((one) => one.generation === generation)
          .map((holding) => ({ host: port.name, holding }));
      }),
    );
    const found = coverage(kind, generation, pages, needed, answers.flat());
    const holders = found.held_by.flatMap(({ host: name, port, all }) => {
      const address = host.config.hosts.find((one) => one.name === name)?.address;
      return address === undefined ? [] : [{ address, port, all }];
    });
    const full = holders.find(({ all }) => all);
    // In the order of the hosts' addresses, so that the same ones are not told of twice.
    holders.sort((a, b) => (a.address < b.address ? -1 : 1));
    await this.#useServers(generation, kind, full === undefined ? holders : [full]);
    return found;
  }

  /** The source lives again: what came from elsewhere comes from there, as at first. */
  async #backToSource(suspects: Map<string, Based[]>): Promise<void> {
    const host = this.#host;
    const told = new Set(this.#told.keys());
    for (const record of host.vms.all()) {
      if (record.state !== 'running' || !isRemote(host, record)) continue;
      if (suspects.has(record.base.ram.generation)) {
        for (const kind of KINDS) told.delete(record.base[kind].generation);
        continue;
      }
      for (const kind of KINDS) {
        const { generation, source } = record.base[kind];
        if (!told.delete(generation)) continue;
        await this.#useServers(generation, kind, [source]);
        this.#told.delete(generation);
      }
    }
    for (const generation of told) this.#told.delete(generation); // no clone stands on it any more
  }

  async #useServers(
    generation: string,
    kind: Kind,
    servers: { address: string; port: number }[],
  ): Promise<void> {
    const host = this.#host;
    const [first, ...rest] = servers;
    if (first === undefined) return;
    const { call, restarts } = host.dataplane;
    const { address, port } = first;
    const others = rest.map((one) => ({ address: one.address, port: one.port }));
    const names = servers.map((one) => `${one.address}:${one.port}`);
    const told = `${names.join()}/${restarts}`;
    if (this.#told.get(generation) === told) return;
    try {
      await call('replica.server', { generation, address, port, others });
      await fill(call, host, generation, kind);
      this.#told.set(generation, told);
      host.log.info({ generation, servers: names }, 'other servers of a generation');
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (code !== 'E_NOT_FOUND') host.log.warn({ generation, code }, message); // else: just closed
    }
  }
}

/** What a parent's host says of a clone: `unknown` if it has no such parent any more. */
export type Standing = 'alive' | 'ended' | 'unknown';

/** A clone as its own host knows it. */
export interface CloneName {
  vm: string;
  fork: string;
  parent: string;
}

/** Called on the parent's host: how it counts clones of `from`. */
export function standings(host: Host, from: string, clones: CloneName[]): Standing[] {
  return clones.map(({ vm, fork: id, parent }) => {
    const fork = host.forks.get(id);
    // Only forks that are over are forgotten while their parent lives.
    if (fork === undefined) return host.vms.get(parent) === undefined ? 'unknown' : 'ended';
    const clone = fork.clones.find((one) => one.vm === vm && one.host === from);
    return clone === undefined || clone.end !== null ? 'ended' : 'alive';
  });
}

/**
 * What one host has given to VMs and what it has left.
 *
 * An entry is *reserved* (a ticket stands for it; it lapses at its time) or *committed* (a VM
 * runs on it; it stays until released). Invariant: no reservation is made that would put the sum of
 * both over the limits. The sum can exceed them only when the limits were lowered while VMs ran;
 * then nothing is granted until enough was released.
 *
 * Times are wall-clock milliseconds, so that they mean the same after a restart. The clock is
 * passed in; nothing here does I/O or has timers: lapsed entries go at the next call.
 */
import Type, { type Static } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';

/** What one VM takes. */
export interface Need {
  readonly memoryBytes: number;
  readonly vcpus: number;
}

/** What a host may give in all. */
export interface Limits {
  readonly cpus: number;
  readonly memoryBytes: number;
  readonly overcommit: { readonly cpus: number; readonly memory: number };
}

/** What is left. Never negative. */
export interface Free {
  readonly memoryBytes: number;
  readonly vcpus: number;
}

const Entry = Type.Object({
  id: Type.String({ minLength: 1, maxLength: 128 }),
  memory_bytes: Type.Integer({ minimum: 0 }),
  vcpus: Type.Integer({ minimum: 0 }),
  /** Reserved until then; absent: committed. */
  expires_ms: Type.Optional(Type.Number()),
});

/** The schema of what `snapshot()` gives and `restore()` takes. */
export const ResourcesSnapshot = Type.Object({
  version: Type.Literal(1),
  entries: Type.Array(Entry),
});
export type ResourcesSnapshot = Static<typeof ResourcesSnapshot>;

interface Held extends Need {
  readonly expiresMs: number | undefined;
}

/** Reservations and VMs one host keeps account of at most. */
export const ENTRIES_MAX = 65_536;

export class Resources {
  readonly #memoryLimitBytes: number;
  readonly #vcpuLimit: number;
  readonly #now: () => number;
  readonly #entries = new Map<string, Held>();

  constructor(limits: Limits, now: () => number = Date.now) {
    this.#memoryLimitBytes = Math.floor(limits.memoryBytes * limits.overcommit.memory);
    this.#vcpuLimit = Math.floor(limits.cpus * limits.overcommit.cpus);
    this.#now = now;
  }

  /**
   * Sets room aside until it is committed, released or `ttlMs` have passed.
   * @throws {SnowflockError} `E_CAPACITY` (says what is missing), `E_EXISTS`, `E_ARGUMENT`.
   */
  reserve(id: string, need: Need, ttlMs: number): void {
    checkNeed(id, need);
    if (!(ttlMs > 0)) throw new SnowflockError('E_ARGUMENT', `${id}: reserved for ${ttlMs} ms`);
    const free = this.free();
    if (this.#entries.has(id)) throw new SnowflockError('E_EXISTS', `${id} is reserved already`);
    if (this.#entries.size >= ENTRIES_MAX) {
      throw new SnowflockError('E_CAPACITY', `${ENTRIES_MAX} reservations are the limit`);
    }
    if (need.memoryBytes > free.memoryBytes || need.vcpus > free.vcpus) {
      throw new SnowflockError(
        'E_CAPACITY',
        `${id} needs ${mib(need.memoryBytes)} MiB and ${need.vcpus} vCPUs, ` +
          `${mib(free.memoryBytes)} MiB and ${free.vcpus} are free`,
      );
    }
    this.#entries.set(id, { ...pick(need), expiresMs: this.#now() + ttlMs });
  }

  /**
   * The VM runs: its room no longer lapses. Repeatable.
   * @throws {SnowflockError} `E_NOT_FOUND` when there is no such reservation (any more).
   */
  commit(id: string): void {
    this.expire();
    const entry = this.#entries.get(id);
    if (!entry) throw new SnowflockError('E_NOT_FOUND', `${id} is not reserved (any more)`);
    this.#entries.set(id, { ...entry, expiresMs: undefined });
  }

  /** Gives room back. @returns false when there was none. */
  release(id: string): boolean {
    return this.#entries.delete(id);
  }

  /** Drops reservations whose time is over. @returns their ids. */
  expire(): string[] {
    const now = this.#now();
    const lapsed: string[] = [];
    for (const [id, entry] of this.#entries) {
      if (entry.expiresMs !== undefined && entry.expiresMs <= now) lapsed.push(id);
    }
    for (const id of lapsed) this.#entries.delete(id);
    return lapsed;
  }

  has(id: string): boolean {
    this.expire();
    return this.#entries.has(id);
  }

  /** Reserved and committed together. */
  used(): Free {
    this.expire();
    let memoryBytes = 0;
    let vcpus = 0;
    for (const entry of this.#entries.values()) {
      memoryBytes += entry.memoryBytes;
      vcpus += entry.vcpus;
    }
    return { memoryBytes, vcpus };
  }

  free(): Free {
    const used = this.used();
    return {
      memoryBytes: Math.max(0, this.#memoryLimitBytes - used.memoryBytes),
      vcpus: Math.max(0, this.#vcpuLimit - used.vcpus),
    };
  }

  snapshot(): ResourcesSnapshot {
    this.expire();
    return {
      version: 1,
      entries: [...this.#entries].map(([id, entry]) => ({
        id,
        memory_bytes: entry.memoryBytes,
        vcpus: entry.vcpus,
        ...(entry.expiresMs === undefined ? {} : { expires_ms: entry.expiresMs }),
      })),
    };
  }

  /**
   * Replaces all entries by those of a snapshot. VMs that run are kept account of even if they
   * exceed lowered limits.
   * @throws {SnowflockError} `E_CORRUPT`; the present entries are kept.
   */
  restore(snapshot: unknown): void {
    if (!Value.Check(ResourcesSnapshot, snapshot)) {
      throw new SnowflockError('E_CORRUPT', 'the record of reservations is not valid');
    }
    const ids = new Set(snapshot.entries.map((entry) => entry.id));
    if (ids.size !== snapshot.entries.length || ids.size > ENTRIES_MAX) {
      throw new SnowflockError('E_CORRUPT', 'the record of reservations names one twice');
    }
    this.#entries.clear();
    for (const entry of snapshot.entries) {
      this.#entries.set(entry.id, {
        memoryBytes: entry.memory_bytes,
        vcpus: entry.vcpus,
        expiresMs: entry.expires_ms,
      });
    }
  }
}

function checkNeed(id: string, need: Need): void {
  const whole = (n: number): boolean => Number.isSafeInteger(n) && n > 0;
  if (!whole(need.memoryBytes) || !whole(need.vcpus)) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${id}: ${need.memoryBytes} bytes and ${need.vcpus} vCPUs cannot be reserved`,
    );
  }
  if (id.length === 0 || id.length > 128) {
    throw new SnowflockError('E_ARGUMENT', 'a reservation is called by 1 to 128 characters');
  }
}

const pick = ({ memoryBytes, vcpus }: Need): Need => ({ memoryBytes, vcpus });
const mib = (bytes: number): number => Math.floor(bytes / 2 ** 20);

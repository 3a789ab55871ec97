// What a disk was told and what it acknowledged: which contents a page may have, at any cut.
//
// A page has a history of versions. No two requests that change one page are under way at once, so
// it is a line. Each claim says: from this answer on, this version of the page, or a later one, is
// durable. FLUSH claims what was acknowledged before it was sent, on any connection (NBD proto.md,
// "Ordering of messages and writes"); FUA claims what it wrote.
//
// A generation holds, of each page, a version between the newest one acknowledged when the fork was
// asked for and the newest one begun when it was answered; and the same one at every cut.
import { PAGE } from './file-system.js';
import type { Answer, Answers } from './log.js';

type Floor = Map<number, number>; // page -> version

interface Claim {
  answer: Answer;
  floor: Floor;
}

export interface Generation {
  id: string;
  oldest: Uint32Array;
  newest: Uint32Array | undefined; // undefined: the fork was never answered
  /** Answers after which it must exist. */
  durable: Answer[];
  /** Length of the log when its removal was asked for. */
  dropSent?: number;
  dropped?: Answer;
  /** What it held when it was first seen. */
  seen?: Buffer;
}

/** A request under way: the versions it makes. */
export type Change = Floor;

export class Ledger {
  readonly pages: number;
  readonly generations: Generation[] = [];
  readonly #versions: Buffer[][];
  readonly #acknowledged: Uint32Array;
  readonly #claims: Claim[] = [];
  readonly #busy = new Set<number>();

  /** `image`: what the disk holds now, all durable. */
  constructor(image: Buffer) {
    this.pages = image.length / PAGE;
    this.#versions = Array.from({ length: this.pages }, (_, page) => [
      Buffer.from(image.subarray(page * PAGE, (page + 1) * PAGE)),
    ]);
    this.#acknowledged = new Uint32Array(this.pages);
  }

  #of(page: number): Buffer[] {
    const list = this.#versions[page];
    if (list === undefined) throw new Error(`no page ${page}`);
    return list;
  }

  free(from: number, to: number): boolean {
    for (let page = from; page < to; page++) if (this.#busy.has(page)) return false;
    return true;
  }

  /** Nobody changes these pages until `release`. */
  hold(from: number, to: number): void {
    for (let page = from; page < to; page++) this.#busy.add(page);
  }

  release(from: number, to: number): void {
    for (let page = from; page < to; page++) this.#busy.delete(page);
  }

  /** The request writes `data` (null: zeros) at `offset`; `whole`: only pages wholly covered. */
  begin(offset: number, length: number, data: Buffer | null, whole = false): Change {
    const change: Change = new Map();
    const end = offset + length;
    const first = whole ? Math.ceil(offset / PAGE) : Math.floor(offset / PAGE);
    const last = whole ? Math.floor(end / PAGE) : Math.ceil(end / PAGE);
    for (let page = first; page < last; page++) {
      const from = Math.max(offset, page * PAGE);
      const to = Math.min(end, (page + 1) * PAGE);
      const list = this.#of(page);
      const next = Buffer.from(list.at(-1) ?? Buffer.alloc(PAGE));
      const within = from - page * PAGE;
      if (data === null) next.fill(0, within, within + to - from);
      else data.copy(next, within, from - offset, to - offset);
      list.push(next);
      this.#busy.add(page);
      change.set(page, list.length - 1);
    }
    return change;
  }

  acknowledge(change: Change, durable?: Answer): void {
    for (const [page, version] of change) {
      this.#acknowledged[page] = version;
      this.#busy.delete(page);
    }
    if (durable !== undefined) this.#claims.push({ answer: durable, floor: change });
  }

  /** All that is acknowledged now; for `claim` once the request sent now is answered. */
  acknowledged(): Floor {
    return new Map(this.#acknowledged.entries());
  }

  claim(floor: Floor, answer: Answer): void {
    this.#claims.push({ answer, floor });
  }

  /** The newest content of `[offset, offset + length)`, of which no page is being changed. */
  read(offset: number, length: number): Buffer {
    const first = Math.floor(offset / PAGE);
    const parts: Buffer[] = [];
    for (let page = first; page * PAGE < offset + length; page++) {
      parts.push(this.#of(page).at(-1) ?? Buffer.alloc(PAGE));
    }
    const from = offset - first * PAGE;
    return Buffer.concat(parts).subarray(from, from + length);
  }

  /**
   * After a kill of the server alone: each page is as acknowledged, or as a request under way would
   * have left it, and that is its newest version from now on. Returns what is wrong.
   */
  resolve(image: Buffer): string[] {
    const wrong: string[] = [];
    this.#busy.clear();
    for (let page = 0; page < this.pages; page++) {
      const list = this.#of(page);
      const now = image.subarray(page * PAGE, (page + 1) * PAGE);
      const oldest = this.#acknowledged[page] ?? 0;
      if (!list.slice(oldest).some((version) => version.equals(now))) {
        wrong.push(`page ${page} is not as acknowledged before the kill`);
      }
      if (list.at(-1)?.equals(now) !== true) list.push(Buffer.from(now));
      this.#acknowledged[page] = list.length - 1;
    }
    return wrong;
  }

  /** A generation that is there, durable, when the ledger begins. */
  adopt(id: string, held: Buffer): void {
    const generation = this.fork(id);
    this.forked(generation);
    generation.seen = held;
    generation.durable.push('always');
  }

  fork(id: string): Generation {
    const oldest = Uint32Array.from(this.#acknowledged);
    const generation: Generation = { id, oldest, newest: undefined, durable: [] };
    this.generations.push(generation);
    return generation;
  }

  forked(generation: Generation): void {
    generation.newest = Uint32Array.from(this.#versions, (list) => list.length - 1);
  }

  /** What a disk opened after a power cut at k got wrong. `contents`: of each generation found. */
  check(
    k: number,
    answers: Answers,
    startsAt: (bytes: number) => number,
    image: Buffer,
    contents: Map<string, Buffer>,
  ): string[] {
    const wrong: string[] = [];
    const floor = new Uint32Array(this.pages);
    for (const claim of this.#claims) {
      if (answers.cut(claim.answer) > k) continue;
      for (const [page, version] of claim.floor) {
        floor[page] = Math.max(floor[page] ?? 0, version);
      }
    }
    for (let page = 0; page < this.pages; page++) {
      const now = image.subarray(page * PAGE, (page + 1) * PAGE);
      const list = this.#of(page);
      const found = list.findLastIndex((version) => version.equals(now));
      if (found < (floor[page] ?? 0)) {
        const what = found < 0 ? 'something never written' : `version ${found}`;
        wrong.push(`page ${page} holds ${what}, durable is ${floor[page]} of ${list.length - 1}`);
      }
    }
    const order = this.generations.map((generation) => generation.id);
    const found = [...contents.keys()];
    const sorted = order.filter((id) => contents.has(id));
    if (sorted.join() !== found.join()) wrong.push(`generations ${found} are not of ${order}`);
    for (const generation of this.generations) {
      const now = contents.get(generation.id);
      const name = `generation ${order.indexOf(generation.id)}`;
      if (now !== undefined) {
        const { dropped } = generation;
        if (dropped !== undefined && answers.cut(dropped) <= k) wrong.push(`${name} is back`);
        wrong.push(...this.#contents(generation, now).map((text) => `${name}: ${text}`));
        continue;
      }
      const dropSent = generation.dropSent;
      if (dropSent !== undefined && startsAt(dropSent) < k) continue;
      if (generation.durable.some((answer) => answers.cut(answer) <= k)) {
        wrong.push(`${name} is missing`);
      }
    }
    return wrong;
  }

  #contents(generation: Generation, now: Buffer): string[] {
    if (generation.seen !== undefined) {
      return generation.seen.equals(now) ? [] : ['holds something else than at another cut'];
    }
    const wrong: string[] = [];
    for (let page = 0; page < this.pages; page++) {
      const to = generation.newest?.[page] ?? Number.POSITIVE_INFINITY;
      const may = this.#of(page).slice(generation.oldest[page], to + 1);
      const data = now.subarray(page * PAGE, (page + 1) * PAGE);
      if (!may.some((version) => version.equals(data))) wrong.push(`page ${page} is wrong`);
    }
    if (wrong.length === 0) generation.seen = Buffer.from(now);
    return wrong;
  }
}

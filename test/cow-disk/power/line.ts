// What was written to a disk and what was acknowledged: which contents a page may have, at any cut.
//
// A page has a history of versions. No two requests that change one page are under way at once, so
// it is a line. Each claim says: from this answer on, this version of the page, or a later one, is
// durable. FLUSH claims what was acknowledged before it was sent, on any connection (NBD proto.md,
// "Ordering of messages and writes"); FUA claims what it wrote.
import { PAGE } from './file-system.js';
import type { Answer, Answers } from './log.js';

type Floor = Map<number, number>; // page -> version

interface Claim {
  answer: Answer;
  floor: Floor;
}

/** A request under way: the versions it makes. */
export type Change = Floor;

export class Line {
  readonly pages: number;
  readonly #versions: Buffer[][];
  readonly #acknowledged: Uint32Array;
  readonly #claims: Claim[] = [];
  readonly #busy = new Set<number>();

  /** `image`: what the disk holds at first. */
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

  /** Of each page the newest version that was acknowledged, and the newest there is. */
  oldest(): Uint32Array {
    return Uint32Array.from(this.#acknowledged);
  }

  newest(): Uint32Array {
    return Uint32Array.from(this.#versions, (list) => list.length - 1);
  }

  /** What is wrong if `image` is to hold of each page a version in [oldest, newest]. */
  outside(image: Buffer, oldest: Uint32Array, newest: Uint32Array | undefined): string[] {
    const wrong: string[] = [];
    for (let page = 0; page < this.pages; page++) {
      const to = newest?.[page] ?? Number.POSITIVE_INFINITY;
      const may = this.#of(page).slice(oldest[page], to + 1);
      const data = image.subarray(page * PAGE, (page + 1) * PAGE);
      if (!may.some((version) => version.equals(data))) wrong.push(`page ${page} is wrong`);
    }
    return wrong;
  }

  /** True if something of it was claimed to be durable by cut k. */
  claimedBy(k: number, answers: Answers): boolean {
    return this.#claims.some((claim) => answers.cut(claim.answer) <= k);
  }

  /** What is wrong if `image` is what is left of it after a power cut at k. */
  check(k: number, answers: Answers, image: Buffer): string[] {
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
    return wrong;
  }
}

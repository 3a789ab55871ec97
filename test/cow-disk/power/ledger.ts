// What a store was told and what it acknowledged: which disks and generations there may be at any
// cut, and what they hold.
//
// A disk's life is a row of stretches. In one it is written page by page (line.ts); a rollback or a
// commit begins another, with another content of all pages at once. So after a cut it holds what is
// left of one stretch: not one of before the last that was acknowledged, and not two mixed.
//
// A generation holds, of each page, a version between the newest one acknowledged when the fork was
// asked for and the newest one begun when it was answered; and the same one at every cut.
//
// What was answered is durable: a new disk, a removal, a rollback, a commit, all that open() lists.
// A fork is when a flush, a prepare or a close after it was answered.
import { Line } from './line.js';
import type { Answer, Answers } from './log.js';

/** A change of what there is: under way, then answered. */
interface Step {
  /** Length of the log when it was asked for; -1: before there was one. */
  sent: number;
  done?: Answer;
}

interface Stretch extends Step {
  /** What it begins with, and, once that was seen, all else. */
  begins: Buffer | Generation;
  line?: Line;
}

export interface DiskRecord {
  name: string;
  /** undefined: it is not known, the server died meanwhile. */
  present: boolean | undefined;
  stretches: Stretch[];
  created: Step;
  /** Answers after which it must exist. */
  durable: Answer[];
  removed?: Step;
  /** While that generation is what it lies on. */
  clonedFrom?: Generation | undefined;
}

export interface Generation {
  id: string;
  disk: DiskRecord;
  present: boolean | undefined;
  line: Line | undefined;
  oldest: Uint32Array;
  newest: Uint32Array | undefined; // undefined: the fork was never answered
  /** Answers after which it must exist. */
  durable: Answer[];
  removed?: Step;
  /** What it held when it was first seen. */
  seen?: Buffer;
}

/** All that a store holds. */
export interface Contents {
  disks: Map<string, Buffer>;
  generations: Map<string, { disk: string; image: Buffer }>;
}

/** The same with what only the ledger knows. */
export interface Adopted extends Contents {
  /** Clones, and the generations that they lie on. */
  clones: Map<string, string>;
}

export class Ledger {
  readonly disks = new Map<string, DiskRecord>();
  readonly generations = new Map<string, Generation>();

  /** What there is, durable, when the ledger begins. */
  adopt({ disks, generations, clones }: Adopted): void {
    for (const [name, image] of disks) this.create(name, image, -1, 'always');
    for (const [id, { disk, image }] of generations) {
      const none = new Uint32Array(0);
      const record = this.disks.get(disk);
      if (record === undefined) throw new Error(`generation ${id} is of no disk`);
      const rest = { present: true, line: undefined, oldest: none, newest: none, seen: image };
      this.generations.set(id, { id, disk: record, durable: ['always'], ...rest });
    }
    for (const [name, id] of clones) {
      const record = this.disks.get(name);
      if (record !== undefined) record.clonedFrom = this.generations.get(id);
    }
  }

  create(name: string, begins: Buffer | Generation, sent: number, done?: Answer): DiskRecord {
    const step = done === undefined ? { sent } : { sent, done };
    const record: DiskRecord = {
      name,
      present: done === undefined ? undefined : true,
      stretches: [{ begins, ...step }],
      created: step,
      durable: done === undefined ? [] : [done],
      ...('id' in begins ? { clonedFrom: begins } : {}),
    };
    this.disks.set(name, record);
    return record;
  }

  /** The disk has another content from now on. */
  replace(disk: DiskRecord, begins: Buffer | Generation, sent: number): Step {
    const step: Stretch = { begins, sent };
    disk.stretches.push(step);
    return step;
  }

  /** The disk goes, with its generations. */
  remove(disk: DiskRecord, sent: number): Step {
    const step: Step = { sent };
    disk.removed = step;
    disk.present = undefined;
    for (const generation of this.of(disk)) {
      generation.removed = step;
      generation.present = undefined;
    }
    return step;
  }

  /** A commit of `clone` was refused: nothing has changed. */
  refused(clone: DiskRecord, origin: DiskRecord): void {
    origin.stretches.pop();
    const step = clone.removed;
    for (const what of [clone, ...this.generations.values()]) {
      if (what.removed === undefined || what.removed !== step) continue;
      delete what.removed;
      what.present = true;
    }
  }

  /** The disk's generations that are there. */
  of(disk: DiskRecord): Generation[] {
    return [...this.generations.values()].filter((each) => each.disk === disk && each.present);
  }

  fork(id: string, disk: DiskRecord): Generation {
    const line = lineOf(disk);
    const generation: Generation = {
      id,
      disk,
      present: undefined,
      line,
      oldest: line.oldest(),
      newest: undefined,
      durable: [],
    };
    this.generations.set(id, generation);
    return generation;
  }

  /** What a store that was just opened lists; what was under way is decided by that. */
  opened(disks: string[], generations: string[], answer: Answer): string[] {
    const wrong: string[] = [];
    const look = (what: DiskRecord | Generation, label: string, here: boolean) => {
      if (what.present === true && !here) wrong.push(`${label} is missing when opened again`);
      if (what.present === false && here) wrong.push(`${label} is back when opened again`);
      if (what.present === undefined && here) delete what.removed;
      if (!here && what.removed !== undefined) what.removed.done ??= answer;
      what.present = here;
      if (here) what.durable.push(answer);
    };
    for (const [name, disk] of this.disks) look(disk, `disk ${name}`, disks.includes(name));
    for (const [id, generation] of this.generations) {
      look(generation, `generation ${id}`, generations.includes(id));
      generation.newest ??= generation.line?.newest();
    }
    for (const name of disks) if (!this.disks.has(name)) wrong.push(`disk ${name} is unknown`);
    for (const id of generations) {
      if (!this.generations.has(id)) wrong.push(`generation ${id} is unknown`);
    }
    return wrong;
  }

  /** What a disk holds after it was opened, with nothing under way. */
  observed(disk: DiskRecord, image: Buffer): string[] {
    const last = disk.stretches.at(-1);
    if (last === undefined) throw new Error('a disk without a stretch');
    if (last.line !== undefined) return last.line.resolve(image);
    const wrong = this.begins(last.begins, image);
    if (wrong.length === 0) {
      last.line = new Line(image);
      return [];
    }
    if (last.done !== undefined || disk.stretches.length === 1) return wrong;
    disk.stretches.pop(); // it was never done
    return this.observed(disk, image);
  }

  begins(what: Buffer | Generation, image: Buffer): string[] {
    if ('id' in what) return this.holds(what, image);
    return what.equals(image) ? [] : ['it holds something else than it was given'];
  }

  /** See Adopted. A clone that still is one was one at every cut. */
  clones(): Map<string, string> {
    const found = new Map<string, string>();
    for (const [name, { clonedFrom }] of this.disks) {
      if (clonedFrom !== undefined) found.set(name, clonedFrom.id);
    }
    return found;
  }

  /** What is wrong if the generation holds `image`. */
  holds(generation: Generation, image: Buffer): string[] {
    const { seen, line, oldest, newest } = generation;
    if (seen !== undefined) {
      return seen.equals(image) ? [] : ['holds something else than it did at another time'];
    }
    const wrong = line?.outside(image, oldest, newest) ?? [];
    if (wrong.length === 0) generation.seen = Buffer.from(image);
    return wrong;
  }

  /** What a store opened after a power cut at k got wrong. */
  check(
    k: number,
    answers: Answers,
    startsAt: (bytes: number) => number,
    { disks, generations }: Contents,
  ): string[] {
    const wrong: string[] = [];
    const answered = (answer: Answer | undefined) =>
      answer !== undefined && answers.cut(answer) <= k;
    const look = (label: string, what: DiskRecord | Generation, here: boolean): boolean => {
      if (here && answered(what.removed?.done)) wrong.push(`${label} is back`);
      if (here) return true;
      const leaving = what.removed !== undefined && startsAt(what.removed.sent) < k;
      if (!leaving && what.durable.some(answered)) wrong.push(`${label} is missing`);
      return false;
    };
    for (const [name, disk] of this.disks) {
      const image = disks.get(name);
      if (!look(`disk ${name}`, disk, image !== undefined) || image === undefined) continue;
      const sure = ({ done, line }: Stretch) => answered(done) || line?.claimedBy(k, answers);
      const oldest = Math.max(0, disk.stretches.findLastIndex(sure));
      const may = disk.stretches.slice(oldest).filter(({ sent }) => startsAt(sent) < k);
      const each = may.map(({ line, begins }) =>
        line === undefined ? this.begins(begins, image) : line.check(k, answers, image),
      );
      if (each.some((problems) => problems.length === 0)) continue;
      wrong.push(...each.flat().map((text) => `disk ${name}: ${text}`));
      if (each.length === 0) wrong.push(`disk ${name} is there too early`);
    }
    for (const [id, generation] of this.generations) {
      const found = generations.get(id);
      const label = `generation ${id} of ${generation.disk.name}`;
      if (!look(label, generation, found !== undefined) || found === undefined) continue;
      if (found.disk !== generation.disk.name) wrong.push(`${label} is one of ${found.disk}`);
      wrong.push(...this.holds(generation, found.image).map((text) => `${label}: ${text}`));
    }
    for (const name of disks.keys()) {
      if (!this.disks.has(name)) wrong.push(`disk ${name} is unknown`);
    }
    for (const id of generations.keys()) {
      if (!this.generations.has(id)) wrong.push(`generation ${id} is unknown`);
    }
    return wrong;
  }
}

/** The line of a disk that is open. */
export function lineOf(disk: DiskRecord): Line {
  const line = disk.stretches.at(-1)?.line;
  if (line === undefined) throw new Error(`disk ${disk.name} was not seen yet`);
  return line;
}

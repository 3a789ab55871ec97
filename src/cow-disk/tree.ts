import {
  type BaseEntry,
  type DiskRecord,
  type GenerationRecord,
  ID,
  MAX_DISKS,
  MAX_GENERATIONS,
  MAX_SLICES,
  type SliceEntry,
  type Transaction,
} from './entries.js';

/**
 * What the journal says, in memory: slices, generations, disks, and files being removed, with the
 * ways from one to the other that the rest of src/cow-disk asks for. Changed by apply() alone.
 *
 * While a journal is replayed the entries need not fit together (a rewritten journal has them in any
 * order); index() comes after and tells what does not fit. What it finds is never repaired by guess.
 */
export class Tree {
  readonly slices = new Map<string, SliceEntry>();
  readonly generations = new Map<string, GenerationRecord>();
  readonly disks = new Map<string, DiskRecord>();
  /** Slices not named any more whose files may still be there. */
  readonly removed = new Set<string>();
  #indexed = false;
  #bytes = 0;
  readonly #children = new Map<string, Set<string>>();
  readonly #generationAt = new Map<string, string>();
  readonly #diskAt = new Map<string, string>();
  readonly #generationsOf = new Map<string, Set<string>>();
  readonly #names = new Map<string, string>();

  /** About how many bytes the entries take in the journal. */
  bytes(): number {
    return this.#bytes;
  }

  children(slice: string): ReadonlySet<string> {
    return this.#children.get(slice) ?? NONE;
  }
  /** The generation that names this slice. */
  generationAt(slice: string): string | undefined {
    return this.#generationAt.get(slice);
  }
  /** The disk whose top this is. */
  diskAt(slice: string): string | undefined {
    return this.#diskAt.get(slice);
  }
  /** Ids of the generations sealed from this disk, oldest first. */
  generationsOf(disk: string): ReadonlySet<string> {
    return this.#generationsOf.get(disk) ?? NONE;
  }
  named(disk: string, name: string): string | undefined {
    return this.#names.get(`${disk}@${name}`);
  }

  /** From `slice` down to the oldest below it, it included. */
  *down(slice: string): Generator<[string, SliceEntry]> {
    for (let id: string | null = slice; id !== null; ) {
      const entry = this.slices.get(id);
      if (entry === undefined) throw new Error(`slice ${id} is not in the tree`);
      yield [id, entry];
      id = entry.parent;
    }
  }

  /** What lies below the oldest slice under `slice`. */
  base(slice: string): BaseEntry {
    let base: BaseEntry = { kind: 'none' };
    for (const [, entry] of this.down(slice)) base = entry.base ?? base;
    return base;
  }

  /** Sets and removes what the transaction says. It is not checked here. */
  apply(transaction: Transaction): void {
    // What moves from one entry to another (a generation to another slice, a slice to another disk)
    // is taken out first everywhere, then put in.
    const { slices = {}, generations = {}, disks = {}, removed = {} } = transaction;
    for (const id of Object.keys(slices)) this.#unlinkSlice(id);
    for (const id of Object.keys(generations)) this.#unlinkGeneration(id);
    for (const name of Object.keys(disks)) this.#unlinkDisk(name);
    for (const [id, entry] of Object.entries(slices)) this.#put(this.slices, id, entry);
    for (const [id, entry] of Object.entries(generations)) this.#put(this.generations, id, entry);
    for (const [name, entry] of Object.entries(disks)) this.#put(this.disks, name, entry);
    for (const [id, gone] of Object.entries(removed)) {
      if (gone === null) this.removed.delete(id);
      else this.removed.add(id);
    }
    if (!this.#indexed) return;
    for (const id of Object.keys(slices)) this.#linkSlice(id);
    for (const id of Object.keys(generations)) this.#linkGeneration(id);
    for (const name of Object.keys(disks)) this.#linkDisk(name);
  }

  /** After the replay: makes the ways, and tells what does not fit together, in sentences. */
  index(): string[] {
    this.#indexed = true;
    const problems = [...this.#unfit()];
    for (const id of this.slices.keys()) this.#linkSlice(id);
    for (const id of this.generations.keys()) this.#linkGeneration(id);
    for (const name of this.disks.keys()) this.#linkDisk(name);
    for (const [name, disk] of this.disks) {
      if (this.children(disk.top).size > 0) {
        problems.push(`disk ${name}: its top ${disk.top} has a slice on it`);
      }
      if (this.generationAt(disk.top) !== undefined) {
        problems.push(`disk ${name}: its top ${disk.top} is a generation`);
      }
    }
    return problems;
  }

  /** The entries as a few transactions, for a journal written anew. */
  *transactions(): Generator<Transaction> {
    for (const slices of packs(this.slices)) yield { slices };
    for (const generations of packs(this.generations)) yield { generations };
    for (const disks of packs(this.disks)) yield { disks };
    const gone = new Map([...this.removed].map((id) => [id, true] as const));
    for (const removed of packs(gone)) yield { removed };
  }

  *#unfit(): Generator<string> {
    if (this.slices.size > MAX_SLICES) yield `there are more than ${MAX_SLICES} slices`;
    if (this.generations.size > MAX_GENERATIONS) {
      yield `there are more than ${MAX_GENERATIONS} generations`;
    }
    if (this.disks.size > MAX_DISKS) yield `there are more than ${MAX_DISKS} disks`;
    for (const [id, slice] of this.slices) {
      if ((slice.parent === null) !== (slice.base !== undefined)) {
        yield `slice ${id}: a base belongs to it if and only if it has no parent`;
      }
      if (slice.parent === null) continue;
      const parent = this.slices.get(slice.parent);
      if (parent === undefined) yield `slice ${id}: its parent ${slice.parent} is unknown`;
      else if (parent.size_bytes !== slice.size_bytes) {
        yield `slice ${id}: its size differs from that of its parent ${slice.parent}`;
      }
    }
    yield* this.#cycles();
    const slices = new Set<string>();
    const names = new Set<string>();
    for (const [id, { slice, disk, name }] of this.generations) {
      if (!this.slices.has(slice)) yield `generation ${id}: its slice ${slice} is unknown`;
      if (slices.has(slice)) yield `generation ${id}: its slice ${slice} is another one's too`;
      slices.add(slice);
      if (name === null) continue;
      if (ID.test(name)) yield `generation ${id}: its name looks like an id`;
      if (names.has(`${disk}@${name}`)) yield `generation ${id}: ${disk}@${name} is named twice`;
      names.add(`${disk}@${name}`);
    }
    const used = new Set<string>();
    for (const [name, { top, spare }] of this.disks) {
      if (!this.slices.has(top)) yield `disk ${name}: its top ${top} is unknown`;
      if (used.has(top)) yield `disk ${name}: its top ${top} is another one's too`;
      used.add(top);
      if (spare === null) continue;
      if (this.slices.has(spare)) yield `disk ${name}: its spare ${spare} is a slice already`;
      if (used.has(spare)) yield `disk ${name}: its spare ${spare} is another one's too`;
      used.add(spare);
    }
    for (const id of this.removed) {
      if (this.slices.has(id) || used.has(id)) yield `slice ${id} is removed and in use`;
    }
  }

  *#cycles(): Generator<string> {
    const ends = new Set<string>(); // slices from which the way down is known to end
    for (const start of this.slices.keys()) {
      const way = new Set<string>();
      for (let id: string | null = start; id !== null && !ends.has(id); ) {
        if (way.has(id)) {
          yield `slice ${id}: it lies on itself`;
          break;
        }
        way.add(id);
        id = this.slices.get(id)?.parent ?? null;
      }
      for (const id of way) ends.add(id);
    }
  }

  #put<Entry>(into: Map<string, Entry>, key: string, entry: Entry | null): void {
    const old = into.get(key);
    if (old !== undefined) this.#bytes -= entryBytes(key, old);
    if (entry === null) {
      into.delete(key);
      return;
    }
    into.set(key, entry);
    this.#bytes += entryBytes(key, entry);
  }

  #linkSlice(id: string): void {
    const parent = this.slices.get(id)?.parent ?? null;
    if (parent !== null) addTo(this.#children, parent, id);
  }
  #unlinkSlice(id: string): void {
    const parent = this.slices.get(id)?.parent ?? null;
    if (parent !== null) takeFrom(this.#children, parent, id);
  }
  #linkGeneration(id: string): void {
    const entry = this.generations.get(id);
    if (entry === undefined) return;
    this.#generationAt.set(entry.slice, id);
    addTo(this.#generationsOf, entry.disk, id);
    if (entry.name !== null) this.#names.set(`${entry.disk}@${entry.name}`, id);
  }
  #unlinkGeneration(id: string): void {
    const entry = this.generations.get(id);
    if (entry === undefined) return;
    this.#generationAt.delete(entry.slice);
    takeFrom(this.#generationsOf, entry.disk, id);
    if (entry.name !== null) this.#names.delete(`${entry.disk}@${entry.name}`);
  }
  #linkDisk(name: string): void {
    const entry = this.disks.get(name);
    if (entry !== undefined) this.#diskAt.set(entry.top, name);
  }
  #unlinkDisk(name: string): void {
    const entry = this.disks.get(name);
    if (entry !== undefined) this.#diskAt.delete(entry.top);
  }
}

const NONE: ReadonlySet<string> = new Set();
const PACK = 256;

function entryBytes(key: string, entry: unknown): number {
  return key.length + JSON.stringify(entry).length + 4;
}

function* packs<Entry>(from: Map<string, Entry>): Generator<Record<string, Entry>> {
  let pack: [string, Entry][] = [];
  for (const pair of from) {
    pack.push(pair);
    if (pack.length < PACK) continue;
    yield Object.fromEntries(pack);
    pack = [];
  }
  if (pack.length > 0) yield Object.fromEntries(pack);
}

function addTo(into: Map<string, Set<string>>, key: string, value: string): void {
  const known = into.get(key);
  if (known === undefined) into.set(key, new Set([value]));
  else known.add(value);
}

function takeFrom(from: Map<string, Set<string>>, key: string, value: string): void {
  const known = from.get(key);
  if (known?.delete(value) === true && known.size === 0) from.delete(key);
}

/**
 * Which pages clones touched first, kept from one generation of a VM or disk for the next one.
 *
 * The record of a generation is in its mcdist server while it is served. It is taken from there when
 * the next generation begins, or when it ends itself, whichever is first. Of several that were served
 * the one that began last counts: it began with the others' records. Lost with this process: then
 * the next generation's clones fault as the first ones did.
 */
export type Of = { vm: string } | { disk: string };

interface Began {
  of: string;
  turn: number;
}

export class TouchOrders {
  readonly #read: (generation: string) => Promise<Buffer>;
  readonly #served = new Map<string, Began>();
  readonly #kept = new Map<string, { turn: number; record: Buffer }>();
  #turn = 0;

  /** `read`: the record of a generation that is served; empty if it is not. */
  constructor(read: (generation: string) => Promise<Buffer>) {
    this.#read = read;
  }

  /** What the next generation begins with; undefined if there was none before. */
  async latest(of: Of): Promise<Buffer | undefined> {
    const name = nameOf(of);
    const kept = this.#kept.get(name);
    let last: { generation: string; turn: number } | undefined;
    for (const [generation, began] of this.#served) {
      if (began.of === name && began.turn > (last ?? kept ?? { turn: 0 }).turn) {
        last = { generation, turn: began.turn };
      }
    }
    return last === undefined ? kept?.record : this.#read(last.generation);
  }

  /** A generation is served from now on. */
  began(of: Of, generation: string): void {
    this.#served.set(generation, { of: nameOf(of), turn: ++this.#turn });
  }

  /** It is served still, and about to be no more. */
  async ending(generation: string): Promise<void> {
    const began = this.#served.get(generation);
    if (began === undefined) return;
    const record = await this.#read(generation);
    // Its VM or disk may have ended meanwhile.
    if (!this.#served.delete(generation)) return;
    if (began.turn > (this.#kept.get(began.of)?.turn ?? 0)) {
      this.#kept.set(began.of, { turn: began.turn, record });
    }
  }

  /** The VM or disk is no more. */
  forget(of: Of): void {
    const name = nameOf(of);
    this.#kept.delete(name);
    for (const [generation, began] of this.#served) {
      if (began.of === name) this.#served.delete(generation);
    }
  }
}

function nameOf(of: Of): string {
  return 'vm' in of ? `vm ${of.vm}` : `disk ${of.disk}`;
}

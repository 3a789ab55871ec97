import { SnowflockError } from '../common/errors.js';
import { MAX_DISKS, MAX_GENERATIONS, MAX_SLICES, type Transaction } from './entries.js';
import { Journal } from './journal.js';
import { Tree } from './tree.js';

/**
 * The tree and its journal, changed together: a transaction is made from the tree as it is when its
 * turn comes, appended, and only then applied. So the tree never holds what is not on the device,
 * and a transaction costs as much as it changes, not as much as there is.
 */
export class Ledger {
  readonly tree = new Tree();
  #journal: Journal | undefined;
  #turn: Promise<unknown> = Promise.resolve();
  /** In `removed`, but gone from the folder; the next transaction says so. */
  #gone = new Set<string>();

  /** E_NOT_FOUND, E_CORRUPT, E_IO. To be called by the owner of store.lock. */
  static async open(directory: string): Promise<Ledger> {
    const ledger = new Ledger();
    const journal = await Journal.open(directory, (line) => ledger.tree.apply(line));
    ledger.#journal = journal;
    const [problem] = ledger.tree.index();
    if (problem !== undefined) {
      await journal.close();
      throw new SnowflockError('E_CORRUPT', `${journal.path}: ${problem}`);
    }
    return ledger;
  }

  get journal(): Journal {
    if (this.#journal === undefined) throw new SnowflockError('E_CLOSED', 'no journal is open');
    return this.#journal;
  }

  /**
   * Appends what `build` makes of the tree, if anything. What it throws is thrown here, and nothing
   * has changed. Durable when it resolves. E_IO, E_NO_SPACE, E_CAPACITY.
   */
  async commit(build: (tree: Tree) => Transaction | undefined): Promise<void> {
    await this.#inTurn(async () => {
      const made = build(this.tree);
      if (made === undefined) return;
      this.#checkRoom(made);
      const gone = [...this.#gone].slice(0, 1024);
      const transaction: Transaction =
        gone.length === 0
          ? made
          : {
              ...made,
              removed: { ...Object.fromEntries(gone.map((id) => [id, null])), ...made.removed },
            };
      await this.journal.append(transaction);
      for (const id of gone) this.#gone.delete(id);
      this.tree.apply(transaction);
      this.journal.rewriteIfLarge(this.tree, (work) => this.#inTurn(work));
    });
  }

  /** The files of a removed slice are gone. Lost with this process; then they are looked for again. */
  gone(slice: string): void {
    if (this.tree.removed.has(slice)) this.#gone.add(slice);
  }
  isGone(slice: string): boolean {
    return this.#gone.has(slice);
  }

  async close(): Promise<void> {
    // Not in turn: the end of a rewrite may still come, and close() of the journal waits for it.
    await this.#turn.catch(() => undefined);
    await this.journal.close();
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#turn.then(work, work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  #checkRoom({ slices, generations, disks }: Transaction): void {
    const room = (
      entries: object | undefined,
      has: ReadonlyMap<string, unknown>,
      most: number,
      what: string,
    ) => {
      const more = Object.entries(entries ?? {}).filter(
        ([key, to]) => to !== null && !has.has(key),
      );
      if (more.length > 0 && has.size + more.length > most) {
        throw new SnowflockError(
          'E_CAPACITY',
          `the store has ${most} ${what}, the most it can have`,
        );
      }
    };
    room(disks, this.tree.disks, MAX_DISKS, 'disks');
    room(generations, this.tree.generations, MAX_GENERATIONS, 'generations');
    room(slices, this.tree.slices, MAX_SLICES, 'slices');
  }
}

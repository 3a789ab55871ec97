import { mkdir, readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { readJson, writeJson } from '../common/files.js';

/**
 * A folder of records, one JSON file each, held in memory and written through. Writes of one record
 * follow each other in order; a reader of the folder sees each record old or new, never mixed.
 */
export class Store<T extends { id: string }> {
  readonly #folder: string;
  readonly #records = new Map<string, T>();
  readonly #writes = new Map<string, Promise<void>>();

  private constructor(folder: string) {
    this.#folder = folder;
  }

  /** Errors: E_IO, E_CORRUPT (names the file). */
  static async open<T extends { id: string }>(folder: string): Promise<Store<T>> {
    const store = new Store<T>(folder);
    await mkdir(folder, { recursive: true, mode: 0o700 });
    for (const name of (await readdir(folder)).sort()) {
      if (name.endsWith('.tmp')) await rm(join(folder, name), { force: true });
      if (!name.endsWith('.json')) continue;
      const record = (await readJson(join(folder, name))) as T | undefined;
      if (record !== undefined) store.#records.set(record.id, record);
    }
    return store;
  }

  get(id: string): T | undefined {
    return this.#records.get(id);
  }

  all(): T[] {
    return [...this.#records.values()];
  }

  /** Puts a record (the object itself is kept: change it, then save it again). */
  save(record: T): Promise<void> {
    this.#records.set(record.id, record);
    return this.#queue(record.id, () => writeJson(this.#path(record.id), record));
  }

  remove(id: string): Promise<void> {
    this.#records.delete(id);
    return this.#queue(id, () => rm(this.#path(id), { force: true }));
  }

  #path(id: string): string {
    return join(this.#folder, `${id}.json`);
  }

  #queue(id: string, write: () => Promise<void>): Promise<void> {
    const before = this.#writes.get(id) ?? Promise.resolve();
    // A failed write is reported to whoever asked for it; the next one is tried all the same.
    const next = before.then(write, write);
    this.#writes.set(id, next);
    const done = (): void => {
      if (this.#writes.get(id) === next) this.#writes.delete(id);
    };
    next.then(done, done);
    return next;
  }
}

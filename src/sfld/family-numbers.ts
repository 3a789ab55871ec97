/**
 * Family numbers for the root parents of this host. 24 bits: above the host's number (10 bits), so that
 * no two hosts give out the same; below one after the other (14 bits), from a random one on.
 *
 * Clones live on other hosts when nothing here knows of their family any more, and a root parent that
 * got its number would be in their network. So a number comes again only after all others of this host
 * have had their turn, also after a restart and a power cut: the count is on the disk before a number
 * is used.
 */
import { randomInt } from 'node:crypto';
import { SnowflockError } from '../common/errors.js';
import { readJson, writeJson } from '../common/files.js';

/** Families of a host before the first of them comes again. */
export const FAMILIES_OF_HOST = 2 ** 14;

interface Saved {
  version: 1;
  next: number;
}

export class FamilyNumbers {
  readonly #path: string;
  readonly #above: number;
  #next: number;
  #saved: Promise<void> = Promise.resolve();

  private constructor(path: string, host: number, next: number) {
    this.#path = path;
    this.#above = host * FAMILIES_OF_HOST;
    this.#next = next;
  }

  /** @param host its number in the cluster. E_IO, E_CORRUPT (what to do is in the message). */
  static async open(path: string, host: number): Promise<FamilyNumbers> {
    const saved = (await readJson(path)) as Saved | undefined;
    const next = saved === undefined ? randomInt(FAMILIES_OF_HOST) : saved.next;
    if (saved?.version !== undefined && saved.version !== 1) {
      throw new SnowflockError('E_CONFIG', `${path} is of another version`);
    }
    if (!Number.isInteger(next) || next < 0 || next >= FAMILIES_OF_HOST) {
      const what = 'has no number of a family; without the file they begin at a random one';
      throw new SnowflockError('E_CORRUPT', `${path} ${what}`);
    }
    return new FamilyNumbers(path, host, next);
  }

  /** A number that is not in `taken`. E_CAPACITY, E_IO. */
  async take(taken: ReadonlySet<number>): Promise<number> {
    for (let tries = 0; tries < FAMILIES_OF_HOST; tries++) {
      const family = this.#above + this.#next;
      this.#next = (this.#next + 1) % FAMILIES_OF_HOST;
      if (taken.has(family)) continue;
      await this.#save();
      return family;
    }
    throw new SnowflockError(
      'E_CAPACITY',
      `a host has at most ${FAMILIES_OF_HOST} families at a time, and all are in use`,
    );
  }

  /** One write after the other, each with the count of its moment. */
  #save(): Promise<void> {
    const write = () => {
      const value: Saved = { version: 1, next: this.#next };
      return writeJson(this.#path, value, { durable: true });
    };
    this.#saved = this.#saved.then(write, write);
    return this.#saved;
  }
}

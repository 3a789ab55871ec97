// A recorded run of a server on one store, and the cuts made of it.
import { cp, mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { expect } from 'vitest';
import { asSnowflockError } from '../../../src/common/errors.js';
import { checkStore } from '../../../src/cow-disk/check.js';
import { Store } from '../../../src/cow-disk/store.js';
import { contents, temporary } from '../../blktap/support.js';
import { type FolderState, RecordedFolder } from './file-system.js';
import { differences, writeFolder } from './folders.js';
import { type Adopted, type Contents, Ledger } from './ledger.js';
import { Answers, type Entry, readLog } from './log.js';
import { EVERYTHING, type Sample } from './sampler.js';
import { Recorder } from './server.js';
import { Workload } from './workload.js';

/** A state after a power cut, and what a store opened on it holds. */
export interface Survivor extends Adopted {
  state: FolderState;
}

async function imageOf(
  store: Store,
  disk: string,
  generation: string,
  pages: number,
): Promise<Buffer> {
  const view = await store.openGeneration(disk, generation);
  try {
    return contents(view.provider(), pages);
  } finally {
    view.close();
  }
}

/**
 * Opens the store in `directory` and reads all it has; `cleanUp`: also again after all clean-up, and
 * has the closed store checked.
 */
async function readAll(directory: string, pages: number, cleanUp: boolean): Promise<Contents> {
  const store = await Store.open(directory, { gc_bytes_per_s: 0 });
  const found: Contents = { disks: new Map(), generations: new Map() };
  const now = new Map<string, { disk: string; image: Buffer }>();
  try {
    const listing = await store.list();
    for (const { id, disk } of listing.generations) {
      found.generations.set(id, { disk, image: await imageOf(store, disk, id, pages) });
    }
    for (const { name } of listing.disks) {
      const { id } = await store.snapshot({ disk: name });
      const image = await imageOf(store, name, id, pages);
      found.disks.set(name, image);
      now.set(id, { disk: name, image });
    }
    if (!cleanUp) return found;
    store.setCleanupRate(2 ** 30);
    await store.settled();
    expect((await store.tasks()).map(({ error }) => error)).toEqual([]);
    for (const [id, { disk, image }] of [...found.generations, ...now]) {
      if (!image.equals(await imageOf(store, disk, id, pages))) {
        expect.fail(`generation ${id} of ${disk} is another after clean-up`);
      }
    }
  } finally {
    await store.close();
  }
  const problems = (await checkStore(directory)).filter((each) => each.severity === 'error');
  expect(problems).toEqual([]);
  return found;
}

export class Recording {
  entries: Entry[] = [];
  readonly work: Workload;
  readonly ledger = new Ledger();
  readonly #folder: RecordedFolder;
  readonly #recorder: Recorder;
  #answers = new Answers([]);
  #storeFrom = 0;
  readonly #known = new Map<string, Contents>();
  readonly #buffers = new WeakMap<Buffer, number>();
  #count = 0;

  private constructor(
    readonly memory: string,
    own: string,
    readonly pages: number,
    rand: () => number,
    start: Survivor | undefined,
  ) {
    const root = join(memory, 'root');
    writeFolder(root, start?.state ?? new Map());
    this.#folder = new RecordedFolder(root);
    if (start !== undefined) this.ledger.adopt(start);
    this.#recorder = new Recorder(own, root);
    const [directory, sockets] = [join(root, 'store'), join(own, 'nbd')];
    this.work = new Workload(this.ledger, this.#recorder, directory, sockets, pages, rand);
  }

  /**
   * Does `run` on a store of disks of so many pages, new or left by a power cut, which is open.
   * `memory`: a folder that is lost anyway (syncs cost nothing there).
   */
  static async make(
    memory: string,
    pages: number,
    rand: () => number,
    run: (work: Workload) => Promise<void>,
    start?: Survivor,
  ): Promise<Recording> {
    const recording = new Recording(memory, await temporary(), pages, rand, start);
    const { work } = recording;
    const created = start === undefined ? await work.createStore() : undefined;
    await work.open();
    await run(work);
    await work.end();
    expect(work.wrong, 'before any cut').toEqual([]);
    recording.#load();
    if (created !== undefined) recording.#storeFrom = recording.#answers.cut(created);
    return recording;
  }

  #load(): void {
    this.entries = readLog(this.#recorder.log);
    this.#answers = new Answers(this.entries);
    this.#folder.play(this.entries);
    // Whatever the recorder did not see would show here.
    const end = this.#folder.cut(this.entries.length, EVERYTHING);
    expect(differences(join(this.memory, 'root'), end)).toEqual([]);
  }

  /** How many different states were looked at. */
  get states(): number {
    return this.#known.size;
  }

  /** Cuts the power at entry k, opens the store and checks all of it; undefined: none was made yet. */
  async check(k: number, { name, chooser }: Sample): Promise<Survivor | undefined> {
    const state = this.#folder.cut(k, chooser);
    const label = `cut at entry ${k} of ${this.entries.length}, ${name}`;
    let found: Contents;
    try {
      found = await this.#read(state);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (k < this.#storeFrom && code === 'E_NOT_FOUND') return undefined;
      await this.#keep(state);
      expect.fail(`${label}: ${code}: ${message}`);
    }
    const wrong = this.ledger.check(k, this.#answers, (at) => this.#at(at), found);
    if (wrong.length > 0) await this.#keep(state);
    expect(wrong, label).toEqual([]);
    return { state, ...found, clones: this.ledger.clones() };
  }

  /** What a store opened on that state holds: the same each time, so it is looked at once. */
  async #read(state: FolderState): Promise<Contents> {
    const key = this.#keyOf(state);
    const known = this.#known.get(key);
    if (known !== undefined) return known;
    const cut = join(this.memory, 'cut');
    writeFolder(cut, state);
    const found = await readAll(join(cut, 'store'), this.pages, this.#known.size % 8 === 0);
    this.#known.set(key, found);
    return found;
  }

  #keyOf(state: FolderState): string {
    const parts: unknown[] = [];
    for (const [path, file] of [...state].sort(([a], [b]) => (a < b ? -1 : 1))) {
      parts.push(path, file?.size);
      for (const [page, data] of file?.pages ?? []) {
        const number = this.#buffers.get(data) ?? ++this.#count;
        this.#buffers.set(data, number);
        parts.push(page, number);
      }
    }
    return parts.join();
  }

  /** The first entry at or behind that byte of the log; -1: before all of them. */
  #at(bytes: number): number {
    if (bytes < 0) return -1;
    const found = this.entries.findIndex((entry) => entry.atByte >= bytes);
    return found < 0 ? this.entries.length : found;
  }

  async #keep(state: FolderState): Promise<void> {
    const folder = process.env.KEEP;
    if (folder === undefined) return;
    await mkdir(folder, { recursive: true });
    writeFolder(join(folder, 'cut'), state);
    await cp(this.#recorder.log, join(folder, 'log'));
  }
}

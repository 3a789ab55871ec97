// A recorded run of a server on one disk, and the cuts made of it.
import { cp, mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { expect } from 'vitest';
import { asSnowflockError } from '../../../src/common/errors.js';
import { Disk } from '../../../src/cow-disk/disk.js';
import { contents, newGeneration, temporary } from '../../blktap/support.js';
import { type FolderState, PAGE, RecordedFolder } from './file-system.js';
import { differences, writeFolder } from './folders.js';
import { Ledger } from './ledger.js';
import { Answers, type Entry, readLog } from './log.js';
import { EVERYTHING, type Sample } from './sampler.js';
import { Recorder } from './server.js';
import { Workload } from './workload.js';

/** A state after a power cut, and what a disk opened on it holds. */
export interface Survivor {
  state: FolderState;
  image: Buffer;
  generations: Map<string, Buffer>;
}

/** Opens the disk in `directory` and reads all it has. */
async function readAll(directory: string, pages: number): Promise<Omit<Survivor, 'state'>> {
  const disk = await Disk.open(directory);
  try {
    const generations = new Map<string, Buffer>();
    for (const id of disk.info().generations) {
      generations.set(id, contents(await disk.provider(id), pages));
    }
    const view = newGeneration();
    await disk.fork(view);
    return { image: contents(await disk.provider(view), pages), generations };
  } finally {
    await disk.close();
  }
}

export class Recording {
  entries: Entry[] = [];
  readonly work: Workload;
  readonly ledger: Ledger;
  readonly #folder: RecordedFolder;
  readonly #recorder: Recorder;
  #answers = new Answers([]);
  #diskFrom = 0;

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
    this.ledger = new Ledger(start?.image ?? Buffer.alloc(pages * PAGE));
    for (const [id, held] of start?.generations ?? []) this.ledger.adopt(id, held);
    this.#recorder = new Recorder(own, root);
    const directory = join(root, 'disk');
    this.work = new Workload(this.ledger, this.#recorder, directory, join(own, 'nbd'), rand);
  }

  /**
   * Does `run` on a disk of so many pages, new or left by a power cut, which is open. `memory`: a
   * folder that is lost anyway (syncs cost nothing there).
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
    const created = start === undefined ? await work.create() : undefined;
    await work.open();
    await run(work);
    await work.end();
    expect(work.wrong, 'before any cut').toEqual([]);
    recording.#load();
    if (created !== undefined) recording.#diskFrom = recording.#answers.cut(created);
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

  /** Cuts the power at entry k, opens the disk and checks all of it; undefined: none was made yet. */
  async check(k: number, { name, chooser }: Sample): Promise<Survivor | undefined> {
    const state = this.#folder.cut(k, chooser);
    const cut = join(this.memory, 'cut');
    writeFolder(cut, state);
    const label = `cut at entry ${k} of ${this.entries.length}, ${name}`;
    let found: Omit<Survivor, 'state'>;
    try {
      found = await readAll(join(cut, 'disk'), this.pages);
    } catch (error) {
      const { code, message } = asSnowflockError(error);
      if (k < this.#diskFrom && (code === 'E_NOT_FOUND' || code === 'E_CORRUPT')) return undefined;
      await this.#keep(state);
      expect.fail(`${label}: ${code}: ${message}`);
    }
    const { image, generations } = found;
    const wrong = this.ledger.check(k, this.#answers, (at) => this.#at(at), image, generations);
    if (wrong.length > 0) await this.#keep(state);
    expect(wrong, label).toEqual([]);
    return { state, image, generations };
  }

  /** The first entry at or behind that byte of the log. */
  #at(bytes: number): number {
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

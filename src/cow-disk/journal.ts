import { randomBytes } from 'node:crypto';
import { access, type FileHandle, link, mkdir, open, rename, rm } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { type Header, type Transaction, VERSION } from './entries.js';
import {
  journalLine,
  lineSum,
  MAX_JOURNAL_BYTES,
  MAX_LINE_BYTES,
  movedLine,
  readJournal,
} from './journal-read.js';

/**
 * store.journal: a line for each transaction, replayed when the store is opened.
 *
 * States: open; broken (an append failed and could not be taken back, or it is not known which file
 * a power cut would leave: nothing is appended any more, the store has to be opened again); closed.
 *
 * Invariants
 * - `#length` bytes are lines on the device. A failed append is cut off again before its error is
 *   thrown: what the caller was told failed is never replayed.
 * - Appends and the end of a rewrite are one after another (the caller's queue, ledger.ts).
 * - A rewrite goes on beside appends. It writes entries while they change, then the lines appended
 *   since it began: each sets whole entries, so the last word on each is the right one. It ends with
 *   an empty transaction, so that a damaged last line costs none of what was there before.
 * - `#last` is the checksum of the last line, which the next one names.
 */
export const JOURNAL = 'store.journal';
const REWRITE_BYTES = 64 * 1024;
const REWRITE_FACTOR = 4;
/** Of lines appended during one rewrite, which are kept in memory; more, and it is given up. */
const MAX_KEPT_BYTES = MAX_LINE_BYTES;

/** The entries as they are now, as transactions, and about how many bytes they take. */
export interface Entries {
  bytes(): number;
  transactions(): Iterable<Transaction>;
}

export class Journal {
  readonly path: string;
  readonly header: Header;
  readonly #directory: string;
  #file: FileHandle;
  #length: number;
  #last: string;
  /** While it is rewritten: the lines appended since that began. */
  #kept: { lines: Buffer[]; bytes: number } | undefined;
  #broken: SnowflockError | undefined;
  #rewriting: Promise<void> | undefined;
  /** No rewrite before the journal is this long: the last one failed. */
  #notBefore = 0;
  #closed = false;

  private constructor(
    directory: string,
    file: FileHandle,
    read: { header: Header; validBytes: number; lastSum: string },
  ) {
    this.#directory = directory;
    this.path = join(directory, JOURNAL);
    this.#file = file;
    this.header = read.header;
    this.#length = read.validBytes;
    this.#last = read.lastSum;
  }

  /** Makes an empty journal. E_EXISTS, E_NO_SPACE, E_IO. */
  static async create(directory: string): Promise<void> {
    const path = join(directory, JOURNAL);
    const fresh = `${path}.${randomBytes(8).toString('hex')}.new`;
    const header: Header = {
      format: 'snowflock-store',
      version: VERSION,
      page_bytes: 4096,
      id: randomBytes(16).toString('hex'),
    };
    try {
      const file = await open(fresh, 'wx', 0o600);
      try {
        await file.writeFile(journalLine(header));
        await file.sync();
      } finally {
        await file.close();
      }
      await link(fresh, path); // unlike rename(2) never in place of another one
      await syncFolder(directory);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EEXIST') {
        throw new SnowflockError('E_EXISTS', `${directory} holds a store already`, {
          cause: error,
        });
      }
      throw fault('write', path, error);
    } finally {
      await rm(fresh, { force: true });
    }
  }

  /** E_NOT_FOUND unless the folder holds a store. */
  static async exists(directory: string): Promise<void> {
    try {
      await access(join(directory, JOURNAL));
    } catch (error) {
      throw new SnowflockError('E_NOT_FOUND', `no store in ${directory}`, { cause: error });
    }
  }

  /**
   * Replays the journal into `take` and cuts a torn last line off. What was read is durable when it
   * resolves. To be called by the owner of store.lock. E_NOT_FOUND, E_CORRUPT (nothing is changed),
   * E_IO.
   */
  static async open(directory: string, take: (transaction: Transaction) => void): Promise<Journal> {
    const path = join(directory, JOURNAL);
    const read = await readJournal(path, take);
    const { lastLine, validBytes, tornBytes } = read;
    let file: FileHandle | undefined;
    try {
      file = await open(path, 'r+');
      if (tornBytes > 0) await file.truncate(validBytes);
      // An owner that was killed may have appended the last line, or put a rewritten journal in
      // place, and not have synced it. The line is written again: a sync of it that failed has made
      // the old bytes look clean.
      await writeAll(file, lastLine, validBytes - lastLine.length);
      await file.datasync();
      await syncFolder(directory);
      return new Journal(directory, file, read);
    } catch (error) {
      await file?.close();
      throw fault('write', path, error);
    }
  }

  /** It is not known whether the last append, which failed, is there for the next owner. */
  get broken(): boolean {
    return this.#broken !== undefined;
  }

  /** Its file, so that a test can make it fail. */
  get fileForTests(): FileHandle {
    return this.#file;
  }

  get lengthBytes(): number {
    return this.#length;
  }

  /** Durable when it resolves; on an error it never happened. One at a time. */
  async append(transaction: Transaction): Promise<void> {
    if (this.#closed) throw new SnowflockError('E_CLOSED', `${this.path} is closed`);
    if (this.#broken !== undefined) throw this.#broken;
    const line = journalLine(transaction, this.#last);
    if (line.length > MAX_LINE_BYTES || this.#length + line.length > MAX_JOURNAL_BYTES) {
      throw new SnowflockError('E_CAPACITY', `${this.path} would grow beyond its limit`);
    }
    try {
      await writeAll(this.#file, line, this.#length);
      await this.#file.datasync();
    } catch (error) {
      const reason = fault('write', this.path, error);
      try {
        await this.#file.truncate(this.#length);
        await this.#file.datasync();
      } catch (second) {
        const { code } = second as NodeJS.ErrnoException;
        this.#broken = new SnowflockError(
          'E_IO',
          `${this.path} cannot be written, nor what was written be cut off (${code}); open the store again`,
          { cause: error },
        );
      }
      throw reason;
    }
    this.#length += line.length;
    this.#last = lineSum(line);
    if (this.#kept === undefined) return;
    this.#kept.lines.push(line);
    this.#kept.bytes += line.length;
  }

  /**
   * Begins to rewrite the journal if it is much larger than its entries. `inTurn` runs the end of
   * it while nothing is appended. A failure leaves the journal as it is; it is tried again later.
   */
  rewriteIfLarge(entries: Entries, inTurn: (work: () => Promise<void>) => Promise<void>): void {
    const due =
      this.#length > Math.max(REWRITE_BYTES, REWRITE_FACTOR * entries.bytes(), this.#notBefore);
    if (!due || this.#rewriting !== undefined || this.#closed || this.#broken) return;
    const kept = { lines: [], bytes: 0 };
    this.#kept = kept;
    this.#rewriting = this.#rewrite(entries, kept, inTurn)
      .catch((error: unknown) => {
        this.#notBefore = 2 * this.#length;
        process.emitWarning(`${this.path} could not be rewritten: ${(error as Error).message}`);
      })
      .finally(() => {
        this.#kept = undefined;
        this.#rewriting = undefined;
      });
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#rewriting;
    await this.#file.close();
  }

  async #rewrite(
    entries: Entries,
    kept: { lines: Buffer[]; bytes: number },
    inTurn: (work: () => Promise<void>) => Promise<void>,
  ): Promise<void> {
    const fresh = `${this.path}.new`;
    const file = await open(fresh, 'w+', 0o600);
    let adopted = false;
    try {
      let length = 0;
      let last = '';
      const write = async (line: Buffer) => {
        await writeAll(file, line, length);
        length += line.length;
        last = lineSum(line);
      };
      await write(journalLine(this.header));
      for (const transaction of entries.transactions()) {
        if (this.#closed) return;
        if (kept.bytes > MAX_KEPT_BYTES) throw new Error('too much was appended meanwhile');
        await write(journalLine(transaction, last));
      }
      await file.datasync(); // the most of it while appends go on
      await inTurn(async () => {
        if (this.#closed || this.#broken !== undefined) return;
        for (const line of kept.lines) await write(movedLine(line, last));
        await write(journalLine({}, last));
        await file.sync();
        await rename(fresh, this.path);
        adopted = true;
        const old = this.#file;
        this.#file = file;
        this.#length = length;
        this.#last = last;
        await old.close();
        try {
          await syncFolder(this.#directory);
        } catch (error) {
          this.#broken = fault('sync the folder of', this.path, error);
        }
      });
    } finally {
      if (!adopted) {
        await file.close();
        await rm(fresh, { force: true });
      }
    }
  }
}

async function writeAll(file: FileHandle, data: Buffer, position: number): Promise<void> {
  for (let done = 0; done < data.length; ) {
    const { bytesWritten } = await file.write(data, done, data.length - done, position + done);
    done += bytesWritten;
  }
}

/**
 * Makes a folder, and those above it that are missing; their names outlive a power cut. The folder
 * above is synced in any case: one that was killed may have made this one.
 */
export async function makeFolder(directory: string): Promise<void> {
  const path = resolve(directory);
  const first = await mkdir(path, { recursive: true, mode: 0o700 });
  const top = dirname(first === undefined ? path : resolve(first));
  for (let above = path; above !== top; ) {
    above = dirname(above);
    await syncFolder(above);
  }
}

/** Makes names made, changed or removed in a folder durable. */
export async function syncFolder(directory: string): Promise<void> {
  const folder = await open(directory, 'r');
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

function fault(what: string, path: string, error: unknown): SnowflockError {
  const { code } = error as NodeJS.ErrnoException;
  const full = code === 'ENOSPC' || code === 'EDQUOT';
  return new SnowflockError(full ? 'E_NO_SPACE' : 'E_IO', `cannot ${what} ${path}: ${code}`, {
    cause: error,
  });
}

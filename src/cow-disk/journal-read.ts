import { type FileHandle, open } from 'node:fs/promises';
import { crc32c } from '../common/crc32c.js';
import { SnowflockError } from '../common/errors.js';
import { type Header, headerMisfit, type Transaction, transactionMisfit } from './entries.js';

/**
 * Reading store.journal (docs/disk-format.md, "store.journal").
 *
 * A line is appended only after the one before it is on the device. So a power cut can only damage
 * the last line, and whatever is wrong elsewhere is damage of another kind: E_CORRUPT. What looks
 * like a torn last line is refused as well if a whole line is at its beginning: then the line feed
 * between two lines is damaged, and cutting would lose a transaction that somebody counted on.
 *
 * Each line names the checksum of the one before it. So whole lines that are missing, there twice, in
 * another order or from elsewhere are found; at the end of the file, lines that are missing are not.
 */
export const MAX_LINE_BYTES = 64 * 2 ** 20;
export const MAX_JOURNAL_BYTES = 2 ** 30;
const CHUNK_BYTES = 2 ** 20;
const PREFIX_BYTES = 9; // a checksum and a space
const PREFIX = /^[0-9a-f]{8} $/;

export interface JournalText {
  header: Header;
  /** The last whole line, line feed included. */
  lastLine: Buffer;
  /** Its checksum, for the line after it. */
  lastSum: string;
  /** Where the next line belongs. */
  validBytes: number;
  /** Behind that: a last line cut short by a power cut. */
  tornBytes: number;
}

/** One line of the journal, line feed included. `after`: lineSum() of the one before; none: a header. */
export function journalLine(value: object, after?: string): Buffer {
  return sealed(Buffer.from(`${after === undefined ? '' : `${after} `}${JSON.stringify(value)}`));
}

/** The same transaction after another line. */
export function movedLine(line: Buffer, after: string): Buffer {
  const json = line.subarray(2 * PREFIX_BYTES, line.length - 1);
  return sealed(Buffer.concat([Buffer.from(`${after} `), json]));
}

/** The checksum that a line begins with. */
export function lineSum(line: Buffer): string {
  return line.toString('latin1', 0, PREFIX_BYTES - 1);
}

function sealed(text: Buffer): Buffer {
  const sum = crc32c(text).toString(16).padStart(8, '0');
  return Buffer.concat([Buffer.from(`${sum} `), text, Buffer.from('\n')]);
}

/** What stands behind a line's checksum (without its line feed), or why it cannot be used. */
function lineText(line: Buffer): { text: Buffer } | { damage: string } {
  const prefix = line.subarray(0, PREFIX_BYTES).toString('latin1');
  if (!PREFIX.test(prefix)) return { damage: 'does not begin with a checksum' };
  const text = line.subarray(PREFIX_BYTES);
  if (crc32c(text) !== Number.parseInt(prefix, 16)) return { damage: 'fails its checksum' };
  return { text };
}

/** True if `line` begins with a whole line, followed by something that is no padding of zeros. */
function holdsWholeLine(line: Buffer): boolean {
  const prefix = line.subarray(0, PREFIX_BYTES).toString('latin1');
  if (!PREFIX.test(prefix)) return false;
  const wanted = Number.parseInt(prefix, 16);
  let end = line.length;
  while (end > PREFIX_BYTES && line[end - 1] === 0) end--;
  let crc = 0;
  for (let at = PREFIX_BYTES; at < end - 1; at++) {
    crc = crc32c(line.subarray(at, at + 1), crc);
    if (crc === wanted && line[at] === 0x7d) return true; // '}'
  }
  return false;
}

/**
 * Reads a journal from its beginning and hands each transaction to `take`, in order. E_CORRUPT with
 * the file, the line's number and what is wrong; E_IO.
 */
export async function readJournal(
  path: string,
  take: (transaction: Transaction) => void,
): Promise<JournalText> {
  let file: FileHandle;
  try {
    file = await open(path, 'r');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') {
      throw new SnowflockError('E_NOT_FOUND', `no store: ${path} is missing`, { cause: error });
    }
    throw new SnowflockError('E_IO', `cannot read ${path}: ${code}`, { cause: error });
  }
  try {
    return await readLines(file, path, take);
  } finally {
    await file.close();
  }
}

async function readLines(
  file: FileHandle,
  path: string,
  take: (transaction: Transaction) => void,
): Promise<JournalText> {
  let header: Header | undefined;
  let lines = 0;
  let validBytes = 0;
  let lastLine: Buffer = Buffer.alloc(0);
  let bad: { damage: string; line: Buffer } | undefined;
  const corrupt = (number: number, what: string) =>
    new SnowflockError('E_CORRUPT', `${path} line ${number} ${what}`);

  const parse = (line: Buffer): void => {
    lines++;
    if (bad !== undefined) throw corrupt(lines - 1, bad.damage);
    const checked = lineText(line);
    if ('damage' in checked) {
      if (header === undefined) throw corrupt(1, checked.damage);
      bad = { damage: checked.damage, line };
      return;
    }
    let json = checked.text;
    if (header !== undefined) {
      const after = json.subarray(0, PREFIX_BYTES).toString('latin1');
      if (!PREFIX.test(after)) throw corrupt(lines, 'does not say what it follows');
      if (after !== `${lineSum(lastLine)} `) {
        throw corrupt(lines, 'does not follow the one before it: lines are missing or moved');
      }
      json = json.subarray(PREFIX_BYTES);
    }
    let value: unknown;
    try {
      value = JSON.parse(json.toString('utf8'));
    } catch {
      throw corrupt(lines, 'is not JSON');
    }
    const misfit = header === undefined ? headerMisfit(value) : transactionMisfit(value);
    if (misfit !== undefined) throw corrupt(lines, `does not fit its schema: ${misfit}`);
    if (header === undefined) header = value as Header;
    else take(value as Transaction);
    validBytes += line.length + 1;
    lastLine = line;
  };

  const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
  let pieces: Buffer[] = []; // of a line whose end was not read yet
  let pieceBytes = 0;
  let size = 0;
  for (;;) {
    const { bytesRead } = await file.read(chunk, 0, CHUNK_BYTES, size).catch((error: unknown) => {
      const { code } = error as NodeJS.ErrnoException;
      throw new SnowflockError('E_IO', `cannot read ${path}: ${code}`, { cause: error });
    });
    if (bytesRead === 0) break;
    size += bytesRead;
    if (size > MAX_JOURNAL_BYTES) {
      throw new SnowflockError('E_CORRUPT', `${path} is larger than ${MAX_JOURNAL_BYTES} bytes`);
    }
    let from = 0;
    for (let at = chunk.indexOf(10); at !== -1 && at < bytesRead; at = chunk.indexOf(10, from)) {
      pieces.push(Buffer.from(chunk.subarray(from, at)));
      parse(pieces.length === 1 ? (pieces[0] as Buffer) : Buffer.concat(pieces));
      pieces = [];
      pieceBytes = 0;
      from = at + 1;
    }
    if (from < bytesRead) {
      pieces.push(Buffer.from(chunk.subarray(from, bytesRead)));
      pieceBytes += bytesRead - from;
      if (pieceBytes > MAX_LINE_BYTES) {
        throw corrupt(lines + 1, `is longer than ${MAX_LINE_BYTES} bytes`);
      }
    }
  }
  const tail = Buffer.concat(pieces);
  if (tail.length > 0) {
    lines++;
    if (bad !== undefined) throw corrupt(lines - 1, bad.damage);
    bad = { damage: 'is cut short', line: tail };
  }
  if (header === undefined) throw corrupt(1, 'is missing or cut short');
  if (bad !== undefined && holdsWholeLine(bad.line)) {
    throw corrupt(lines, 'is followed by something else than a line feed');
  }
  return {
    header,
    lastLine: Buffer.concat([lastLine, Buffer.from('\n')]),
    lastSum: lineSum(lastLine),
    validBytes,
    tornBytes: size - validBytes,
  };
}

import { SnowflockError } from '../common/errors.js';

/** Longest line in either direction, newline included. */
export const LINE_BYTES = 65_536;
/** Most payload bytes of one `stdin`, `stdout` or `stderr` line. */
export const DATA_BYTES = 32_768;
/** Makes the receiver discard the line it has begun, and this one: sent when a stream (re)starts. */
export const CANCEL = '\x18\n';

/** A line of the guest protocol (docs/guest-protocol.md), values decoded. */
export interface GuestLine {
  verb: string;
  /** The second word if it is not `key=value`, else ''. */
  id: string;
  /** For `call` and `reply`: the third word, likewise. */
  what: string;
  args: Record<string, string>;
}

const PLAIN = /^[!-$&-~]*$/;

/** Percent-encodes everything but printable ASCII without `%`. No NUL: E_ARGUMENT. */
export function encodeValue(text: string): string {
  if (PLAIN.test(text)) return text;
  let out = '';
  for (const byte of Buffer.from(text, 'utf8')) {
    if (byte === 0) throw new SnowflockError('E_ARGUMENT', 'a guest protocol value holds a NUL');
    const plain = byte > 0x20 && byte < 0x7f && byte !== 0x25;
    out += plain
      ? String.fromCharCode(byte)
      : `%${byte.toString(16).toUpperCase().padStart(2, '0')}`;
  }
  return out;
}

/** The reverse of `encodeValue`; undefined if malformed. */
export function decodeValue(text: string): string | undefined {
  if (!text.includes('%')) return text;
  if (/%(?![0-9A-Fa-f]{2})|%00/.test(text)) return undefined;
  const bytes = text.replace(/%(..)/g, (_, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  );
  return Buffer.from(bytes, 'latin1').toString('utf8');
}

/** One line with its newline. E_ARGUMENT if a word cannot be sent or the line is too long. */
export function encodeLine(words: readonly string[], args: Record<string, string> = {}): string {
  let line = words.join(' ');
  if (words.some((word) => !/^[\w.:-]+$/.test(word))) {
    throw new SnowflockError('E_ARGUMENT', `not a word of the guest protocol: ${line}`);
  }
  for (const [key, value] of Object.entries(args)) {
    if (!/^[a-z][a-z0-9_]*$/.test(key)) {
      throw new SnowflockError('E_ARGUMENT', `not a key of the guest protocol: ${key}`);
    }
    line += ` ${key}=${encodeValue(value)}`;
  }
  if (line.length + 1 > LINE_BYTES) {
    throw new SnowflockError('E_ARGUMENT', `${words[0]} line is longer than ${LINE_BYTES} bytes`);
  }
  return `${line}\n`;
}

/** Takes a line apart; undefined if malformed (hostile or damaged: the caller drops it). */
export function decodeLine(text: string): GuestLine | undefined {
  const words = text.split(' ').filter((word) => word !== '');
  const [verb, ...rest] = words;
  if (verb === undefined || verb.includes('=')) return undefined;
  const bare: string[] = [];
  while (rest[0] !== undefined && !rest[0].includes('=')) bare.push(rest.shift() ?? '');
  if (bare.length > 2) return undefined;
  const args: Record<string, string> = Object.create(null) as Record<string, string>;
  for (const word of rest) {
    const at = word.indexOf('=');
    const value = decodeValue(word.slice(at + 1));
    if (at < 1 || value === undefined) return undefined;
    args[word.slice(0, at)] = value;
  }
  return { verb, id: bare[0] ?? '', what: bare[1] ?? '', args };
}

/**
 * Cuts a byte stream into lines. A line that holds the cancel mark or is longer than `LINE_BYTES`
 * is discarded as a whole; memory is bounded by one line.
 */
export class LineDecoder {
  #parts: Buffer[] = [];
  #bytes = 0;
  #discarding = false;
  /** Lines discarded so far. */
  discarded = 0;

  *feed(data: Buffer): Generator<string> {
    let at = 0;
    for (;;) {
      const newline = data.indexOf(0x0a, at);
      this.#keep(data.subarray(at, newline < 0 ? data.length : newline));
      if (newline < 0) return;
      const line = Buffer.concat(this.#parts);
      const bad = this.#discarding || line.includes(0x18) || line.includes(0);
      this.#parts = [];
      this.#bytes = 0;
      this.#discarding = false;
      at = newline + 1;
      if (bad) this.discarded++;
      else if (line.length > 0) yield line.toString('latin1');
    }
  }

  #keep(part: Buffer): void {
    if (part.length === 0 || this.#discarding) return;
    this.#bytes += part.length;
    if (this.#bytes > LINE_BYTES - 1) {
      this.#discarding = true;
      this.#parts = [];
    } else {
      this.#parts.push(part);
    }
  }
}

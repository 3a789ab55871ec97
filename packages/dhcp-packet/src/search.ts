/**
 * Option 119, domain search (RFC 3397): names as in DNS (RFC 1035, 3.1 and 4.1.4), with pointers into
 * the option. Names are ASCII in lower or upper case, without the final dot.
 *
 * Decoding is bounded: a pointer must go back to before the name part it is in, so that each jump
 * comes nearer to the beginning; a name has at most 255 bytes, a list at most 64 names. Encoding
 * writes no pointers: some clients cannot follow them, and the lists are short.
 */
import { DhcpPacketError } from './error.js';

const MAX_NAME_BYTES = 255;
const MAX_LABEL_BYTES = 63;
const MAX_NAMES = 64;
const LABEL = /^[A-Za-z0-9_-]{1,63}$/;

function refuse(what: string): never {
  throw new DhcpPacketError('option-value', `option 119: ${what}`);
}

/** DhcpPacketError `option-value` for what is no domain name, and beyond 64 names. */
export function encodeSearch(names: readonly string[]): Uint8Array {
  if (names.length > MAX_NAMES) refuse(`more than ${MAX_NAMES} names`);
  return Uint8Array.from(
    names.flatMap((name) => {
      const labels = name.split('.');
      if (name.length + 2 > MAX_NAME_BYTES || !labels.every((label) => LABEL.test(label))) {
        refuse('no domain name');
      }
      return [...labels.flatMap((label) => [label.length, ...Buffer.from(label)]), 0];
    }),
  );
}

/** The name at `start` and where the next begins. */
function readName(value: Uint8Array, start: number): { name: string; next: number } {
  const labels: string[] = [];
  let bytes = 1;
  let at = start;
  /** Where the part began that is being read: pointers go to before it. */
  let part = start;
  let next: number | undefined;
  for (;;) {
    const length = value[at];
    if (length === undefined) refuse('a name is cut off');
    if (length === 0) break;
    if (length >= 0xc0) {
      const low = value[at + 1];
      if (low === undefined) refuse('a pointer is cut off');
      next ??= at + 2;
      const target = (length & 0x3f) * 256 + low;
      if (target >= part) refuse('a pointer does not go back');
      part = target;
      at = target;
      continue;
    }
    if (length > MAX_LABEL_BYTES) refuse('a label of an unknown kind');
    if (at + 1 + length > value.length) refuse('a label is cut off');
    const label = Buffer.from(value.subarray(at + 1, at + 1 + length)).toString('latin1');
    if (!LABEL.test(label)) refuse('a label is no name');
    bytes += length + 1;
    if (bytes > MAX_NAME_BYTES) refuse('a name is too long');
    labels.push(label);
    at += length + 1;
  }
  if (labels.length === 0) refuse('an empty name');
  return { name: labels.join('.'), next: next ?? at + 1 };
}

/** DhcpPacketError `option-value` if anything in it is no name. */
export function decodeSearch(value: Uint8Array): string[] {
  const names: string[] = [];
  for (let at = 0; at < value.length; ) {
    if (names.length === MAX_NAMES) refuse(`more than ${MAX_NAMES} names`);
    const { name, next } = readName(value, at);
    names.push(name);
    at = next;
  }
  if (names.length === 0) refuse('no name');
  return names;
}

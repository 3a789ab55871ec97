/**
 * Compact form of a page bitmap: the lengths of its runs, as LEB128 numbers, the first run being of
 * zero bits (and possibly empty). A guest's free memory is a few long runs, so 16 KB of bitmap for
 * 512 MiB become some hundred bytes.
 *
 * Invariants of the encoded form, checked when decoding: runs add up to exactly `pages`; no run but
 * the first is empty; numbers are of minimal length. So each bitmap has one encoding, and a short
 * input cannot stand for much work.
 */
import { SnowflockError } from '../common/errors.js';

export function bitmapBytes(pages: number): number {
  return Math.ceil(pages / 8);
}

function bad(what: string): never {
  throw new SnowflockError('E_DESCRIPTOR', `zero map: ${what}`);
}

/** End of the run that begins at `at`: the first page from there with another bit, or `pages`. */
function runEnd(bitmap: Buffer, at: number, bit: number, pages: number): number {
  const whole = bit === 1 ? 0xff : 0x00;
  let page = at;
  while (page < pages) {
    if ((page & 7) === 0) {
      let byte = page / 8;
      while (byte < bitmap.length && bitmap[byte] === whole) byte++;
      page = byte * 8;
      if (page >= pages) break;
    }
    const value = bitmap[Math.floor(page / 8)] ?? 0;
    if (((value >> (page & 7)) & 1) !== bit) return page;
    page++;
  }
  return pages;
}

/** @throws E_ARGUMENT if the bitmap is not `pages` bits long or has spare bits set. */
export function encodeZeroMap(bitmap: Buffer, pages: number): Buffer {
  if (bitmap.length !== bitmapBytes(pages)) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `zero map of ${bitmap.length} bytes for ${pages} pages, not ${bitmapBytes(pages)}`,
    );
  }
  const spare = pages & 7;
  if (spare !== 0 && (bitmap[bitmap.length - 1] ?? 0) >> spare !== 0) {
    throw new SnowflockError('E_ARGUMENT', 'zero map: bits past the last page are set');
  }
  let out = Buffer.alloc(4096);
  let length = 0;
  let bit = 0;
  for (let page = 0; page < pages; ) {
    const end = runEnd(bitmap, page, bit, pages);
    let run = end - page;
    if (length + 8 > out.length) out = Buffer.concat([out], out.length * 2);
    // Not with shifts: a run may be longer than 31 bits.
    while (run > 0x7f) {
      out[length++] = (run % 0x80) | 0x80;
      run = Math.floor(run / 0x80);
    }
    out[length++] = run;
    page = end;
    bit ^= 1;
  }
  return out.subarray(0, length);
}

function setRun(bitmap: Buffer, from: number, to: number): void {
  let page = from;
  while (page < to && (page & 7) !== 0) setBit(bitmap, page++);
  const wholeEnd = page + Math.floor((to - page) / 8) * 8;
  if (wholeEnd > page) {
    bitmap.fill(0xff, page / 8, wholeEnd / 8);
    page = wholeEnd;
  }
  while (page < to) setBit(bitmap, page++);
}

function setBit(bitmap: Buffer, page: number): void {
  const at = Math.floor(page / 8);
  bitmap[at] = (bitmap[at] ?? 0) | (1 << (page & 7));
}

/** @throws E_DESCRIPTOR if `encoded` is not the encoding of a bitmap of `pages` bits. */
export function decodeZeroMap(encoded: Buffer, pages: number): Buffer {
  const bitmap = Buffer.alloc(bitmapBytes(pages));
  let at = 0;
  let page = 0;
  let bit = 0;
  for (let index = 0; at < encoded.length; index++) {
    let run = 0;
    let scale = 1;
    let byte: number;
    do {
      const next = encoded[at++];
      if (next === undefined) bad('cut short');
      byte = next;
      run += (byte & 0x7f) * scale;
      scale *= 0x80;
      if (run > pages) bad('a run is longer than the RAM');
    } while (byte >= 0x80);
    if (byte === 0 && scale > 0x80) bad('a number is not in its shortest form');
    if (run === 0 && index > 0) bad('an empty run');
    if (page + run > pages) bad('runs are longer than the RAM');
    if (bit === 1) setRun(bitmap, page, page + run);
    page += run;
    bit ^= 1;
  }
  if (page !== pages) bad('runs are shorter than the RAM');
  return bitmap;
}

/** Runs of pages, [first, count, ...], as a bitmap. @throws E_ARGUMENT for a run out of range. */
export function bitmapOfRuns(runs: readonly number[], pages: number): Buffer {
  const bitmap = Buffer.alloc(bitmapBytes(pages));
  for (let i = 0; i + 1 < runs.length; i += 2) {
    const [first = 0, count = 0] = runs.slice(i, i + 2);
    if (first < 0 || count < 0 || first + count > pages) {
      throw new SnowflockError('E_ARGUMENT', `zero map: run ${first}+${count} of ${pages} pages`);
    }
    setRun(bitmap, first, first + count);
  }
  return bitmap;
}

/** The set bits of a bitmap as runs, [first, count, ...], ascending. */
export function runsOfBitmap(bitmap: Buffer, pages: number): number[] {
  const runs: number[] = [];
  for (let page = runEnd(bitmap, 0, 0, pages); page < pages; ) {
    const end = runEnd(bitmap, page, 1, pages);
    runs.push(page, end - page);
    page = runEnd(bitmap, end, 0, pages);
  }
  return runs;
}

import { SnowflockError } from '../common/errors.js';

/**
 * Unpacks one LZ4 block (lz4_Block_format.md) from `input[at..end)` into `output` at `to`.
 * Returns the position behind the last byte written.
 */
export function lz4Block(
  input: Uint8Array,
  at: number,
  end: number,
  output: Uint8Array,
  to: number,
): number {
  const damaged = () => new SnowflockError('E_CORRUPT', 'LZ4 block is damaged');
  const byte = () => {
    const value = at < end ? input[at++] : undefined;
    if (value === undefined) throw damaged();
    return value;
  };
  const length = (nibble: number) => {
    let total = nibble;
    if (nibble === 15) {
      let more: number;
      do {
        more = byte();
        total += more;
      } while (more === 255);
    }
    return total;
  };
  while (at < end) {
    const token = byte();
    const literals = length(token >> 4);
    if (at + literals > end || to + literals > output.length) throw damaged();
    output.set(input.subarray(at, at + literals), to);
    at += literals;
    to += literals;
    if (at === end) break; // the last sequence has literals only
    const offset = byte() | (byte() << 8);
    const match = length(token & 15) + 4;
    if (offset === 0 || offset > to || to + match > output.length) throw damaged();
    if (offset >= match) {
      output.copyWithin(to, to - offset, to - offset + match);
      to += match;
    } else {
      // Source and target overlap: the copy repeats what it has just written.
      for (let i = 0; i < match; i++, to++) output[to] = output[to - offset] ?? 0;
    }
  }
  return to;
}

export const LZ4_LEGACY_MAGIC = 0x184c2102;
const LEGACY_BLOCK_BYTES = 8 << 20;

/**
 * Unpacks an LZ4 stream of the legacy frame format (what the kernel's `lz4 -l` writes): the magic,
 * then blocks of at most 8 MiB unpacked, each behind its packed length. Ends at the end of the
 * input, or at a length of 0 or longer than what is left (the kernel appends the unpacked size).
 */
export function unpackLz4Legacy(input: Uint8Array): Uint8Array {
  const view = new DataView(input.buffer, input.byteOffset, input.byteLength);
  if (input.length < 4 || view.getUint32(0, true) !== LZ4_LEGACY_MAGIC) {
    throw new SnowflockError('E_CORRUPT', 'not an LZ4 legacy stream');
  }
  const blocks: Uint8Array[] = [];
  let at = 4;
  while (at + 4 <= input.length) {
    const packed = view.getUint32(at, true);
    if (packed === 0 || at + 4 + packed > input.length) break;
    const block = new Uint8Array(LEGACY_BLOCK_BYTES);
    const bytes = lz4Block(input, at + 4, at + 4 + packed, block, 0);
    blocks.push(block.subarray(0, bytes));
    at += 4 + packed;
    if (bytes < LEGACY_BLOCK_BYTES) break; // only the last block is shorter
  }
  return Buffer.concat(blocks);
}

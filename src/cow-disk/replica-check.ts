import { type FileHandle, open, stat } from 'node:fs/promises';

const HEADER_BYTES = 4096;
const BLOCK_BYTES = 1 << 20;

export interface ReplicaCheck {
  /** File and what is wrong with it. */
  errors: ['data' | 'map', string][];
  /** Every page is data or a known zero page. Nothing if there are errors. */
  complete: boolean;
}

/**
 * A replica's two files, at rest (native/pagestore/replica.h): they fit each other and `generation`.
 * Changes nothing. E_IO.
 */
export async function checkReplica(
  path: string,
  generation: string,
  size_bytes: number,
): Promise<ReplicaCheck> {
  const errors: ReplicaCheck['errors'] = [];
  const pages = Math.ceil(size_bytes / 4096);
  const bitmap_bytes = Math.ceil(Math.ceil(pages / 8) / 4096) * 4096;
  const map = await open(`${path}.map`, 'r');
  try {
    const header = Buffer.alloc(128);
    await map.read(header, 0, header.length, 0);
    const { size } = await map.stat();
    if (header.every((byte) => byte === 0)) return { errors, complete: false }; // nothing came yet
    const of = header.toString('latin1', 24, 88).replace(/\0+$/, '');
    if (header.toString('latin1', 0, 8) !== 'SFREPL02')
      errors.push(['map', 'is no map of a replica']);
    else if (of !== generation) errors.push(['map', `is of generation ${of}`]);
    else if (
      header.readBigUInt64LE(8) !== BigInt(pages) ||
      size !== HEADER_BYTES + 4 * bitmap_bytes
    ) {
      errors.push(['map', 'is of a generation of another size']);
    }
    if (errors.length > 0) return { errors, complete: false };
    const { present, known } = await count(map, pages, bitmap_bytes);
    const data = await stat(path);
    if (data.size !== pages * 4096 && (present > 0 || data.size > pages * 4096)) {
      errors.push(['data', `has ${data.size} bytes instead of ${pages * 4096}`]);
    }
    return { errors, complete: errors.length === 0 && known === pages };
  } finally {
    await map.close();
  }
}

/** Pages with data, and pages with data or known to be zeros, in the bitmaps as true now. */
async function count(
  map: FileHandle,
  pages: number,
  bitmap_bytes: number,
): Promise<{ present: number; known: number }> {
  let [present, known] = [0, 0];
  const [data, zero] = [Buffer.alloc(BLOCK_BYTES), Buffer.alloc(BLOCK_BYTES)];
  const end = Math.ceil(pages / 8);
  for (let at = 0; at < end; at += BLOCK_BYTES) {
    const bytes = Math.min(BLOCK_BYTES, end - at);
    await map.read(data, 0, bytes, HEADER_BYTES + at);
    await map.read(zero, 0, bytes, HEADER_BYTES + bitmap_bytes + at);
    for (let i = 0; i < bytes; i++) {
      present += BITS[data[i] ?? 0] ?? 0;
      known += BITS[(data[i] ?? 0) | (zero[i] ?? 0)] ?? 0;
    }
  }
  return { present, known };
}

const BITS = Uint8Array.from({ length: 256 }, (_, byte) => {
  let bits = 0;
  for (let left = byte; left > 0; left >>= 1) bits += left & 1;
  return bits;
});

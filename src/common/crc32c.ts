/** CRC-32C (Castagnoli polynomial, RFC 3720 section 12.1), reflected, as the data plane computes it. */
const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc >>> 0;
});

/** The CRC of `data`, or of what came before (its CRC in `before`) followed by `data`. */
export function crc32c(data: Uint8Array, before = 0): number {
  let crc = ~before >>> 0;
  for (let i = 0; i < data.length; i++) {
    crc = (crc >>> 8) ^ (TABLE[(crc ^ (data[i] as number)) & 0xff] as number);
  }
  return ~crc >>> 0;
}

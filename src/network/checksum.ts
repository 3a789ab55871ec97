/**
 * The Internet checksum (RFC 1071): of `bytes`, an odd last one padded, and of what `start` has
 * summed already (a pseudo header). As it stands in a header.
 */
export function checksum(bytes: Uint8Array, start = 0): number {
  let sum = start;
  for (let i = 0; i < bytes.length; i += 2) sum += ((bytes[i] ?? 0) << 8) | (bytes[i + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

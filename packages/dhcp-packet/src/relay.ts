/**
 * Option 82, relay agent information (RFC 3046): sub-options by their codes. Servers give it back as
 * it came; this is for those who look into it.
 */
import { DhcpPacketError } from './error.js';

export const RelaySubOption = { CIRCUIT_ID: 1, REMOTE_ID: 2 } as const;

/** DhcpPacketError `option-value` for a code out of 1..254 or a value longer than 255 bytes. */
export function encodeRelay(subOptions: ReadonlyMap<number, Uint8Array>): Uint8Array {
  return Uint8Array.from(
    [...subOptions].flatMap(([code, value]) => {
      if (!Number.isInteger(code) || code < 1 || code > 254 || value.length > 255) {
        throw new DhcpPacketError('option-value', `option 82: sub-option ${code} cannot be set`);
      }
      return [code, value.length, ...value];
    }),
  );
}

/** There is no pad and no end in it. DhcpPacketError `option-value` if cut off, or code twice. */
export function decodeRelay(value: Uint8Array): Map<number, Uint8Array> {
  const found = new Map<number, Uint8Array>();
  for (let at = 0; at < value.length; ) {
    const code = value[at] ?? 0;
    const length = value[at + 1];
    if (length === undefined || at + 2 + length > value.length || found.has(code)) {
      throw new DhcpPacketError('option-value', 'option 82 has a sub-option cut off or twice');
    }
    found.set(code, value.slice(at + 2, at + 2 + length));
    at += 2 + length;
  }
  return found;
}

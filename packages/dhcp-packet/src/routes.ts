/** Option 121, classless static routes (RFC 3442). */
import { DhcpPacketError } from './error.js';
import { addressNumber, addressText, u32 } from './options.js';

export interface Route {
  /** The network's address in dotted form, bits behind the prefix zero. */
  destination: string;
  /** 0..32. */
  prefixBits: number;
  /** 0.0.0.0: the destination is on the link. */
  router: string;
}

const maskOf = (bits: number) => (bits === 0 ? 0 : (0xffff_ffff << (32 - bits)) >>> 0);

/** DhcpPacketError `option-value` if a prefix is out of range or the address has bits behind it. */
export function encodeRoutes(routes: readonly Route[]): Uint8Array {
  return Uint8Array.from(
    routes.flatMap(({ destination, prefixBits, router }) => {
      const network = addressNumber(destination);
      if (
        !Number.isInteger(prefixBits) ||
        prefixBits < 0 ||
        prefixBits > 32 ||
        (network & ~maskOf(prefixBits)) !== 0
      ) {
        throw new DhcpPacketError('option-value', `${destination}/${prefixBits} is no network`);
      }
      const significant = u32(network).subarray(0, Math.ceil(prefixBits / 8));
      return [prefixBits, ...significant, ...u32(addressNumber(router))];
    }),
  );
}

/**
 * Bits behind a prefix are cleared, as RFC 3442 wants of clients. DhcpPacketError `option-value` if
 * a prefix is longer than 32 bits, a route is cut off or there is none.
 */
export function decodeRoutes(value: Uint8Array): Route[] {
  const view = new DataView(value.buffer, value.byteOffset, value.byteLength);
  const routes: Route[] = [];
  for (let at = 0; at < value.length; ) {
    const prefixBits = view.getUint8(at++);
    const bytes = Math.ceil(prefixBits / 8);
    if (prefixBits > 32 || at + bytes + 4 > value.length) {
      throw new DhcpPacketError(
        'option-value',
        'option 121 has a route that is cut off or too wide',
      );
    }
    let network = 0;
    for (let i = 0; i < bytes; i++) network += view.getUint8(at + i) * 2 ** (24 - 8 * i);
    at += bytes;
    routes.push({
      destination: addressText((network & maskOf(prefixBits)) >>> 0),
      prefixBits,
      router: addressText(view.getUint32(at)),
    });
    at += 4;
  }
  if (routes.length === 0) throw new DhcpPacketError('option-value', 'option 121 has no route');
  return routes;
}

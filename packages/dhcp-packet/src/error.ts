export type DhcpPacketReason =
  | 'short' // less than the fixed part and the magic cookie
  | 'long' // more than one Ethernet frame holds
  | 'op'
  | 'hardware-length'
  | 'cookie' // BOOTP, or no DHCP at all
  | 'option-length' // an option goes beyond the field it is in
  | 'option-value'
  | 'overload'
  | 'address';

/** The packet is not what it says or cannot be encoded. `reason` is stable. */
export class DhcpPacketError extends Error {
  override readonly name = 'DhcpPacketError';
  constructor(
    readonly reason: DhcpPacketReason,
    message: string,
  ) {
    super(message);
  }
}

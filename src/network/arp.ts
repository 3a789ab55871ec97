/** ARP for IPv4 on Ethernet (RFC 826). */
import { ipNumber, macBytes } from './addresses.js';

const FRAME_BYTES = 14 + 28;
const REQUEST = 1;

/** Who has `target`? Tell `sender`. To one MAC address. */
export function arpRequest(request: {
  destinationMac: string;
  senderMac: string;
  sender: string;
  target: string;
}): Buffer {
  const frame = Buffer.alloc(FRAME_BYTES);
  frame.set(macBytes(request.destinationMac), 0);
  frame.set(macBytes(request.senderMac), 6);
  frame.set([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, REQUEST], 12);
  frame.set(macBytes(request.senderMac), 22);
  frame.writeUInt32BE(ipNumber(request.sender), 28);
  frame.writeUInt32BE(ipNumber(request.target), 38);
  return frame;
}

/** Whether the frame is a reply. */
export function isArpReply(frame: Buffer): boolean {
  return frame.length >= FRAME_BYTES && frame.toString('hex', 12, 22) === '08060001080006040002';
}

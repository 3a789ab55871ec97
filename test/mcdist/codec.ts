/** The parity code and packed pages, as the native code exports them for tests. */
import { loadAddon } from '../../src/common/native.js';

export const PAGE_BYTES = 4096;
export const BLOCK_PAGES = 32;
export const MAX_PARITIES = 127;

/** `symbols` are 16 bytes: a number, big-endian, bit i of which is symbol i. */
export interface Cover {
  sender?: number;
  id: number;
  fragments: number;
  symbols: Buffer;
}

export interface ParityTable {
  add(
    block: number,
    cover: Cover,
    index: number,
    bytes: Buffer,
    missing: Buffer,
  ): 'held' | 'duplicate' | 'not-needed' | 'bad';
  need(
    block: number,
    fragments: number,
    sender: number,
    missing: Buffer,
    wanted: Buffer,
  ): [coverId: number, symbols: number];
  repairable(block: number, fragments: number, missing: Buffer): Buffer;
  /** Writes what it repairs into `pages`, and reads what is held of it. */
  repair(
    block: number,
    fragments: number,
    missing: Buffer,
    pages: Buffer,
    unreadableSymbol?: number,
  ): Buffer | 'unreadable' | null;
  settle(block: number, fragments: number, missing: Buffer): void;
  forget(block: number): void;
  state(block: number): { rows: number; blocks: number; bytes: number; evictedBlocks: number };
}

interface Codec {
  kernels(): { name: string; supported: boolean }[];
  multiplyAdd(kernel: string, dst: Buffer, src: Buffer, c: number): void;
  kernelFaults(kernel: string, rounds: number, seed: number): number;
  encode(
    block: Buffer,
    fragments: number,
    cover: Buffer,
    first: number,
    count: number,
    unreadablePage?: number,
  ): Buffer | null;
  ParityTable: new (options: {
    maxBlocks?: number;
    maxBytes?: number;
    /** Rows without bytes. */
    count?: true;
  }) => ParityTable;
  pack(page: Buffer, limit: number): Buffer | null;
  unpack(bytes: Buffer): Buffer | null;
}

export const { mcdistCodec: codec } = loadAddon<{ mcdistCodec: Codec }>('dataplane');

export const symbolBytes = (fragments: number): number => Math.ceil(PAGE_BYTES / fragments);

export function toWire(symbols: Iterable<number>): Buffer {
  let bits = 0n;
  for (const each of symbols) bits |= 1n << BigInt(each);
  return Buffer.from(bits.toString(16).padStart(32, '0'), 'hex');
}

export function fromWire(set: Buffer): number[] {
  const bits = BigInt(`0x${set.toString('hex')}`);
  return [...Array(128).keys()].filter((i) => ((bits >> BigInt(i)) & 1n) === 1n);
}

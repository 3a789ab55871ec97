/**
 * The descriptor's encoding (paper section 3.3: the architectural VM descriptor). Numbers are
 * big-endian.
 *
 *    0   8  magic `SFDESC\r\n`
 *    8   2  format version
 *   10   2  reserved, 0
 *   12   4  length of everything, digest included
 *   16   4  length of the header
 *   20   4  length of the device state, as stored;  24  4  and raw
 *   28   4  length of the zero map, as stored;      32  4  and raw
 *   36      header (JSON, schema.ts), device state (deflate), zero map (zero-map.ts, deflate)
 *  end  32  SHA-256 of all before it
 *
 * Invariants: magic, total length and digest stay where they are in every version, so that another
 * version is told from a damaged descriptor. Nothing is looked at before the digest fits, nothing is
 * inflated beyond its stated and bounded length. The digest is against accidents; against forgery
 * there is the mutual TLS that descriptors travel on.
 */
import { createHash } from 'node:crypto';
import { deflateRawSync, inflateRawSync } from 'node:zlib';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import { type Descriptor, DescriptorHeader } from './schema.js';
import { bitmapBytes, decodeZeroMap, encodeZeroMap } from './zero-map.js';

const MAGIC = Buffer.from('SFDESC\r\n', 'latin1');
export const DESCRIPTOR_VERSION = 1;
const PROLOGUE_BYTES = 36;
const DIGEST_BYTES = 32;

const MAX_HEADER_BYTES = 64 << 10;
const MAX_STATE_BYTES = 64 << 20;
const MAX_ZERO_MAP_BYTES = 64 << 20;
/** A longer input is refused unread. */
export const MAX_DESCRIPTOR_BYTES = 128 << 20;

const PAGE_BYTES = 4096;

function bad(what: string): never {
  throw new SnowflockError('E_DESCRIPTOR', `descriptor: ${what}`);
}

/** What is wrong with a header, without its values: keys must not get into logs. */
function headerErrors(value: unknown): string {
  const errors = Value.Errors(DescriptorHeader, value).slice(0, 3);
  return errors.map((error) => `${error.instancePath || '/'} ${error.message}`).join('; ');
}

/** Statements of the header that must agree with each other; undefined if they do. */
function inconsistency(header: DescriptorHeader): string | undefined {
  const { machine, ram } = header;
  if (machine.ram_bytes !== ram.pages * PAGE_BYTES) {
    return `${ram.pages} pages of RAM, but a machine with ${machine.ram_bytes} bytes`;
  }
  let offset = 0;
  let address = 0;
  for (const range of machine.ram_layout) {
    const aligned = range.length % PAGE_BYTES === 0 && range.guest_address % PAGE_BYTES === 0;
    if (!aligned || range.length === 0) return 'a RAM range is not whole pages';
    if (range.offset !== offset || range.guest_address < address) return 'RAM ranges overlap';
    offset += range.length;
    address = range.guest_address + range.length;
  }
  return offset === machine.ram_bytes ? undefined : 'the RAM ranges are not the RAM';
}

function headerOf(descriptor: Descriptor): DescriptorHeader {
  const { created_ms, parent, machine, ram, disk, identity } = descriptor;
  return { created_ms, parent, machine, ram, ...(disk ? { disk } : {}), identity };
}

/** @throws E_ARGUMENT if the descriptor is not one (schema, sizes). */
export function encodeDescriptor(descriptor: Descriptor): Buffer {
  const header = headerOf(descriptor);
  const refuse = (what: string): never => {
    throw new SnowflockError('E_ARGUMENT', `descriptor: ${what}`);
  };
  if (!Value.Check(DescriptorHeader, header)) refuse(headerErrors(header));
  const wrong = inconsistency(header);
  if (wrong !== undefined) refuse(wrong);
  if (descriptor.state.length > MAX_STATE_BYTES) refuse('the device state is too large');
  const runs = encodeZeroMap(descriptor.zero_map, header.ram.pages);
  if (runs.length > MAX_ZERO_MAP_BYTES) refuse('the zero map is too large');

  const json = Buffer.from(JSON.stringify(header), 'utf8');
  if (json.length > MAX_HEADER_BYTES) refuse('the header is too large');
  // Device state is mostly zeros and firmware; the fastest level takes it to a fifth.
  const state = deflateRawSync(descriptor.state, { level: 1 });
  const map = deflateRawSync(runs, { level: 6 });
  const prologue = Buffer.alloc(PROLOGUE_BYTES);
  MAGIC.copy(prologue);
  prologue.writeUInt16BE(DESCRIPTOR_VERSION, 8);
  const lengths = [json.length, state.length, descriptor.state.length, map.length, runs.length];
  lengths.forEach((length, index) => {
    prologue.writeUInt32BE(length, 16 + 4 * index);
  });
  const total = PROLOGUE_BYTES + json.length + state.length + map.length + DIGEST_BYTES;
  prologue.writeUInt32BE(total, 12);
  const hash = createHash('sha256').update(prologue).update(json).update(state).update(map);
  return Buffer.concat([prologue, json, state, map, hash.digest()], total);
}

function inflate(stored: Buffer, rawBytes: number, what: string): Buffer {
  let raw: Buffer;
  try {
    raw = inflateRawSync(stored, { maxOutputLength: Math.max(rawBytes, 1) });
  } catch (error) {
    throw new SnowflockError('E_DESCRIPTOR', `descriptor: ${what} does not inflate`, {
      cause: error,
    });
  }
  if (raw.length !== rawBytes) bad(`${what} is ${raw.length} bytes, not ${rawBytes}`);
  return raw;
}

/** Checks length, magic, digest and version, in the order that gives the truest error. */
function checkEnvelope(bytes: Buffer): void {
  if (bytes.length > MAX_DESCRIPTOR_BYTES) bad(`longer than ${MAX_DESCRIPTOR_BYTES} bytes`);
  if (bytes.length < PROLOGUE_BYTES + DIGEST_BYTES) bad('cut short');
  if (!bytes.subarray(0, MAGIC.length).equals(MAGIC)) bad('not a descriptor');
  const total = bytes.readUInt32BE(12);
  if (bytes.length < total) bad(`cut short: ${bytes.length} bytes of ${total}`);
  if (bytes.length > total) bad(`${bytes.length - total} bytes too long`);
  const body = bytes.subarray(0, total - DIGEST_BYTES);
  const digest = createHash('sha256').update(body).digest();
  if (!digest.equals(bytes.subarray(total - DIGEST_BYTES))) bad('altered (its digest differs)');
  const version = bytes.readUInt16BE(8);
  if (version !== DESCRIPTOR_VERSION) {
    throw new SnowflockError(
      'E_DESCRIPTOR_VERSION',
      `descriptor of format ${version}; this program reads format ${DESCRIPTOR_VERSION}`,
    );
  }
  if (bytes.readUInt16BE(10) !== 0) bad('reserved bits are set');
}

/** @throws E_DESCRIPTOR (cut short, altered, too long, ill-formed), E_DESCRIPTOR_VERSION. */
export function decodeDescriptor(bytes: Buffer): Descriptor {
  checkEnvelope(bytes);
  const length = (index: number) => bytes.readUInt32BE(16 + 4 * index);
  const [headerBytes, stateStored, stateRaw] = [length(0), length(1), length(2)];
  const [mapStored, mapRaw] = [length(3), length(4)];
  const sum = PROLOGUE_BYTES + headerBytes + stateStored + mapStored + DIGEST_BYTES;
  if (sum !== bytes.length) bad('its parts do not add up to its length');
  if (headerBytes > MAX_HEADER_BYTES) bad('the header is too large');
  if (stateRaw > MAX_STATE_BYTES) bad('the device state is too large');
  if (mapRaw > MAX_ZERO_MAP_BYTES) bad('the zero map is too large');
  const stateAt = PROLOGUE_BYTES + headerBytes;
  const mapAt = stateAt + stateStored;

  let header: unknown;
  try {
    const text = new TextDecoder('utf-8', { fatal: true });
    header = JSON.parse(text.decode(bytes.subarray(PROLOGUE_BYTES, stateAt)));
  } catch {
    bad('the header is not JSON');
  }
  if (!Value.Check(DescriptorHeader, header)) bad(`header: ${headerErrors(header)}`);
  const wrong = inconsistency(header);
  if (wrong !== undefined) bad(wrong);
  // The bitmap it stands for is as large as the RAM's page count says; bound that as well.
  if (bitmapBytes(header.ram.pages) > MAX_ZERO_MAP_BYTES) bad('the RAM is too large');
  const state = inflate(bytes.subarray(stateAt, mapAt), stateRaw, 'the device state');
  const runs = inflate(bytes.subarray(mapAt, mapAt + mapStored), mapRaw, 'the zero map');
  return { ...header, state, zero_map: decodeZeroMap(runs, header.ram.pages) };
}

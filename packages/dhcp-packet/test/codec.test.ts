import fc from 'fast-check';
import { expect, test } from 'vitest';
import {
  addresses,
  type DhcpPacket,
  DhcpPacketError,
  decode,
  encode,
  MAX_PACKET_BYTES,
  MessageType,
  Option,
  readAddress,
  readU8,
  u8,
} from '../src/index.js';

const SEED = Number(process.env.SNOWFLOCK_SEED ?? Date.now() % 2 ** 31);
console.log(`dhcp codec seed ${SEED} (SNOWFLOCK_SEED repeats it)`);
const RUNS = { seed: SEED, numRuns: 20_000 };

const packet = (options: [number, Uint8Array][]): DhcpPacket => ({
  op: 1,
  hardwareType: 1,
  hops: 0,
  xid: 0xdeadbeef,
  secs: 3,
  flags: 0x8000,
  ciaddr: '0.0.0.0',
  yiaddr: '10.86.0.3',
  siaddr: '0.0.0.0',
  giaddr: '0.0.0.0',
  hardwareAddress: Uint8Array.of(0x52, 0x54, 0, 0x53, 0x46, 1),
  options: new Map(options),
});

/** A packet whose three option fields hold these bytes. */
function raw(options: number[], file: number[] = [], sname: number[] = []): Uint8Array {
  const bytes = new Uint8Array(240 + options.length);
  bytes.set(encode(packet([])).subarray(0, 240));
  bytes.set(sname, 44);
  bytes.set(file, 108);
  bytes.set(options, 240);
  return bytes;
}

function reasonOf(bytes: Uint8Array): string {
  try {
    decode(bytes);
    return 'decoded';
  } catch (error) {
    if (error instanceof DhcpPacketError) return error.reason;
    throw error;
  }
}

test('what is encoded is decoded, options longer than 255 bytes included', () => {
  const sent = packet([
    [Option.MESSAGE_TYPE, u8(MessageType.OFFER)],
    [Option.SERVER_ID, addresses('10.86.0.1')],
    [Option.CLASSLESS_ROUTES, new Uint8Array(600).fill(7)],
    [Option.HOST_NAME, new Uint8Array(0)],
  ]);
  const received = decode(encode(sent));
  expect({ ...received, options: undefined }).toEqual({ ...sent, options: undefined });
  for (const [code, value] of sent.options) {
    expect(Buffer.from(received.options.get(code) ?? [0xbad])).toEqual(Buffer.from(value));
  }
  expect(readAddress(received.options, Option.SERVER_ID)).toBe('10.86.0.1');
});

test('options keep their order, but the message type comes first and 82 last', () => {
  const sent = [Option.RELAY_AGENT, 200, Option.MESSAGE_TYPE, Option.ROUTER];
  const bytes = encode(packet(sent.map((code) => [code, Uint8Array.of(code)])));
  expect([0, 3, 6, 9, 12].map((at) => bytes[240 + at])).toEqual([53, 200, 3, 82, 255]);
});

test('what does not fit goes to file, then to sname; the relay information stays', () => {
  const relay: [number, Uint8Array] = [Option.RELAY_AGENT, Uint8Array.of(1, 1, 7)];
  const type: [number, Uint8Array] = [Option.MESSAGE_TYPE, u8(MessageType.ACK)];
  const big = (code: number, bytes: number): [number, Uint8Array] => [
    code,
    new Uint8Array(bytes).fill(code),
  ];
  // 276 bytes leave 35 for options and END: 53, 52 and 82 take 11 of them.
  const intoFile = packet([relay, big(12, 100), type, big(6, 4)]);
  const one = encode(intoFile, 276);
  expect([...one.subarray(240, 246)]).toEqual([53, 1, 5, 52, 1, 1]);
  expect([...one.subarray(246, 257)]).toEqual([6, 4, 6, 6, 6, 6, 82, 3, 1, 1, 7]);
  expect(one[257]).toBe(255);
  expect([...one.subarray(108, 110), one[210]]).toEqual([12, 100, 255]);
  expect(decode(one).options).toEqual(
    new Map([type, big(6, 4), relay, big(12, 100)].map(([code, value]) => [code, value])),
  );
  const intoBoth = packet([type, big(12, 100), big(15, 60), big(6, 4)]);
  const two = encode(intoBoth, 276);
  expect(two[245]).toBe(3);
  expect([two[44], two[108]]).toEqual([15, 12]);
  expect(decode(two).options).toEqual(new Map(intoBoth.options));
  // One value in parts through all three fields.
  const parts = packet([type, big(121, 200)]);
  expect(Buffer.from(decode(encode(parts, 276)).options.get(121) ?? [])).toEqual(
    Buffer.alloc(200, 121),
  );
  expect(() => encode(packet([type, big(121, 230)]), 276)).toThrow(
    expect.objectContaining({ reason: 'long' }),
  );
});

test('a packet is padded to 300 bytes and never longer than asked', () => {
  expect(encode(packet([]))).toHaveLength(300);
  const long = packet([[Option.MESSAGE, new Uint8Array(600)]]);
  expect(() => encode(long, 576)).toThrow(expect.objectContaining({ reason: 'long' }));
});

test('options that lie about their length refuse the packet', () => {
  expect(reasonOf(raw([53, 1]))).toBe('option-length');
  expect(reasonOf(raw([53]))).toBe('option-length');
  expect(reasonOf(raw([53, 255, 1, 255]))).toBe('option-length');
  expect(reasonOf(raw([53, 1, 1, 50, 4, 10, 86]))).toBe('option-length');
});

test('a missing END is tolerated behind a whole option, as are pads and bytes behind END', () => {
  expect(readU8(decode(raw([53, 1, 1])).options, 53)).toBe(1);
  expect(decode(raw([0, 0, 53, 1, 3, 0, 255, 50, 200])).options).toEqual(
    new Map([[53, Uint8Array.of(3)]]),
  );
});

test('overload: options go on in file and then sname; nesting and odd values are refused', () => {
  const both = decode(raw([52, 1, 3, 12, 1, 97, 255], [12, 1, 98, 255], [12, 1, 99, 255]));
  expect(Buffer.from(both.options.get(12) ?? []).toString()).toBe('abc');
  const file = decode(raw([52, 1, 1, 255], [53, 1, 1, 255], [53, 200]));
  expect(readU8(file.options, 53)).toBe(1);
  expect(reasonOf(raw([52, 1, 1, 255], [52, 1, 2, 255]))).toBe('overload');
  expect(reasonOf(raw([52, 1, 4, 255]))).toBe('overload');
  expect(reasonOf(raw([52, 2, 1, 1, 255]))).toBe('overload');
  expect(reasonOf(raw([52, 1, 2, 255], [], [12, 63, 1]))).toBe('option-length');
});

test('fixed fields out of range refuse the packet', () => {
  const change = (at: number, value: number) => {
    const bytes = raw([255]);
    bytes[at] = value;
    return reasonOf(bytes);
  };
  expect(change(0, 3)).toBe('op');
  expect(change(2, 17)).toBe('hardware-length');
  expect(change(236, 0)).toBe('cookie');
  expect(reasonOf(raw([]).subarray(0, 239))).toBe('short');
  expect(reasonOf(new Uint8Array(MAX_PACKET_BYTES + 1))).toBe('long');
  expect(reasonOf(new Uint8Array(0))).toBe('short');
});

test('any bytes are decoded or refused with a reason', () => {
  const tail = fc.uint8Array({ maxLength: 400 });
  const field = fc.uint8Array({ maxLength: 64 });
  fc.assert(
    fc.property(tail, field, field, (options, file, sname) => {
      expect(reasonOf(raw([...options], [...file], [...sname]))).toMatch(
        /^(decoded|option-length|overload)$/,
      );
    }),
    RUNS,
  );
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 1600 }), (bytes) => {
      expect(reasonOf(bytes)).toBeTypeOf('string');
    }),
    RUNS,
  );
});

test('any options survive encoding and decoding, or are refused as too long', () => {
  const option = fc.tuple(
    fc.integer({ min: 1, max: 254 }).filter((code) => code !== Option.OVERLOAD),
    fc.uint8Array({ maxLength: 300 }),
  );
  let overloaded = 0;
  fc.assert(
    fc.property(
      fc.array(option, { maxLength: 4 }),
      fc.integer({ min: 260, max: MAX_PACKET_BYTES }),
      (options, maxBytes) => {
        const sent = packet(options);
        let bytes: Uint8Array;
        try {
          bytes = encode(sent, maxBytes);
        } catch (error) {
          if (!(error instanceof DhcpPacketError)) throw error;
          expect(error.reason).toBe('long');
          // Refused only where even three fields without splits have too little room.
          const least = [...sent.options.values()].reduce((sum, value) => sum + value.length, 0);
          expect(least).toBeGreaterThan(maxBytes - 300);
          return;
        }
        expect(bytes.length).toBeLessThanOrEqual(Math.max(300, maxBytes));
        if (bytes[108] !== 0) overloaded++;
        const received = decode(bytes).options;
        expect(received.size).toBe(sent.options.size);
        for (const [code, value] of sent.options) {
          expect(Buffer.compare(received.get(code) ?? Buffer.from('absent'), value)).toBe(0);
        }
      },
    ),
    { ...RUNS, numRuns: 2000 },
  );
  expect(overloaded).toBeGreaterThan(0);
});

/** Options with a structure of their own: bounds, round trips, and a fuzz of a fixed time. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import {
  addressText,
  DhcpPacketError,
  decode,
  decodeRelay,
  decodeRoutes,
  decodeSearch,
  encodeRelay,
  encodeRoutes,
  encodeSearch,
  Option,
  type Options,
  type Route,
  readAddresses,
  readText,
} from '../src/index.js';

const SEED = Number(process.env.SNOWFLOCK_SEED ?? Date.now() % 2 ** 31);
const FUZZ_SECONDS = Number(process.env.SNOWFLOCK_FUZZ_SECONDS ?? 3);
console.log(`dhcp values seed ${SEED} (SNOWFLOCK_SEED repeats it), fuzz ${FUZZ_SECONDS} s`);
const RUNS = { seed: SEED, numRuns: 5000 };

const refused = expect.objectContaining({ name: 'DhcpPacketError', reason: 'option-value' });
const bytes = (...list: (number | string)[]) =>
  Uint8Array.from(
    list.flatMap((part) => (typeof part === 'string' ? [...Buffer.from(part)] : part)),
  );
const option = (value: Uint8Array): Options => new Map([[Option.DNS, value]]);

test('routes have the form of RFC 3442', () => {
  const routes: Route[] = [
    { destination: '0.0.0.0', prefixBits: 0, router: '10.86.0.1' },
    { destination: '10.17.0.0', prefixBits: 16, router: '0.0.0.0' },
    { destination: '10.229.0.128', prefixBits: 25, router: '10.86.0.1' },
  ];
  const encoded = encodeRoutes(routes);
  expect([...encoded]).toEqual(
    [0, 10, 86, 0, 1].concat([16, 10, 17, 0, 0, 0, 0], [25, 10, 229, 0, 128, 10, 86, 0, 1]),
  );
  expect(decodeRoutes(encoded)).toEqual(routes);
  expect(decodeRoutes(bytes(8, 10, 1, 1, 1, 1))[0]?.destination).toBe('10.0.0.0');
  expect(decodeRoutes(bytes(20, 10, 1, 0xff, 1, 1, 1, 1))[0]?.destination).toBe('10.1.240.0');
});

test('routes cut off, too wide or none, and networks with host bits are refused', () => {
  for (const value of [
    bytes(),
    bytes(0),
    bytes(24, 10, 1, 1, 10, 86, 0),
    bytes(33, 1, 2, 3, 4, 5, 6, 7, 8, 9),
  ]) {
    expect(() => decodeRoutes(value)).toThrow(refused);
  }
  for (const [destination, prefixBits] of [
    ['10.0.0.1', 24],
    ['128.0.0.0', 0],
    ['10.0.0.0', 33],
    ['10.0.0.0', -1],
    ['10.0.0.0', 8.5],
  ] as const) {
    expect(() => encodeRoutes([{ destination, prefixBits, router: '0.0.0.0' }])).toThrow(refused);
  }
});

test('search lists have the form of RFC 3397, pointers are followed', () => {
  // The example of RFC 3397, 2: eng.apple.com. and marketing.apple.com.
  const rfc = bytes(3, 'eng', 5, 'apple', 3, 'com', 0, 9, 'marketing', 0xc0, 4);
  expect(decodeSearch(rfc)).toEqual(['eng.apple.com', 'marketing.apple.com']);
  expect(encodeSearch(['a.b', 'c'])).toEqual(bytes(1, 'a', 1, 'b', 0, 1, 'c', 0));
});

test('pointers forward, to themselves and in circles, and names cut off or odd are refused', () => {
  for (const value of [
    bytes(),
    bytes(0),
    bytes(0xc0, 0),
    bytes(0xc0, 4, 1, 'a', 0),
    bytes(1, 'a', 0xc0, 0), // back to its own beginning
    bytes(1, 'a', 0, 1, 'b', 0xc0, 3),
    bytes(1, 'a', 0xc0),
    bytes(1, 'a'),
    bytes(3, 'ab'),
    bytes(0x40, 'a', 0),
    bytes(64, 'a'.repeat(64), 0), // whole, but of a kind that is none
    bytes(1, '/', 0),
    bytes(2, 'a.', 0),
    Uint8Array.from(Array.from({ length: 65 }, () => [1, 97, 0]).flat()),
    Uint8Array.from([...Array.from({ length: 128 }, () => [1, 97]).flat(), 0]),
  ]) {
    expect(() => decodeSearch(value)).toThrow(refused);
  }
  for (const name of [
    '',
    'a..b',
    '.a',
    'a.',
    'x y',
    'a'.repeat(64),
    'ab.'.repeat(90).slice(0, -1),
  ]) {
    expect(() => encodeSearch([name])).toThrow(refused);
  }
  expect(() => encodeSearch(new Array(65).fill('a'))).toThrow(refused);
});

test('relay sub-options cut off or twice, and those that cannot be set are refused', () => {
  const relay = new Map([
    [1, bytes('port 7')],
    [2, bytes()],
  ]);
  expect([...encodeRelay(relay)]).toEqual([...bytes(1, 6, 'port 7', 2, 0)]);
  expect(decodeRelay(encodeRelay(relay))).toEqual(relay);
  for (const value of [bytes(1), bytes(1, 2, 0), bytes(1, 0, 1, 0)]) {
    expect(() => decodeRelay(value)).toThrow(refused);
  }
  expect(() => encodeRelay(new Map([[255, bytes()]]))).toThrow(refused);
  expect(() => encodeRelay(new Map([[1, new Uint8Array(256)]]))).toThrow(refused);
});

test('lists of addresses are whole, texts are texts', () => {
  expect(readAddresses(option(bytes(10, 0, 0, 1, 10, 0, 0, 2)), Option.DNS)).toEqual([
    '10.0.0.1',
    '10.0.0.2',
  ]);
  expect(readAddresses(new Map(), Option.DNS)).toBeUndefined();
  expect(() => readAddresses(option(bytes()), Option.DNS)).toThrow(refused);
  expect(() => readAddresses(option(bytes(1, 2, 3, 4, 5)), Option.DNS)).toThrow(refused);
  expect(readText(option(bytes('vm', 0, 0)), Option.DNS)).toBe('vm');
  expect(readText(new Map(), Option.DNS)).toBeUndefined();
  for (const value of [bytes('a', 0, 'b'), bytes('a\n'), bytes(0xc3), bytes(0xff)]) {
    expect(() => readText(option(value), Option.DNS)).toThrow(refused);
  }
});

const address = fc.nat({ max: 0xffff_ffff });
const route = fc
  .tuple(address, fc.nat({ max: 32 }), address)
  .map(([to, prefixBits, via]): Route => {
    const low = 2 ** (32 - prefixBits);
    return { destination: addressText(to - (to % low)), prefixBits, router: addressText(via) };
  });
const label = fc.stringMatching(/^[A-Za-z0-9_-]{1,20}$/);
const name = fc.array(label, { minLength: 1, maxLength: 5 }).map((labels) => labels.join('.'));
const few = { minLength: 1, maxLength: 20 };

test('any routes, search lists and relay sub-options survive encoding and decoding', () => {
  const routes = fc.property(fc.array(route, few), (list) => {
    expect(decodeRoutes(encodeRoutes(list))).toEqual(list);
  });
  fc.assert(routes, RUNS);
  const names = fc.property(fc.array(name, few), (list) => {
    expect(decodeSearch(encodeSearch(list))).toEqual(list);
  });
  fc.assert(names, RUNS);
  const code = fc.integer({ min: 1, max: 254 });
  const relays = fc.property(
    fc.array(fc.tuple(code, fc.uint8Array({ maxLength: 255 })), few),
    (list) => {
      const relay = new Map(list);
      const found = decodeRelay(encodeRelay(relay));
      expect(found.size).toBe(relay.size);
      for (const [key, value] of relay) {
        expect(Buffer.compare(found.get(key) ?? Buffer.from('absent'), value)).toBe(0);
      }
    },
  );
  fc.assert(relays, { ...RUNS, numRuns: 1000 });
});

/** What a reader makes of the bytes, or nothing if it refuses them as it should. */
function attempt<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (error) {
    if (error instanceof DhcpPacketError) return undefined;
    throw error;
  }
}

test('hostile bytes are refused with a reason or read within bounds, for a fixed time', () => {
  // Small numbers, pointers and letters make more of what comes close to valid.
  const byte = fc.oneof(
    fc.nat({ max: 8 }),
    fc.constantFrom(0xc0, 0x20, 0x21, 53, 82, 119, 121, 52, 255),
    fc.integer({ min: 97, max: 122 }),
    fc.nat({ max: 255 }),
  );
  let read = 0;
  const hostile = fc.property(fc.array(byte, { maxLength: 300 }), (list) => {
    const value = Uint8Array.from(list);
    const routes = attempt(() => decodeRoutes(value)) ?? [];
    expect(routes.length * 5).toBeLessThanOrEqual(value.length);
    const names = attempt(() => decodeSearch(value)) ?? [];
    expect(names.length).toBeLessThanOrEqual(64);
    for (const found of names) expect(found.length).toBeLessThan(255);
    const relay = attempt(() => decodeRelay(value)) ?? new Map();
    expect(relay.size * 2).toBeLessThanOrEqual(value.length);
    attempt(() => readText(option(value), Option.DNS));
    attempt(() => readAddresses(option(value), Option.DNS));
    const packet = new Uint8Array(240 + value.length);
    packet.set([1, 1, 6, 0]);
    packet.set([0x63, 0x82, 0x53, 0x63], 236);
    packet.set(value, 240);
    packet.set(value.subarray(0, 64), 44);
    const options = attempt(() => decode(packet))?.options ?? new Map();
    const total = [...options.values()].reduce((sum, found) => sum + found.length, 0);
    expect(total).toBeLessThanOrEqual(value.length + 64 + 128);
    read++;
  });
  fc.assert(hostile, {
    seed: SEED,
    numRuns: Number.MAX_SAFE_INTEGER,
    interruptAfterTimeLimit: FUZZ_SECONDS * 1000,
  });
  expect(read).toBeGreaterThan(0);
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  CANCEL,
  decodeLine,
  decodeValue,
  encodeLine,
  encodeValue,
  LINE_BYTES,
  LineDecoder,
} from '../../src/api/guest-channel-codec.js';

const seed = Number(process.env.SEED ?? Date.now() % 1_000_000_000);
console.log(`codec: SEED=${seed}`);
const check = <T>(property: fc.IRawProperty<T>) => fc.assert(property, { seed, numRuns: 300 });

const text = fc.string({ unit: 'grapheme', maxLength: 60 }).filter((s) => !s.includes('\0'));
const word = fc.stringMatching(/^[a-z0-9_.:-]{1,12}$/);
const key = fc.stringMatching(/^[a-z][a-z0-9_]{0,10}$/);

/** Cuts a buffer at the given fractions. */
function cut(data: Buffer, at: readonly number[]): Buffer[] {
  const points = [0, ...at.map((part) => Math.floor(part * data.length)), data.length];
  points.sort((a, b) => a - b);
  return points.slice(1).map((end, index) => data.subarray(points[index], end));
}

describe('guest protocol codec', () => {
  it('gives back any value it encoded, in printable ASCII without spaces', () => {
    check(
      fc.property(text, (value) => {
        const encoded = encodeValue(value);
        expect(encoded).toMatch(/^[!-~]*$/);
        expect(decodeValue(encoded)).toBe(value);
      }),
    );
  });

  it('gives back any line, however the stream is cut', () => {
    const line = fc.record({
      words: fc.array(word, { minLength: 1, maxLength: 3 }),
      args: fc.dictionary(key, text),
    });
    check(
      fc.property(
        fc.array(line, { maxLength: 8 }),
        fc.array(fc.double({ min: 0, max: 1, noNaN: true })),
        (lines, cuts) => {
          const stream = Buffer.from(
            lines.map(({ words, args }) => encodeLine(words, args)).join(''),
          );
          const decoder = new LineDecoder();
          const out = cut(stream, cuts).flatMap((part) => [...decoder.feed(part)].map(decodeLine));
          expect(out.map((got) => ({ ...got, args: { ...got?.args } }))).toEqual(
            lines.map(({ words: [verb, id = '', what = ''], args }) => ({
              verb,
              id,
              what,
              args: { ...args },
            })),
          );
        },
      ),
    );
  });

  it('discards the half line before a cancel mark, and nothing behind it', () => {
    check(
      fc.property(
        word,
        fc.dictionary(key, text),
        fc.double({ min: 0, max: 0.99, noNaN: true }),
        (verb, args, part) => {
          const whole = encodeLine([verb], args);
          const half = whole.slice(0, Math.floor(part * whole.length));
          const decoder = new LineDecoder();
          const lines = [...decoder.feed(Buffer.from(half + CANCEL + whole))];
          expect(lines).toEqual([whole.trimEnd()]);
        },
      ),
    );
  });

  it('survives arbitrary bytes and finds the next line', () => {
    check(
      fc.property(fc.uint8Array({ maxLength: 500 }), (noise) => {
        const decoder = new LineDecoder();
        for (const line of decoder.feed(Buffer.from(noise))) decodeLine(line);
        expect([...decoder.feed(Buffer.from(`${CANCEL}pong p1\n`))]).toEqual(['pong p1']);
      }),
    );
  });

  it('discards a line longer than the limit and goes on behind it', () => {
    const decoder = new LineDecoder();
    const long = Buffer.alloc(LINE_BYTES * 3, 'a');
    expect([...decoder.feed(long)]).toEqual([]);
    expect([...decoder.feed(Buffer.from('tail\nping p2\n'))]).toEqual(['ping p2']);
    expect(decoder.discarded).toBe(1);
  });

  it.each([
    ['bad escape', 'call 1 info a=%zz'],
    ['NUL escape', 'call 1 info a=%00'],
    ['empty key', 'call 1 info =1'],
    ['too many bare words', 'call 1 info more'],
    ['key first', 'a=1'],
  ])('refuses a malformed line: %s', (_name, line) => {
    expect(decodeLine(line)).toBeUndefined();
  });

  it('refuses to send what it could not read back', () => {
    expect(() => encodeValue('a\0b')).toThrowError(/NUL/);
    expect(() => encodeLine(['two words'])).toThrowError(/word/);
    expect(() => encodeLine(['x'], { 'a b': '1' })).toThrowError(/key/);
    expect(() => encodeLine(['x'], { a: 'b'.repeat(LINE_BYTES) })).toThrowError(/longer/);
  });
});

import type { Duplex } from 'node:stream';
import { StringDecoder } from 'node:string_decoder';

/**
 * Calls `onLine` for each newline-ended line of a stream. A line longer than `limitBytes` ends the
 * stream with an error: nobody may make this process buffer without bound.
 */
export function readLines(
  stream: Duplex,
  limitBytes: number,
  onLine: (line: string) => void,
): void {
  // What has no end yet, in pieces: joined once, and never searched twice.
  let pieces: string[] = [];
  let length = 0;
  // Not setEncoding(): Node refuses it on the socket of an upgraded HTTP connection.
  const decoder = new StringDecoder('utf8');
  stream.on('data', (chunk: Buffer) => {
    const text = decoder.write(chunk);
    let start = 0;
    for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n', start)) {
      const line = pieces.join('') + text.slice(start, end);
      [pieces, length, start] = [[], 0, end + 1];
      onLine(line);
    }
    if (start === text.length) return;
    pieces.push(text.slice(start));
    length += text.length - start;
    if (length > limitBytes) {
      [pieces, length] = [[], 0];
      stream.destroy(new Error(`line longer than ${limitBytes} bytes`));
    }
  });
}

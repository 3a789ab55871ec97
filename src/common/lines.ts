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
  let pending = '';
  // Not setEncoding(): Node refuses it on the socket of an upgraded HTTP connection.
  const decoder = new StringDecoder('utf8');
  stream.on('data', (chunk: Buffer) => {
    pending += decoder.write(chunk);
    let start = 0;
    for (;;) {
      const end = pending.indexOf('\n', start);
      if (end < 0) break;
      onLine(pending.slice(start, end));
      start = end + 1;
    }
    pending = pending.slice(start);
    if (pending.length > limitBytes) {
      pending = '';
      stream.destroy(new Error(`line longer than ${limitBytes} bytes`));
    }
  });
}

import type { IncomingMessage } from 'node:http';
import { SnowflockError } from '../common/errors.js';
import { decodeError, EVENT_BYTES_MAX, HEARTBEAT_MS } from './wire.js';

/** Heartbeats missed before a stream's peer counts as dead. */
const HEARTBEATS_MISSED_MAX = 5;

/**
 * The events of a stream's answer. A line is bounded, an empty line is a heartbeat, and a line
 * `{"error": …}` ends the stream with that error.
 * @throws {SnowflockError} `E_PEER` when the peer falls silent or the stream is malformed.
 */
export async function* readEvents<T>(
  response: IncomingMessage,
  host: string,
  signal: AbortSignal | undefined,
): AsyncGenerator<T, void> {
  let silent = false;
  const silence = setTimeout(() => {
    silent = true;
    response.destroy();
  }, HEARTBEAT_MS * HEARTBEATS_MISSED_MAX);
  const abort = (): void => {
    response.destroy();
  };
  signal?.addEventListener('abort', abort, { once: true });
  let rest = Buffer.alloc(0);
  try {
    if (signal?.aborted) return;
    for await (const part of response as AsyncIterable<Buffer>) {
      silence.refresh();
      rest = Buffer.concat([rest, part]);
      for (;;) {
        const end = rest.indexOf(10);
        if (end < 0) break;
        const line = rest.subarray(0, end);
        rest = rest.subarray(end + 1);
        if (line.byteLength > 0) yield parseEvent<T>(line, host);
        // The consumer's own time between two events is not the peer's silence.
        silence.refresh();
      }
      if (rest.byteLength > EVENT_BYTES_MAX) {
        throw new SnowflockError(
          'E_PEER',
          `${host}: event is larger than ${EVENT_BYTES_MAX} bytes`,
        );
      }
    }
    if (rest.byteLength > 0) {
      throw new SnowflockError('E_PEER', `${host}: stream of events was cut short`);
    }
  } catch (error) {
    if (signal?.aborted) return;
    if (silent) {
      throw new SnowflockError('E_PEER', `${host} does not answer any more`, { cause: error });
    }
    if (error instanceof SnowflockError) throw error;
    throw new SnowflockError('E_PEER', `${host}: stream of events broke off: ${String(error)}`, {
      cause: error,
    });
  } finally {
    clearTimeout(silence);
    signal?.removeEventListener('abort', abort);
    response.destroy();
  }
}

function parseEvent<T>(line: Buffer, host: string): T {
  let value: unknown;
  try {
    value = JSON.parse(line.toString('utf8'));
  } catch {
    throw new SnowflockError('E_PEER', `${host}: an event is not JSON`);
  }
  if (typeof value === 'object' && value !== null && 'error' in value) {
    throw decodeError(host, 200, line);
  }
  return value as T;
}

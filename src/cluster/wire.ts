/**
 * What both ends of the control channel agree on: HTTP/1.1 over mutual TLS 1.3. Bodies are JSON
 * (`application/json`), bytes (`application/octet-stream`) or a stream of JSON lines
 * (`application/x-ndjson`, an empty line is a heartbeat). An error's body is
 * `{"error": {"code", "message", "host"}}`, its status follows from the code.
 */
import { type ErrorCode, isErrorCode, SnowflockError } from '../common/errors.js';

/** The largest body of a request or an answer, in bytes. */
export const BODY_BYTES_MAX = 64 * 1024 * 1024;

/** The longest line of an event stream, in bytes. */
export const EVENT_BYTES_MAX = 1024 * 1024;

/** The path that answers `{"host": name}`; used to open connections and to see if a peer lives. */
export const PING_PATH = '/v1/ping';

/** A heartbeat in event streams, so that a silent peer is told from a quiet one. */
export const HEARTBEAT_MS = 1000;

export const JSON_TYPE = 'application/json';
export const BINARY_TYPE = 'application/octet-stream';
export const EVENTS_TYPE = 'application/x-ndjson';

const STATUS: Partial<Record<ErrorCode, number>> = {
  E_ARGUMENT: 400,
  E_CONFIG: 400,
  E_DESCRIPTOR: 400,
  E_DESCRIPTOR_VERSION: 400,
  E_SHAPE: 400,
  E_PEER_AUTH: 403,
  E_TICKET_OWNER: 403,
  E_NOT_FOUND: 404,
  E_IMAGE_UNKNOWN: 404,
  E_TICKET_UNKNOWN: 404,
  E_IN_USE: 409,
  E_EXISTS: 409,
  E_STATE: 409,
  E_TICKET_USED: 409,
  E_TICKET_EXPIRED: 410,
  E_CAPACITY: 503,
  E_TIMEOUT: 504,
  E_NO_SPACE: 507,
};

export function httpStatus(code: ErrorCode): number {
  return STATUS[code] ?? 500;
}

export function encodeError(error: SnowflockError, host: string): object {
  return { error: { code: error.code, message: error.message.slice(0, 4096), host } };
}

/** The error a peer answered with; its message starts with the host that reports it. */
export function decodeError(host: string, status: number, body: Buffer): SnowflockError {
  let parsed: unknown;
  try {
    parsed = JSON.parse(body.toString('utf8'));
  } catch {
    parsed = undefined;
  }
  if (typeof parsed === 'object' && parsed !== null && 'error' in parsed) {
    const inner: unknown = parsed.error;
    if (
      typeof inner === 'object' &&
      inner !== null &&
      'code' in inner &&
      'message' in inner &&
      typeof inner.message === 'string'
    ) {
      const code = isErrorCode(inner.code) ? inner.code : 'E_INTERNAL';
      return new SnowflockError(code, `${host}: ${inner.message}`);
    }
  }
  return new SnowflockError('E_PEER', `${host}: answered with HTTP status ${status}`);
}

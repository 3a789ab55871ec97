import { type ErrorCode, SnowflockError } from './errors.js';

/** The promise's outcome, or an error with `code` (default E_TIMEOUT) after `ms` milliseconds. */
export async function within<T>(
  promise: Promise<T>,
  ms: number,
  what: string,
  code: ErrorCode = 'E_TIMEOUT',
): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  try {
    return await Promise.race([
      promise,
      new Promise<never>((_, reject) => {
        timer = setTimeout(
          () => reject(new SnowflockError(code, `${what} took longer than ${ms} ms`)),
          ms,
        );
      }),
    ]);
  } finally {
    clearTimeout(timer);
  }
}

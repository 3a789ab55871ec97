import { SnowflockError } from '../common/errors.js';

const REDRAW_MS = 200;
const LINE_MS = 10_000;

/**
 * Progress of one piece of work on stderr: a line that is redrawn on a terminal, else a line every
 * 10 s. `end` clears what is on the terminal.
 */
export class Progress {
  readonly #what: string;
  readonly #totalBytes: number | undefined;
  readonly #started = Date.now();
  #last = Date.now();
  #drawn = false;

  constructor(what: string, totalBytes?: number) {
    this.#what = what;
    this.#totalBytes = totalBytes;
  }

  /** `share` from 0 to 1; undefined: unknown. */
  readonly update = (share: number | undefined, detail = ''): void => {
    const now = Date.now();
    const terminal = process.stderr.isTTY === true;
    if (now - this.#last < (terminal ? REDRAW_MS : LINE_MS)) return;
    this.#last = now;
    const text = `${this.#what}: ${[this.#amount(share, now), detail].filter(Boolean).join(', ')}`;
    if (terminal) process.stderr.write(`\r\u001b[K${text}`);
    else process.stderr.write(`${text}\n`);
    this.#drawn = terminal;
  };

  end(): void {
    if (this.#drawn) process.stderr.write('\r\u001b[K');
    this.#drawn = false;
  }

  #amount(share: number | undefined, now: number): string {
    const seconds = (now - this.#started) / 1000;
    if (share === undefined) return `${seconds.toFixed(0)} s`;
    const left = share > 0.01 ? `, ${(seconds / share - seconds).toFixed(0)} s left` : '';
    const speed =
      this.#totalBytes === undefined || seconds < 1
        ? ''
        : `, ${((share * this.#totalBytes) / seconds / 2 ** 20).toFixed(0)} MiB/s`;
    return `${(share * 100).toFixed(0)} %${speed}${left}`;
  }
}

/**
 * Work that Ctrl-C or SIGTERM ends in good order: the signal is aborted, and what the work leaves is
 * its own affair. A second signal ends the process at once.
 */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const onSignal = (): void => {
    if (controller.signal.aborted) process.exit(130);
    controller.abort();
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  try {
    return await work(controller.signal);
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}

/** The outcome of `work`, or E_INTERRUPTED when the signal comes first; `work` is left alone. */
export function unlessInterrupted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = () => reject(new SnowflockError('E_INTERRUPTED', 'interrupted'));
    signal.addEventListener('abort', abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}

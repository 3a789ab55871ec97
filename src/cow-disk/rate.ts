/** A token bucket: bytes are counted after they were moved, and the debt is waited off. */
export class Rate {
  #bytes_per_s: number;
  #debt_bytes = 0;
  #at_ms = performance.now();

  constructor(bytes_per_s: number) {
    this.#bytes_per_s = bytes_per_s;
  }

  set(bytes_per_s: number): void {
    this.#settle();
    this.#bytes_per_s = bytes_per_s;
  }

  /** How long to wait after moving `bytes` more, in milliseconds; 0: go on. */
  spend(bytes: number): number {
    this.#settle();
    this.#debt_bytes += bytes;
    return (1000 * this.#debt_bytes) / this.#bytes_per_s;
  }

  #settle(): void {
    const now = performance.now();
    const paid = ((now - this.#at_ms) * this.#bytes_per_s) / 1000;
    this.#debt_bytes = Number.isFinite(paid) ? Math.max(0, this.#debt_bytes - paid) : 0;
    this.#at_ms = now;
  }
}

/** Resolves after `ms`, or at once when `signal` is aborted. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted || ms <= 0) return resolve();
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener('abort', end);
      resolve();
    };
    const timer = setTimeout(end, Math.min(ms, 2 ** 31 - 1));
    signal.addEventListener('abort', end);
  });
}

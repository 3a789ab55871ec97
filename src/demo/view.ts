import type { CloneResult, VmCounters } from '../api/client.js';

/** What the live view shows of one clone. */
export interface CloneView {
  clone: CloneResult;
  counters: VmCounters | undefined;
}

export function stateOf(clone: CloneResult): string {
  if (clone.error !== null) return `failed (${clone.error.code})`;
  if (clone.end !== null) {
    return clone.end.status === 0 ? 'done' : `ended (${clone.end.status ?? clone.end.reason})`;
  }
  if (!clone.ok) return 'starting';
  return clone.reply_ms === null ? 'running' : 'working';
}

/**
 * On a terminal: one line a clone, redrawn in place. Elsewhere: a plain line whenever a clone's
 * state changes.
 */
export class View {
  readonly #out: NodeJS.WriteStream;
  readonly #live: boolean;
  readonly #last = new Map<number, string>();
  #drawn = 0;

  constructor(out: NodeJS.WriteStream) {
    this.#out = out;
    this.#live = out.isTTY === true && process.env.TERM !== 'dumb' && process.env.CI === undefined;
  }

  /** A line that stays. */
  say(text: string): void {
    this.#erase();
    this.#out.write(`${text}\n`);
  }

  update(clones: CloneView[]): void {
    if (this.#live) {
      this.#erase();
      for (const one of clones) this.#out.write(`  ${describe(one)}\n`);
      this.#drawn = clones.length;
      return;
    }
    for (const one of clones) {
      const state = stateOf(one.clone);
      if (this.#last.get(one.clone.vmid) === state) continue;
      this.#last.set(one.clone.vmid, state);
      this.#out.write(`  ${describe(one)}\n`);
    }
  }

  /** Leaves the last picture on the screen. */
  done(): void {
    this.#drawn = 0;
  }

  #erase(): void {
    if (this.#drawn > 0) this.#out.write(`\x1b[${this.#drawn}A\x1b[J`);
    this.#drawn = 0;
  }
}

function describe({ clone, counters }: CloneView): string {
  const fetched = clone.end?.pages_fetched ?? counters?.pages_fetched;
  const pages = fetched === undefined ? '' : `  ${fetched} pages fetched`;
  return `clone ${clone.vmid} on ${clone.host} (${clone.ip}): ${stateOf(clone)}${pages}`;
}

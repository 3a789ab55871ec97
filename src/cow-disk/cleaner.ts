import { asSnowflockError } from '../common/errors.js';
import { mergeable, merged, plan, removal, type Step, stepKey } from './gc.js';
import { type NativeStep, native } from './native.js';
import { type StoreParts, sliceOf } from './parts.js';
import { pause, Rate } from './rate.js';
import type { StoreTask } from './store-api.js';

/**
 * Clean-up in the background: one step at a time, at a bounded rate, as gc.ts plans them.
 *
 * States: idle; working; stopped (rate 0); closed. A step that fails changes nothing that anybody
 * sees; it is shown in tasks() and tried again after a time that doubles up to RETRY_MAX_MS. A slice
 * somebody still reads is let alone and asked about again when a view is closed, and every BUSY_MS,
 * since a page server lets go of a provider without telling.
 *
 * Forks, snapshots and clones never wait for it: it holds the gate only while a transaction is
 * written and the native store takes the slices over.
 */
const STEP_BYTES = 2 ** 20;
const BUSY_MS = 3000;
const RETRY_MIN_MS = 1000;
const RETRY_MAX_MS = 60_000;

interface Delay {
  error: string | null;
  attempts: number;
  until_ms: number;
  task: StoreTask['kind'] | null;
}

class Busy extends Error {}

export class Cleaner {
  readonly #parts: StoreParts;
  readonly #rate: Rate;
  #stopped: boolean;
  readonly #closed = new AbortController();
  #working: Promise<void> | undefined;
  /** Something changed since the plan was made. */
  #again = false;
  #timer: NodeJS.Timeout | undefined;
  #task: StoreTask | undefined;
  readonly #delays = new Map<string, Delay>();
  /** What lay on a slice when it was punched; it is punched again only when that is different. */
  readonly #punched = new Map<string, string>();

  constructor(parts: StoreParts, bytes_per_s: number) {
    this.#parts = parts;
    this.#stopped = bytes_per_s === 0;
    this.#rate = new Rate(bytes_per_s === 0 ? 1 : bytes_per_s);
  }

  /** The tree changed, or a view was closed. */
  wake(): void {
    for (const [key, delay] of this.#delays) if (delay.error === null) this.#delays.delete(key);
    this.#go();
  }

  setRate(bytes_per_s: number): void {
    this.#stopped = bytes_per_s === 0;
    if (!this.#stopped) this.#rate.set(bytes_per_s);
    this.#go();
  }

  tasks(): StoreTask[] {
    const running = this.#task === undefined ? [] : [{ ...this.#task }];
    const failed: StoreTask[] = [];
    for (const { task, error } of this.#delays.values()) {
      if (task === null || error === null) continue;
      failed.push({ kind: task, disk: null, done_bytes: 0, total_bytes: null, error });
    }
    return [...running, ...failed];
  }

  /** When nothing is left that can be done now. */
  async settled(): Promise<void> {
    while (this.#working !== undefined) await this.#working;
  }

  async close(): Promise<void> {
    this.#closed.abort();
    clearTimeout(this.#timer);
    await this.settled();
  }

  #go(): void {
    this.#again = true;
    if (this.#working !== undefined || this.#closed.signal.aborted || this.#stopped) return;
    this.#working = this.#work().finally(() => {
      this.#working = undefined;
      if (this.#again) this.#go();
      else this.#sleep();
    });
  }

  get #ended(): boolean {
    return this.#closed.signal.aborted || this.#stopped;
  }

  async #work(): Promise<void> {
    await undefined; // whoever made the change goes on first
    this.#again = false;
    for (let progress = true; progress && !this.#ended; ) {
      progress = false;
      for (const step of plan(this.#parts.ledger.tree)) {
        if (this.#ended) return;
        if (!this.#due(step)) continue;
        if (await this.#try(step)) progress = true;
      }
    }
  }

  #due(step: Step): boolean {
    const { ledger } = this.#parts;
    if (step.kind === 'files' && step.slices.every((id) => ledger.isGone(id))) return false;
    if (step.kind === 'punch' && this.#punched.get(step.slice) === this.#onTop(step.children)) {
      return false;
    }
    const delay = this.#delays.get(stepKey(step));
    return delay === undefined || delay.until_ms <= performance.now();
  }

  /** A top becomes another slice by a fork, and sealed slices do not change. */
  #onTop(children: string[]): string {
    const { tree } = this.#parts.ledger;
    const describe = (id: string) => `${id}${tree.diskAt(id) === undefined ? '' : '*'}`;
    return children.map(describe).sort().join(' ');
  }

  /** True if something changed. */
  async #try(step: Step): Promise<boolean> {
    const key = stepKey(step);
    try {
      const changed = await this.#do(step);
      this.#delays.delete(key);
      return changed;
    } catch (error) {
      if (this.#closed.signal.aborted) return false;
      const { code, message } = asSnowflockError(error);
      const busy = error instanceof Busy || code === 'E_IN_USE';
      const attempts = (this.#delays.get(key)?.attempts ?? 0) + 1;
      const wait_ms = busy ? BUSY_MS : Math.min(RETRY_MIN_MS * 2 ** (attempts - 1), RETRY_MAX_MS);
      this.#delays.set(key, {
        error: busy ? null : `${code}: ${message}`,
        attempts,
        until_ms: performance.now() + wait_ms,
        task: step.kind === 'punch' ? 'punch' : 'merge',
      });
      return false;
    } finally {
      this.#task = undefined;
    }
  }

  #sleep(): void {
    clearTimeout(this.#timer);
    if (this.#delays.size === 0 || this.#ended) return;
    let until_ms = Number.POSITIVE_INFINITY;
    for (const delay of this.#delays.values()) until_ms = Math.min(until_ms, delay.until_ms);
    this.#timer = setTimeout(() => this.#go(), Math.max(10, until_ms - performance.now()));
    this.#timer.unref();
  }

  async #do(step: Step): Promise<boolean> {
    switch (step.kind) {
      case 'files':
        return this.#files(step.slices);
      case 'remove':
        return this.#remove(step.slices);
      case 'merge':
        return this.#merge(step.slices);
      case 'punch':
        return this.#punch(step.slice, step.children);
    }
  }

  /** Together: each time costs a look through the folder and a sync of it. */
  async #files(slices: string[]): Promise<boolean> {
    const { ledger, native: store } = this.#parts;
    const left = slices.filter((id) => !ledger.isGone(id));
    const removed = await native(() => store.removeSlices(left));
    for (const id of removed) ledger.gone(id);
    if (removed.length < left.length) throw new Busy();
    return false;
  }

  async #remove(slices: string[]): Promise<boolean> {
    const { gate, ledger, native: store } = this.#parts;
    let left: string[] = [];
    const removed = await gate.alone(async () => {
      let ids: string[] = [];
      await ledger.commit((tree) => {
        const made = removal(tree, slices, (id) => store.inUse(id));
        ({ ids, left } = made);
        return made.transaction;
      });
      return ids;
    });
    // When the store is being closed: the journal lists them.
    if (removed.length > 0 && !this.#closed.signal.aborted) {
      await this.#try({ kind: 'files', slices: removed });
    }
    if (removed.length === 0 && left.length > 0) throw new Busy();
    return removed.length > 0;
  }

  async #merge(slices: string[]): Promise<boolean> {
    const { gate, ledger, native: store } = this.#parts;
    const { tree } = ledger;
    if (!mergeable(tree, slices)) return false;
    const refs = slices.map((id) => ({ id, map: sliceOf(tree, id).map }));
    const sizeBytes = sliceOf(tree, slices[0] ?? '').size_bytes;
    const merge = await native(() => store.mergeBegin({ slices: refs, sizeBytes }));
    let committed = false;
    try {
      if (!(await this.#run('merge', merge))) return false;
      const { keep, map, remove } = await native(() => merge.prepare());
      await gate.alone(async () => {
        if (this.#closed.signal.aborted || !mergeable(tree, slices)) return;
        await ledger.commit((now) => merged(now, slices, keep, map));
        committed = true;
        await native(() => merge.apply());
      });
      if (committed) for (const id of remove) ledger.gone(id);
      return committed;
    } finally {
      // What the journal names is never undone, should apply() have failed; and of a broken journal
      // nobody knows whether it names the merged map: the next owner of the store sees.
      if (committed || ledger.journal.broken) merge.leave();
      await native(() => merge.abort()); // after apply() it only lets go
    }
  }

  async #punch(slice: string, children: string[]): Promise<boolean> {
    const { tree } = this.#parts.ledger;
    const current = [...tree.children(slice)];
    if (!tree.slices.has(slice) || current.length < 2) return false;
    if (this.#onTop(current) !== this.#onTop(children)) return false; // planned anew
    const ref = (id: string) => ({ id, map: sliceOf(tree, id).map });
    const punch = await native(() =>
      this.#parts.native.punchBegin({
        slice: ref(slice),
        children: current.map(ref),
        sizeBytes: sliceOf(tree, slice).size_bytes,
      }),
    );
    try {
      if (await this.#run('punch', punch)) this.#punched.set(slice, this.#onTop(current));
    } finally {
      await native(() => punch.abort());
    }
    return false;
  }

  /** All of a step's work, at the rate; false if the store is being closed. */
  async #run(kind: 'merge' | 'punch', work: NativeStep): Promise<boolean> {
    const task: StoreTask = {
      kind,
      disk: null,
      done_bytes: 0,
      total_bytes: work.totalBytes,
      error: null,
    };
    this.#task = task;
    for (let done = false; !done; ) {
      if (this.#closed.signal.aborted) return false;
      const step = await native(() => work.step(STEP_BYTES));
      done = step.done;
      task.done_bytes += step.bytes;
      const wait_ms = this.#rate.spend(step.bytes);
      if (wait_ms > 1) await pause(wait_ms, this.#closed.signal);
    }
    return !this.#closed.signal.aborted;
  }
}

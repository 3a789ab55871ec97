import type { Logger } from './log.js';

/**
 * What to undo if a piece of work with many steps fails: each step that made something says how to
 * remove it; `run` does so in reverse order. A step that cannot be undone is logged, the rest go on.
 */
export class Undo {
  readonly #steps: { what: string; undo: () => Promise<unknown> | unknown }[] = [];

  add(what: string, undo: () => Promise<unknown> | unknown): void {
    this.#steps.push({ what, undo });
  }

  async run(log: Logger): Promise<void> {
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      try {
        await step.undo();
      } catch (error) {
        log.error({ what: step.what, error: String(error) }, 'clean-up failed');
      }
    }
  }
}

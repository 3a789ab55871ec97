/**
 * Many at once, or one alone: those who open slices by what the tree says now, against a change of
 * the tree that takes files away. Whoever wants to be alone waits until nobody is inside, and keeps
 * nobody out while it waits: clean-up may be late, an opening disk may not.
 */
export class Gate {
  #inside = 0;
  #alone: Promise<void> | undefined;
  #waiting: (() => void)[] = [];

  async shared<T>(work: () => Promise<T>): Promise<T> {
    while (this.#alone !== undefined) await this.#alone;
    this.#inside++;
    try {
      return await work();
    } finally {
      this.#inside--;
      if (this.#inside === 0) this.#wake();
    }
  }

  async alone<T>(work: () => Promise<T>): Promise<T> {
    while (this.#alone !== undefined || this.#inside > 0) {
      await (this.#alone ?? new Promise<void>((resolve) => this.#waiting.push(resolve)));
    }
    const turn = work();
    this.#alone = turn.then(
      () => undefined,
      () => undefined,
    );
    try {
      return await turn;
    } finally {
      this.#alone = undefined;
      this.#wake();
    }
  }

  #wake(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const resolve of waiting) resolve();
  }
}

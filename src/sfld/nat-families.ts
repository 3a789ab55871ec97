/**
 * What the router for all hosts (docs/network.md) must know of the others: their families. It asks
 * each host for its VMs. A host that does not answer keeps what it said last; before it has answered
 * once, what an earlier daemon knew counts too, so that a restart cuts nobody off.
 */
import type { HostPort } from './peers.js';

type Families = ReadonlyMap<number, string | undefined>;

export class FamiliesElsewhere {
  readonly #others: () => readonly HostPort[];
  readonly #said = new Map<string, Families>();
  #before: readonly number[] = [];
  #all: Families = new Map();

  constructor(others: () => readonly HostPort[]) {
    this.#others = others;
  }

  /** What an earlier daemon knew. */
  remember(families: readonly number[]): void {
    this.#before = families;
    this.#all = new Map(families.map((family) => [family, undefined]));
  }

  /** Families, with the names of their root parents where a host that answers has these. */
  get all(): Families {
    return this.#all;
  }

  /** Asks all hosts, each for a few seconds at most. The names of those that do not answer. */
  async ask(): Promise<string[]> {
    const silent: string[] = [];
    const others = this.#others();
    await Promise.all(
      others.map(async (port) => {
        try {
          const vms = (await port.list()).filter((vm) => !/^end/.test(vm.state));
          const families = new Map<number, string | undefined>();
          for (const { family, vmid, name } of vms) {
            if (vmid === 0 || !families.has(family)) {
              families.set(family, vmid === 0 ? name : undefined);
            }
          }
          this.#said.set(port.name, families);
        } catch {
          silent.push(port.name);
        }
      }),
    );
    const unheard = others.some((port) => !this.#said.has(port.name));
    const all = new Map<number, string | undefined>(
      unheard ? this.#before.map((family) => [family, undefined]) : [],
    );
    for (const families of this.#said.values()) {
      for (const [family, name] of families) all.set(family, name ?? all.get(family));
    }
    this.#all = all;
    return silent;
  }
}

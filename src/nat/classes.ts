/**
 * Rules as a decision that costs the same however many they are: addresses fall into classes, each
 * of which has one answer for each port. The kernel looks an address up in an interval map, then the
 * port in that of its class (ruleset.ts); no rule is asked after another.
 *
 * Rules are first-match: the first rule that has both the address and the port decides.
 * Bounded: the ports' intervals of all classes together, so that rules that overlap in every way are
 * refused and not loaded for minutes.
 */
import { SnowflockError } from '../common/errors.js';
import type { AddressRange } from './policy.js';

export const PORT_INTERVALS_MAX = 65_536;
const PORT_LAST = 65_535;

export interface Range {
  /** Both ends in it. */
  first: number;
  last: number;
}

export interface ClassRule {
  name: string;
  /** Sorted, apart from each other (joinRanges). */
  addresses: readonly AddressRange[];
  /** Absent: every port. */
  ports?: readonly Range[];
}

export interface PortAnswer extends Range {
  rule: string;
}

export interface Classes {
  /** By class: which rule has which ports. Sorted, apart; ports that no rule has are not there. */
  classes: PortAnswer[][];
  /** Sorted, apart; addresses that no rule has are not there. `class` is an index. */
  addresses: (AddressRange & { class: number })[];
}

/** Makes the rules' ports one partition, first match first; for many classes one after the other. */
class Partition {
  /** By port: index of the rule that has it, or -1. */
  readonly #owner = new Int32Array(PORT_LAST + 1);
  /** By port: itself if free, else a port further on, on the way to the next that is. */
  readonly #next = new Int32Array(PORT_LAST + 2);

  of(rules: readonly ClassRule[]): PortAnswer[] {
    this.#owner.fill(-1);
    for (let port = 0; port <= PORT_LAST + 1; port++) this.#next[port] = port;
    for (const [index, { ports }] of rules.entries()) {
      for (const { first, last } of ports ?? [{ first: 0, last: PORT_LAST }]) {
        for (let port = this.#free(first); port <= last; port = this.#free(port)) {
          this.#owner[port] = index;
          this.#next[port] = port + 1;
        }
      }
      if (this.#free(0) > PORT_LAST) break;
    }
    const out: PortAnswer[] = [];
    for (let first = 0; first <= PORT_LAST; ) {
      const owner = this.#owner[first] ?? -1;
      let last = first;
      while (last < PORT_LAST && this.#owner[last + 1] === owner) last++;
      const rule = rules[owner]?.name;
      if (rule !== undefined) out.push({ first, last, rule });
      first = last + 1;
    }
    return out;
  }

  #free(port: number): number {
    let at = port;
    for (;;) {
      const next = this.#next[at] ?? at;
      if (next === at) return at;
      this.#next[at] = this.#next[next] ?? next; // halves the way for who comes after
      at = next;
    }
  }
}

/** E_CONFIG: more than PORT_INTERVALS_MAX. */
export function classify(rules: readonly ClassRule[]): Classes {
  // Where rules begin and end, in the order of addresses.
  const edges = rules
    .flatMap(({ addresses }, rule) =>
      addresses.flatMap(({ first, last }) => [
        { at: first, rule, begins: true },
        { at: last + 1, rule, begins: false },
      ]),
    )
    .sort((a, b) => a.at - b.at);
  const partition = new Partition();
  const active = new Set<number>();
  const byRules = new Map<string, number>();
  const byPorts = new Map<string, number>();
  const classes: PortAnswer[][] = [];
  const addresses: Classes['addresses'] = [];
  let intervals = 0;
  const classOf = (): number => {
    const indexes = [...active].sort((a, b) => a - b);
    const key = indexes.join();
    const known = byRules.get(key);
    if (known !== undefined) return known;
    const ports = partition.of(indexes.flatMap((index) => rules[index] ?? []));
    const content = ports.map(({ first, last, rule }) => `${first}-${last}:${rule}`).join();
    let found = byPorts.get(content);
    if (found === undefined) {
      found = classes.push(ports) - 1;
      byPorts.set(content, found);
      intervals += ports.length;
      if (intervals > PORT_INTERVALS_MAX) {
        throw new SnowflockError(
          'E_CONFIG',
          `the policy's rules overlap in more than ${PORT_INTERVALS_MAX} ways: use fewer ports for ` +
            'wide blocks, or fewer single addresses in them',
        );
      }
    }
    byRules.set(key, found);
    return found;
  };
  for (let i = 0; i < edges.length; ) {
    const at = edges[i]?.at ?? 0;
    for (; edges[i]?.at === at; i++) {
      const edge = edges[i];
      if (edge?.begins === true) active.add(edge.rule);
      else if (edge !== undefined) active.delete(edge.rule);
    }
    const next = edges[i];
    if (next === undefined || active.size === 0) continue;
    const found = classOf();
    const before = addresses.at(-1);
    if (before?.class === found && before.last + 1 === at) before.last = next.at - 1;
    else addresses.push({ first: at, last: next.at - 1, class: found });
  }
  return { classes, addresses };
}

/**
 * A policy as nftables commands (libnftables-json(5)), in transactions of which one is the change.
 *
 * The table of a family, in its namespace, with interfaces `guests` and `uplink`:
 *
 *   forward    by direction of the flow and of the packet, to
 *     out        flows that guests began: every packet asks the rules anew
 *       to-PROTOCOL-N    by the class of the address, the port (classes.ts)
 *     in         flows that outside began, to the parent
 *       in-NAME          by the port of the host
 *   allow-NAME, inbound-NAME   limits, then the rule's counter, accept
 *   refuse-out, refuse-in      counter, then TCP reset or ICMP admin-prohibited
 *
 * Invariants:
 *  - no packet passes because of the flow's state alone: established flows are asked by where they
 *    go, as their first packet said it (`ct original`), in both directions. A changed policy therefore holds from the next packet on, flows that
 *    are still allowed go on, others get a reset;
 *  - counters have names and outlive a change of the rules; so do limits, each in a chain whose name
 *    has its value: what is used up or open counts on, until that limit itself is changed;
 *  - a packet under way while the rules change is never refused for that. An interval set that is new
 *    in a transaction has nothing in it yet for a moment in which its rules hold already (seen with
 *    Linux 6.18, some packets in each change). So sets and maps are named after what is in them, made
 *    by a transaction of their own before that of the rules, and removed by one after it;
 *  - a packet sees as many rules of nftables with one rule of the policy as with a thousand.
 *
 * explain.ts is the same as a pure function. Meters (nft: `meter`) are what nftables 1.0.6 can say
 * in JSON about sets that rules fill.
 */
import { createHash } from 'node:crypto';
import { addressOfVmid, ipText } from '../network/addresses.js';
import { classify } from './classes.js';
import { LINK_NETWORK } from './explain.js';
import {
  type AddressRange,
  type FamilyPolicy,
  type InboundRule,
  joinRanges,
  type Limits,
  parseBlock,
  parsePorts,
} from './policy.js';
import type { Resolved } from './resolve.js';

export const FAMILY_TABLE = 'snowflock';
export const HOST_TABLE = 'snowflock_nat';
/** Host ends of veth pairs: to the guests' side of a gateway, and to its uplink side. */
export const GUESTS_PREFIX = 'sfg';
export const LINK_PREFIX = 'sfn';
const METER_SIZE = 65_536;
/** Elements of limits by time go after so long without a packet. */
const METER_TIMEOUT_S = 60;
const PARENT = addressOfVmid(0);

type Json = Record<string, unknown>;
type Expression = Json | string | number;

const match = (left: Json, right: unknown, op = '=='): Json => ({ match: { op, left, right } });
const field = (protocol: string, name: string): Json => ({ payload: { protocol, field: name } });
const meta = (key: string): Json => ({ meta: { key } });
const ct = (key: string): Json => ({ ct: { key } });
/** Of the flow as it began, whatever direction the packet has. */
const original = (key: string): Json => ({ ct: { key, dir: 'original' } });
const lookUp = (key: Json, map: string): Json => ({ map: { key, data: `@${map}` } });
const choose = (key: Json, map: string): Json => ({ vmap: { key, data: `@${map}` } });
const goTo = (target: string): Json => ({ goto: { target } });
const jump = (target: string): Json => ({ jump: { target } });
const accept: Json = { accept: null };
const drop: Json = { drop: null };
const count = (name: string): Json => ({ counter: name });
const prohibit: Json = { reject: { type: 'icmp', expr: 'admin-prohibited' } };
const reset: Json = { reject: { type: 'tcp reset' } };
const from = (name: string): Json => match(meta('iifname'), name);
const towards = (name: string): Json => match(meta('oifname'), name);
const isProtocol = (name: string): Json => match(field('ip', 'protocol'), name);
const state = (name: string): Json => match(ct('state'), name, 'in');
/** The first packet of a flow, as long as nothing has let it pass. */
const begins: Json = match({ '&': [ct('status'), 'confirmed'] }, 0);
const perSecond = (rate: number): Json => ({ limit: { rate, per: 'second', burst: rate } });

const span = (first: number, last: number, text: (value: number) => Expression): Expression =>
  first === last ? text(first) : { range: [text(first), text(last)] };

/** Collects a table's objects and rules, and makes the transactions. */
class Table {
  readonly #stores = new Map<string, { kind: 'set' | 'map'; commands: Json[] }>();
  readonly #objects = new Map<string, Json[]>();
  readonly #chains = new Map<string, Json>();
  readonly #rules: Json[] = [];
  readonly #lasting = new Map<string, Json[]>();

  constructor(readonly name: string) {}

  chain(name: string, base: Json = {}): void {
    this.#chains.set(name, base);
  }

  rule(chain: string, ...expr: Json[]): void {
    this.#rules.push({ chain, expr });
  }

  counter(name: string): string {
    this.#objects.set(`counter ${name}`, [{ add: { counter: this.#with({ name }) } }]);
    return name;
  }

  /** The set's name. */
  addresses(ranges: readonly AddressRange[]): string {
    const elem = joinRanges(ranges).map(({ first, last }) => span(first, last, ipText));
    return this.#store('set', { type: 'ipv4_addr', flags: ['interval'] }, elem);
  }

  /** From addresses or ports, to addresses, ports or verdicts. The map's name. */
  map(from: string, to: string, elem: readonly [Expression, Expression][]): string {
    const interval = elem.some(([key]) => typeof key === 'object');
    return this.#store(
      'map',
      { type: from, map: to, ...(interval && { flags: ['interval'] }) },
      elem,
    );
  }

  #store(kind: 'set' | 'map', shape: Json, elem: readonly unknown[]): string {
    const content = JSON.stringify([shape, elem]);
    const name = `${kind}-${createHash('sha256').update(content).digest('hex').slice(0, 16)}`;
    const it = this.#with({ name });
    const commands = [
      { add: { [kind]: { ...it, ...shape } } },
      ...(elem.length === 0 ? [] : [{ add: { element: { ...it, elem } } }]),
    ];
    this.#stores.set(name, { kind, commands });
    return name;
  }

  /** A chain that is made once and left alone: its name says all that is in it. */
  lasting(name: string, ...expr: Json[]): void {
    this.#lasting.set(name, expr);
  }

  /**
   * `present`: what `nft -j list table` shows. Transactions, one after the other; the second one is
   * the change.
   */
  transactions(present: readonly Json[]): object[][] {
    const add = (kind: string, value: Json) => ({ add: { [kind]: this.#with(value) } });
    const there = (kind: string): string[] =>
      present.flatMap((entry) => (entry[kind] as { name?: string } | undefined)?.name ?? []);
    const chains = there('chain');
    const isLeft = (name: string) => this.#lasting.has(name) && chains.includes(name);
    const gone = (kind: string, kept: (name: string) => boolean) =>
      there(kind)
        .filter((name) => !kept(name))
        .map((name) => ({ delete: { [kind]: this.#with({ name }) } }));
    const stored = [...there('set'), ...there('map')];
    const fresh = [...this.#stores].filter(([name]) => !stored.includes(name));
    const table = { add: { table: { family: 'ip', name: this.name } } };
    const plain = [...this.#chains].filter(([, base]) => base.type === undefined);
    const before = [
      table,
      // Maps lead to them.
      ...plain.filter(([name]) => !chains.includes(name)).map(([name]) => add('chain', { name })),
      ...fresh.flatMap(([, { commands }]) => commands),
    ];
    const change = [
      table,
      ...chains
        .filter((name) => !isLeft(name))
        .map((name) => ({ flush: { chain: this.#with({ name }) } })),
      ...[...this.#objects.values()].flat(),
      ...[...this.#chains].map(([name, base]) => add('chain', { name, ...base })),
      ...[...this.#lasting]
        .filter(([name]) => !isLeft(name))
        .flatMap(([name, expr]) => [add('chain', { name }), add('rule', { chain: name, expr })]),
      ...this.#rules.map((rule) => add('rule', rule)),
    ];
    const after = [
      // What led to chains goes first, and they before what they used.
      ...gone('map', (name) => this.#stores.has(name)),
      ...gone('set', (name) => this.#stores.has(name)),
      ...gone('chain', (name) => this.#chains.has(name) || this.#lasting.has(name)),
      ...gone('counter', (name) => this.#objects.has(`counter ${name}`)),
    ];
    return [fresh.length === 0 ? [] : before, change, after].filter((one) => one.length > 0);
  }

  #with(value: Json): Json {
    return { family: 'ip', table: this.name, ...value };
  }
}

/** A limit for each value of `key`; nft calls it a meter. It goes with its rule. */
const meter = (name: string, key: Json, stmt: Json, timed = true): Json => ({
  meter: {
    name,
    key: timed ? { elem: { val: key, timeout: METER_TIMEOUT_S } } : key,
    stmt,
    size: METER_SIZE,
  },
});

function refusal(table: Table, chain: string, counter: string): void {
  table.chain(chain);
  table.rule(chain, count(table.counter(counter)), goTo('refuse'));
}

/** So that nobody waits for a time-out. */
function refuseChain(table: Table): void {
  table.chain('refuse');
  table.rule('refuse', isProtocol('tcp'), reset);
  table.rule('refuse', prohibit);
}

/** Those of one clone or of the whole family; `key` tells whom a packet counts for. */
function limitRules(table: Table, who: string, limits: Limits, keys: { go: Json; back: Json }) {
  const over = (what: string): Json => count(table.counter(`over-${who}-${what}`));
  const { new_connections_per_s: fresh, connections } = limits;
  const { packets_per_s: packets, bytes_per_s: bytes } = limits;
  const sides = [
    { interfaceName: 'guests', side: 'out', key: keys.go },
    { interfaceName: 'uplink', side: 'in', key: keys.back },
  ];
  for (const { interfaceName, side, key } of sides) {
    const one = (kind: string, value: number | undefined, first: Json[], ...then: Json[]) => {
      if (value === undefined) return;
      const name = `${who}-${kind}-${side}-${value}`;
      table.lasting(name, ...then);
      table.rule('limits', from(interfaceName), ...first, jump(name));
    };
    const refuse = goTo('refuse');
    if (fresh !== undefined) {
      const limit = { rate: fresh, per: 'second', burst: fresh, inv: true };
      one(
        'new',
        fresh,
        [begins],
        meter(`new-${who}-${side}-${fresh}`, key, { limit }),
        over('new'),
        refuse,
      );
    }
    if (connections !== undefined) {
      const stmt = { 'ct count': { val: connections, inv: true } };
      const metered = meter(`open-${who}-${side}-${connections}`, key, stmt, false);
      one('open', connections, [begins], metered, over('connections'), refuse);
    }
    if (packets !== undefined) {
      const burst = Math.max(5, Math.ceil(packets / 10));
      const limit = { rate: packets, per: 'second', burst, inv: true };
      const metered = meter(`packets-${who}-${side}-${packets}`, key, { limit });
      one('packets', packets, [], metered, over('packets'), drop);
    }
    if (bytes !== undefined) {
      const unit = { rate_unit: 'bytes', burst_unit: 'bytes', per: 'second' };
      const limit = { rate: bytes, burst: 65_536, ...unit, inv: true };
      one(
        'bytes',
        bytes,
        [],
        meter(`bytes-${who}-${side}-${bytes}`, key, { limit }),
        over('bytes'),
        drop,
      );
    }
  }
}

/** The chain of a rule that matched: limits, counter, accept. */
function passing(table: Table, name: string): void {
  table.chain(name);
  table.rule(name, jump('limits'));
  table.counter(`${name}-out`);
  table.counter(`${name}-in`);
  table.rule(name, from('guests'), count(`${name}-out`), accept);
  table.rule(name, count(`${name}-in`), accept);
}

/** The rules of `allow`, as look-ups: class of the address, then the port in it (classes.ts). */
function allowRules(table: Table, policy: FamilyPolicy, resolved: Resolved): void {
  const rules = policy.allow ?? [];
  for (const { name } of rules) passing(table, `allow-${name}`);
  for (const protocol of ['tcp', 'udp', 'icmp'] as const) {
    const { classes, addresses } = classify(
      rules
        .filter((rule) => rule.protocol === protocol)
        .map(({ name, to, ports }) => ({
          name: `allow-${name}`,
          addresses: joinRanges(to.flatMap((one) => rangesOf(one, resolved))),
          ...(ports === undefined ? {} : { ports: ports.map(parsePorts) }),
        })),
    );
    if (addresses.length === 0) continue;
    const chains = classes.map((ports, number) => {
      const [only] = ports;
      if (only?.first === 0 && only.last === 65_535) return only.rule;
      const chain = `to-${protocol}-${number}`;
      table.chain(chain);
      const answers = ports.map(({ first, last, rule }): [Expression, Json] => [
        span(first, last, (port) => port),
        goTo(rule),
      ]);
      // The protocol again: nft wants it in each rule that speaks of ports.
      const map = table.map('inet_service', 'verdict', answers);
      table.rule(chain, isProtocol(protocol), choose(original('proto-dst'), map));
      table.rule(chain, goTo('refuse-out'));
      return chain;
    });
    const answers = addresses.map(({ first, last, class: its }): [Expression, Json] => [
      span(first, last, ipText),
      goTo(chains[its] ?? 'refuse-out'),
    ]);
    const map = table.map('ipv4_addr', 'verdict', answers);
    table.rule('out', isProtocol(protocol), choose(original('ip daddr'), map));
  }
  table.rule('out', goTo('refuse-out'));
}

function rangesOf(to: string, resolved: Resolved): AddressRange[] {
  const block = parseBlock(to);
  if (block !== undefined) return [block];
  const addresses = Object.keys(resolved[to.toLowerCase()] ?? {});
  return addresses.flatMap((address) => parseBlock(address) ?? []);
}

/** Ports of the host to those of the parent. */
function inboundRules(table: Table, rules: readonly InboundRule[]): void {
  for (const protocol of ['tcp', 'udp'] as const) {
    const ones = rules.filter((rule) => rule.protocol === protocol);
    if (ones.length === 0) continue;
    const ports = ones.map(({ port, to_port }): [number, number] => [port, to_port ?? port]);
    const toPorts = table.map('inet_service', 'inet_service', ports);
    table.rule('prerouting', from('uplink'), isProtocol(protocol), {
      dnat: { addr: PARENT, port: lookUp(field(protocol, 'dport'), toPorts) },
    });
    const answers = ones.map(({ name, port }): [number, Json] => [port, goTo(`in-${name}`)]);
    const map = table.map('inet_service', 'verdict', answers);
    table.rule('in', isProtocol(protocol), choose(original('proto-dst'), map));
  }
  table.rule('in', goTo('refuse-in'));
  for (const rule of rules) {
    const name = `inbound-${rule.name}`;
    const clients = table.addresses(
      (rule.from ?? ['0.0.0.0/0']).flatMap((text) => parseBlock(text) ?? []),
    );
    table.chain(`in-${rule.name}`);
    table.rule(
      `in-${rule.name}`,
      isProtocol(rule.protocol),
      // A flow that began when the rule led to another port goes there still.
      match({ ct: { key: 'ip saddr', dir: 'reply' } }, PARENT),
      match({ ct: { key: 'proto-src', dir: 'reply' } }, rule.to_port ?? rule.port),
      match(original('ip saddr'), `@${clients}`),
      goTo(name),
    );
    table.rule(`in-${rule.name}`, goTo('refuse-in'));
    passing(table, name);
  }
}

/**
 * Replaces what the namespace of a family has. `parentHere`: ports of the host lead to the parent
 * only where the parent is, or on the router for all. E_CONFIG: classify().
 */
export function familyTransactions(
  policy: FamilyPolicy,
  resolved: Resolved,
  parentHere: boolean,
  present: readonly Json[],
): object[][] {
  const table = new Table(FAMILY_TABLE);
  const { forward, input } = baseChains(table);
  allowRules(table, policy, resolved);
  inboundRules(table, parentHere ? (policy.inbound ?? []) : []);
  limitRules(table, 'clone', policy.per_clone ?? {}, {
    go: field('ip', 'saddr'),
    back: field('ip', 'daddr'),
  });
  // One key for all: the kind of link, which is Ethernet.
  const all = { go: meta('iiftype'), back: meta('iiftype') };
  limitRules(table, 'family', policy.per_family ?? {}, all);
  table.rule(forward, count(table.counter('other')), drop);
  table.rule(input, goTo('refuse-gateway'));
  return table.transactions(present);
}

/** What does not depend on the policy. */
function baseChains(table: Table): { forward: string; input: string } {
  const base = (type: string, hook: string, prio: number, policy = 'accept'): Json => ({
    type,
    hook,
    prio,
    policy,
  });
  for (const name of ['out', 'in', 'limits']) table.chain(name);
  refuseChain(table);
  refusal(table, 'refuse-out', 'refused-outbound');
  refusal(table, 'refuse-in', 'refused-inbound');
  refusal(table, 'refuse-gateway', 'refused-gateway');
  refusal(table, 'refuse-links', 'refused-links');

  table.chain('prerouting', base('nat', 'prerouting', -100));
  table.chain('postrouting', base('nat', 'postrouting', 100));
  table.rule('postrouting', from('guests'), towards('uplink'), { masquerade: null });

  const forward = 'forward';
  table.chain(forward, base('filter', 'forward', 0, 'drop'));
  table.rule(forward, state('invalid'), count(table.counter('invalid')), drop);
  // ICMP errors about flows; nothing here makes connections expected.
  const related = count(table.counter('related'));
  table.rule(forward, state('related'), isProtocol('icmp'), perSecond(100), related, accept);
  table.rule(forward, state('related'), drop);
  const [block = '', bits] = LINK_NETWORK.split('/');
  const links = { prefix: { addr: block, len: Number(bits) } };
  const toLinks = match(field('ip', 'daddr'), links);
  table.rule(forward, from('guests'), toLinks, goTo('refuse-links'));
  const direction = (name: string) => match(ct('direction'), name);
  table.rule(forward, from('guests'), towards('uplink'), direction('original'), goTo('out'));
  table.rule(forward, from('uplink'), towards('guests'), direction('reply'), goTo('out'));
  table.rule(forward, from('uplink'), towards('guests'), direction('original'), goTo('in'));
  table.rule(forward, from('guests'), towards('uplink'), direction('reply'), goTo('in'));

  const input = 'input';
  table.chain(input, base('filter', 'input', 0, 'drop'));
  table.rule(input, from('guests'), toLinks, goTo('refuse-links'));
  table.rule(
    input,
    from('guests'),
    match(field('icmp', 'type'), 'echo-request'),
    perSecond(100),
    count(table.counter('gateway-ping')),
    accept,
  );
  table.rule(input, from('uplink'), goTo('refuse-in'));
  return { forward, input };
}

/** A family's gateway as the host's own table sees it. */
export interface Linked {
  /** Its address on the link. */
  address: string;
  inbound: readonly { protocol: string; port: number }[];
}

export interface HostRules {
  /** Forwarding was switched on for gateways, and is for them alone. */
  guard: boolean;
  /** Each gateway may have so many flows of its guests in the host's table of connections. */
  flowsMax: number;
}

/** The host's table; `links` in the order of family numbers. */
export function hostTransactions(
  links: readonly Linked[],
  { guard, flowsMax }: HostRules,
  present: readonly Json[],
): object[][] {
  const table = new Table(HOST_TABLE);
  const any = `${LINK_PREFIX}*`;
  const notFrom = match(meta('iifname'), any, '!=');
  const notTowards = match(meta('oifname'), any, '!=');
  const chain = (name: string, type: string, prio: number) =>
    table.chain(name, { type, hook: name, prio, policy: 'accept' });
  chain('prerouting', 'nat', -100);
  chain('postrouting', 'nat', 100);
  chain('forward', 'filter', 0);
  chain('input', 'filter', 0);
  refuseChain(table);
  refusal(table, 'refuse-between', 'refused-between');
  refusal(table, 'refuse-host', 'refused-host');
  const local = match({ fib: { result: 'type', flags: ['daddr'] } }, 'local');
  for (const protocol of ['tcp', 'udp']) {
    // Families whose parents have the same name have the same ports: the first gets them.
    const ports = new Map<number, string>();
    for (const { address, inbound } of links) {
      for (const rule of inbound) {
        if (rule.protocol === protocol && !ports.has(rule.port)) ports.set(rule.port, address);
      }
    }
    if (ports.size === 0) continue;
    const map = table.map('inet_service', 'ipv4_addr', [...ports]);
    const addr = lookUp(field(protocol, 'dport'), map);
    table.rule('prerouting', notFrom, local, isProtocol(protocol), { dnat: { addr } });
  }
  table.rule('postrouting', from(any), notTowards, { masquerade: null });
  table.rule('forward', from(any), towards(any), goTo('refuse-between'));
  // The policy's limits are those of families; this one keeps a family from using up what the host
  // and all families have together.
  const flows = `flows-${flowsMax}`;
  const many = meter(flows, meta('iifname'), { 'ct count': { val: flowsMax, inv: true } }, false);
  table.lasting(flows, many, count(table.counter('over-flows')), goTo('refuse'));
  table.rule('forward', from(any), begins, jump(flows));
  table.rule('forward', from(any), accept);
  table.rule('forward', towards(any), match(ct('state'), ['established', 'related'], 'in'), accept);
  table.rule('forward', towards(any), match(ct('status'), 'dnat', 'in'), accept);
  table.rule('forward', towards(any), drop);
  if (guard) {
    table.chain('guard');
    table.rule('guard', drop);
    table.rule('forward', jump('guard'));
  }
  table.rule('input', from(any), goTo('refuse-host'));
  return table.transactions(present);
}

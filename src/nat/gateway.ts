/**
 * The NAT gateways of one host: a namespace for each family that has a VM here. The state is in the
 * kernel, and beside it one file with the policy in force; any process with the same host namespace
 * goes on with it. `sync` makes what is there equal to what should be, whoever made it. Where the
 * policy names a router, that host has gateways for the families of all hosts, the others have none
 * and their filters lead to it.
 *
 *   filter --- sfgFFFFFF | guests (10.86.0.1)  namespace  uplink | sfnFFFFFF --- the host's routes
 *
 * Invariants:
 *  - a gateway becomes a port of the filter last and stops being one first: what passes is filtered;
 *  - a half-made gateway (a process that was killed) is taken down and made anew;
 *  - one process at a time changes things: a lock on a file that only root can open;
 *  - all gateways of a host are ports of one uplink's filter; the policy's file says which.
 */

import { readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { readJson, writeJson } from '../common/files.js';
import type { NetbackFilter } from '../netback-filter/filter.js';
import type { GatewayMode } from '../netback-filter/policy.js';
import { GATEWAY, ipNumber, ipText, MTU, VMID_GATEWAY, wireMac } from '../network/addresses.js';
import { withLock } from './lock.js';
import {
  command,
  getSysctl,
  ip,
  type Netns,
  namespaceNumber,
  nft,
  nftList,
  setSysctl,
} from './netns.js';
import { dnsNames, type FamilyPolicy, type NatPolicy, parsePolicy, policyOf } from './policy.js';
import { type Resolved, type Resolver, refresh } from './resolve.js';
import {
  FAMILY_TABLE,
  familyTransactions,
  GUESTS_PREFIX,
  HOST_TABLE,
  hostTransactions,
  LINK_PREFIX,
  type Linked,
} from './ruleset.js';

export const NAT_RUN_DIR = '/run/snowflock';
const LINK_BASE = ipNumber('100.86.0.0');
const LINKS_MAX = 32_768;
/**
 * One gateway's share of the host's table of connections, so that a few cannot fill it. The kernel
 * goes through all of a counter's flows up to once a tick, while new ones come: thus no larger.
 */
const FLOWS_PART = 16;
/** Linux' GSO_MAX_SEGS. */
const SEGMENTS_MAX = 65_535;

export interface NatHostOptions {
  /** Of the host's namespace, in which its taps are. */
  filter: NetbackFilter;
  /** The host's network namespace; default: this process's. */
  netns?: string;
  /** Where the policy in force is kept. Default /run/snowflock. */
  runDir?: string;
  resolver?: Resolver;
  /** Names of families' root parents, for policies that go by them. */
  nameOf?: (family: number) => string | undefined;
  /** As policies name this host if it is the router. Default: what a daemon said, or its hostname. */
  hostName?: string;
  /**
   * For the router: families with VMs on other hosts, and their names where they are known. Default:
   * what a daemon said, or those that the policy has by number.
   */
  elsewhere?: () => ReadonlyMap<number, string | undefined>;
  /** Flows that one gateway's guests may have at once. Default: a sixteenth of the host's table. */
  flowsMax?: number;
}

/** The policy in force. */
interface State {
  version: 1;
  policy: NatPolicy;
  resolved: Resolved;
  /** By family number: names of root parents, as a daemon has told them. */
  names: Record<string, string>;
  /** As a daemon has told them: this host's name, families of other hosts. */
  host?: string;
  elsewhere?: number[];
  /** Whose filter the gateways are ports of. */
  uplink?: string;
}

export interface Counts {
  packets: number;
  bytes: number;
}

export interface GatewayView {
  family: number;
  namespace: string;
  /** On the link to the host. */
  address: string;
  /** Ports of this host lead to the parent: it is here, or this host is the router. */
  parent_here: boolean;
  connections: number;
  counters: Record<string, Counts>;
}

export interface NatView {
  applied: boolean;
  /** This host, as policies name it. */
  host_name: string;
  /** The host that is the way out for all; null: each host is its own. */
  router: string | null;
  gateways: GatewayView[];
  host: Record<string, Counts>;
}

/** What a host has to do with gateways under a policy. */
interface Part {
  mode: GatewayMode;
  /** Families that have a gateway here; true where ports lead to the parent. */
  families: Map<number, boolean>;
}

interface Link {
  family: number;
  slot: number;
}

const hex = (family: number) => family.toString(16).padStart(6, '0');
const hostEnd = (slot: number) => ipText(LINK_BASE + slot * 2);
const familyEnd = (slot: number) => ipText(LINK_BASE + slot * 2 + 1);

export class NatHost {
  readonly #filter: NetbackFilter;
  readonly #netns: Netns;
  readonly #suffix: string;
  readonly #runDir: string;
  readonly #resolver: Resolver | undefined;
  readonly #nameOf: (family: number) => string | undefined;
  readonly #hostName: string | undefined;
  readonly #elsewhere: NatHostOptions['elsewhere'];
  readonly #flowsMax: number | undefined;

  constructor(options: NatHostOptions) {
    this.#filter = options.filter;
    this.#netns = options.netns;
    this.#suffix = `-${namespaceNumber(options.netns)}`;
    this.#runDir = options.runDir ?? NAT_RUN_DIR;
    this.#resolver = options.resolver;
    this.#nameOf = options.nameOf ?? (() => undefined);
    this.#hostName = options.hostName;
    this.#elsewhere = options.elsewhere;
    this.#flowsMax = options.flowsMax;
  }

  namespaceOf(family: number): string {
    return `sfnat-${hex(family)}${this.#suffix}`;
  }

  /**
   * Puts a policy in force for all families of this host. DNS names that cannot be resolved, or not
   * to all their addresses, are in `failed`; they allow what else they have or had, or nothing.
   * E_NETWORK, E_IO, E_IN_USE (lock), E_STATE (gateways on another uplink).
   */
  apply(policy: NatPolicy): Promise<{ families: number[]; failed: Record<string, string> }> {
    return this.#locked(async () => {
      const before = await this.#ownState();
      const found = await this.#resolve(policy, before?.resolved ?? {});
      const { names = {}, host, elsewhere } = before ?? {};
      const told = { ...(host && { host }), ...(elsewhere && { elsewhere }) };
      const state: State = { version: 1, policy, resolved: found.resolved, names, ...told };
      const families = await this.#sync(state);
      return { families, failed: found.failed };
    });
  }

  /** Gateways for the families that have VMs here now, none for others. Nothing without a policy. */
  sync(): Promise<number[]> {
    return this.#locked(async () => {
      const state = await this.#ownState();
      return state === undefined ? [] : await this.#sync(state);
    });
  }

  /** Asks for all DNS names again. What failed. */
  refresh(): Promise<Record<string, string>> {
    return this.#locked(async () => {
      const state = await this.#ownState();
      if (state === undefined) return {};
      const { resolved, failed } = await this.#resolve(state.policy, state.resolved);
      await this.#sync({ ...state, resolved });
      return failed;
    });
  }

  /** Takes all gateways away, and the policy. */
  remove(): Promise<number[]> {
    return this.#locked(async () => {
      await this.#ownState();
      const families = await this.#families();
      for (const family of families) await this.#takeDown(family);
      this.#filter.setGatewayMode('own');
      await this.#removeHostTable();
      await rm(this.#stateFile(), { force: true });
      return families;
    });
  }

  /** The policy in force, or undefined. */
  async policy(): Promise<Pick<State, 'policy' | 'resolved' | 'names' | 'elsewhere'> | undefined> {
    return await this.#state();
  }

  async view(): Promise<NatView> {
    const gateways: GatewayView[] = [];
    const state = await this.#ownState();
    const part = state === undefined ? undefined : this.#part(state);
    for (const { family, slot } of await this.#links()) {
      const netns = this.#netnsOf(family);
      gateways.push({
        family,
        namespace: this.namespaceOf(family),
        address: familyEnd(slot),
        parent_here: part?.families.get(family) === true,
        connections: Number(getSysctl(netns, 'net/netfilter/nf_conntrack_count')),
        counters: counters(await this.#table(netns, FAMILY_TABLE)),
      });
    }
    gateways.sort((a, b) => a.family - b.family);
    const host = counters(await this.#table(this.#netns, HOST_TABLE));
    return {
      applied: state !== undefined,
      host_name: this.#nameOfHost(state),
      router: state?.policy.router ?? null,
      gateways,
      host,
    };
  }

  #stateFile(): string {
    return join(this.#runDir, `nat${this.#suffix}.json`);
  }

  async #state(): Promise<State | undefined> {
    const file = this.#stateFile();
    const value = (await readJson(file)) as State | undefined;
    if (value === undefined) return undefined;
    if (value.version !== 1) throw new SnowflockError('E_CONFIG', `${file} is of another version`);
    return { ...value, policy: parsePolicy(value.policy, file) };
  }

  /**
   * As long as there are gateways on another uplink: E_STATE. This filter does not know their VMs, and
   * would have them taken down.
   */
  async #ownState(): Promise<State | undefined> {
    const state = await this.#state();
    const { uplink } = this.#filter;
    const other = state?.uplink;
    if (other === undefined || other === uplink) return state;
    const lost = !(await this.#linkNames()).includes(other);
    if (lost || (await this.#families()).length === 0) return state;
    throw new SnowflockError(
      'E_STATE',
      `the gateways of this host are on ${other}, not on ${uplink}: name that one (--uplink ${other}), ` +
        `or take them away first (snowflock nat rm --uplink ${other})`,
    );
  }

  #resolve(policy: NatPolicy, before: Resolved) {
    return refresh(dnsNames(policy), before, {
      keepMs: (policy.dns_keep_s ?? 3600) * 1000,
      nowMs: Date.now(),
      allowPrivate: policy.dns_private === true,
      resolver: this.#resolver,
    });
  }

  /** Families with a VM on this host; true where the parent is one of them. */
  #localFamilies(): Map<number, boolean> {
    const out = new Map<number, boolean>();
    for (const { family, vmid } of this.#filter.vms()) {
      out.set(family, vmid === 0 || out.get(family) === true);
    }
    return out;
  }

  /** With a VM on this host, gateway here or not. */
  localFamilies(): number[] {
    return [...this.#localFamilies().keys()].sort((a, b) => a - b);
  }

  #nameOfHost(state?: State): string {
    return this.#hostName ?? state?.host ?? hostname();
  }

  #part(state: State): Part {
    const families = this.#localFamilies();
    const { router } = state.policy;
    if (router === undefined) return { mode: 'own', families };
    if (router !== this.#nameOfHost(state)) return { mode: 'elsewhere', families: new Map() };
    const listed = () =>
      Object.keys(state.policy.families ?? {}).flatMap((key) => (/^\d+$/.test(key) ? +key : []));
    const others = this.#elsewhere?.().keys() ?? state.elsewhere ?? listed();
    const all = [...families.keys(), ...others];
    return { mode: 'shared', families: new Map(all.map((family) => [family, true])) };
  }

  #netnsOf(family: number): string {
    return `/run/netns/${this.namespaceOf(family)}`;
  }

  async #links(): Promise<Link[]> {
    const out = await command(this.#netns, 'ip', ['-j', '-4', 'address', 'show']);
    const shown = JSON.parse(out) as { ifname?: string; addr_info?: { local: string }[] }[];
    return shown.flatMap(({ ifname, addr_info }) => {
      const family = familyOfName(ifname, LINK_PREFIX);
      const address = addr_info?.[0]?.local;
      if (family === undefined || address === undefined) return [];
      return [{ family, slot: (ipNumber(address) - LINK_BASE) / 2 }];
    });
  }

  async #linkNames(): Promise<string[]> {
    const out = await command(this.#netns, 'ip', ['-j', 'link', 'show']);
    return (JSON.parse(out) as { ifname?: string }[]).flatMap(({ ifname }) => ifname ?? []);
  }

  /** All families of which there is anything, finished or not. */
  async #families(): Promise<number[]> {
    const names = await this.#linkNames();
    const spaces = await command(undefined, 'ip', ['-j', 'netns', 'list']);
    const found = new Set<number>();
    for (const name of names) {
      const family = familyOfName(name, GUESTS_PREFIX) ?? familyOfName(name, LINK_PREFIX);
      if (family !== undefined) found.add(family);
    }
    for (const { name } of JSON.parse(spaces || '[]') as { name: string }[]) {
      const match = /^sfnat-([0-9a-f]{6})(-\d+)$/.exec(name);
      if (match !== null && match[2] === this.#suffix) {
        found.add(Number.parseInt(match[1] ?? '', 16));
      }
    }
    return [...found].sort((a, b) => a - b);
  }

  async #table(netns: Netns, name: string): Promise<Record<string, unknown>[]> {
    const all = await nftList(netns, 'ruleset', 'ip');
    return all.filter((entry) =>
      Object.values(entry).some((it) => (it as { table?: unknown } | null)?.table === name),
    );
  }

  async #sync(state: State): Promise<number[]> {
    const { mode, families: wanted } = this.#part(state);
    if (this.#filter.gatewayMode() !== mode) this.#filter.setGatewayMode(mode);
    const elsewhere = this.#elsewhere?.();
    const ports = new Set(this.#filter.gateways().map(({ family }) => family));
    const interfaces = new Set(await this.#linkNames());
    const links = new Map((await this.#links()).map((it) => [it.family, it.slot]));
    for (const family of await this.#families()) {
      // The port is set last: a gateway without it was not finished.
      const guests = `${GUESTS_PREFIX}${hex(family)}`;
      const whole = ports.has(family) && interfaces.has(guests) && links.has(family);
      if (wanted.has(family) && whole) continue;
      await this.#takeDown(family);
      links.delete(family);
    }
    const linked: Linked[] = [];
    // Also of families whose gateway is on the router: `explain` goes by them.
    const names: Record<string, string> = {};
    for (const family of [...wanted.keys(), ...this.#localFamilies().keys()]) {
      const name = this.#nameOf(family) ?? elsewhere?.get(family) ?? state.names[family];
      if (name !== undefined) names[family] = name;
    }
    for (const [family, parentHere] of [...wanted].sort(([a], [b]) => a - b)) {
      const policy = policyOf(state.policy, family, names[family]);
      let slot = links.get(family);
      const fresh = slot === undefined;
      if (slot === undefined) {
        slot = freeSlot(new Set(links.values()));
        links.set(family, slot);
        await this.#setUp(family, slot);
      }
      const netns = this.#netnsOf(family);
      const present = fresh ? [] : await this.#table(netns, FAMILY_TABLE);
      await this.#cutSegments(family, limitsPackets(policy));
      for (const one of familyTransactions(policy, state.resolved, parentHere, present)) {
        await nft(netns, one);
      }
      if (fresh) this.#filter.addGateway({ port: `${GUESTS_PREFIX}${hex(family)}`, family });
      const inbound = parentHere ? (policy.inbound ?? []) : [];
      linked.push({ address: familyEnd(slot), inbound });
    }
    if (linked.length === 0) await this.#removeHostTable();
    else await this.#hostTable(linked);
    const told = {
      ...(this.#hostName !== undefined && { host: this.#hostName }),
      ...(elsewhere !== undefined && { elsewhere: [...elsewhere.keys()] }),
    };
    const { uplink } = this.#filter;
    await writeJson(this.#stateFile(), { ...state, ...told, names, uplink });
    return [...wanted.keys()].sort((a, b) => a - b);
  }

  async #setUp(family: number, slot: number): Promise<void> {
    const name = this.namespaceOf(family);
    const [guests, link] = [`${GUESTS_PREFIX}${hex(family)}`, `${LINK_PREFIX}${hex(family)}`];
    const gatewayMac = wireMac({ family, vmid: VMID_GATEWAY });
    // Any but 5e:..; the pairs are point to point, so all hosts and families may have the same.
    const [hostMac, innerMac] = ['02:53:46:00:00:01', '02:53:46:00:00:02'];
    const pair = (outer: string, inner: string, mac: string) =>
      `link add ${outer} address ${hostMac} mtu ${MTU} type veth ` +
      `peer name ${inner} address ${mac} mtu ${MTU} netns ${name}`;
    await command(this.#netns, 'ip', ['netns', 'add', name]);
    const netns = this.#netnsOf(family);
    setSysctl(netns, 'net/ipv6/conf/all/disable_ipv6', '1');
    setSysctl(netns, 'net/ipv6/conf/default/disable_ipv6', '1');
    setSysctl(netns, 'net/ipv4/conf/all/rp_filter', '0');
    setSysctl(netns, 'net/ipv4/conf/all/send_redirects', '0');
    // The filter knows the gateway by one address, also where it answers for another.
    setSysctl(netns, 'net/ipv4/conf/all/arp_announce', '2');
    // Refusals go to guests, each of which has its own limit of packets.
    setSysctl(netns, 'net/ipv4/icmp_ratelimit', '0');
    await ip(this.#netns, [pair(guests, 'guests', gatewayMac), pair(link, 'uplink', innerMac)]);
    for (const outer of [guests, link]) {
      setSysctl(this.#netns, `net/ipv6/conf/${outer}/disable_ipv6`, '1');
    }
    await ip(netns, [
      'link set lo up',
      `address add ${GATEWAY}/16 dev guests`,
      'link set guests up',
      `address add ${familyEnd(slot)}/31 dev uplink`,
      'link set uplink up',
      `route add default via ${hostEnd(slot)} dev uplink onlink`,
    ]);
    await ip(this.#netns, [`address add ${hostEnd(slot)}/31 dev ${link}`, `link set ${link} up`]);
    setSysctl(netns, 'net/ipv4/ip_forward', '1');
  }

  /**
   * TCP comes in segments of up to 64 KiB, which are packets of the wire's size only at its end. A
   * limit of packets is for those: then they are cut on their way into the namespace, for a price.
   */
  async #cutSegments(family: number, cut: boolean): Promise<void> {
    const most = cut ? 1 : SEGMENTS_MAX;
    const links = [GUESTS_PREFIX, LINK_PREFIX].map((prefix) => `${prefix}${hex(family)}`);
    await ip(
      this.#netns,
      links.map((name) => `link set ${name} gso_max_segs ${most}`),
    );
  }

  async #takeDown(family: number): Promise<void> {
    for (const { port, family: its } of this.#filter.gateways()) {
      if (its === family) this.#filter.removeVm(port);
    }
    const names = await this.#linkNames();
    for (const prefix of [GUESTS_PREFIX, LINK_PREFIX]) {
      const name = `${prefix}${hex(family)}`;
      if (names.includes(name)) await ip(this.#netns, [`link del ${name}`]);
    }
    const spaces = await command(undefined, 'ip', ['netns', 'list']);
    const namespace = this.namespaceOf(family);
    if (spaces.split('\n').some((line) => line.split(' ')[0] === namespace)) {
      await command(undefined, 'ip', ['netns', 'del', namespace]);
    }
  }

  async #hostTable(linked: readonly Linked[]): Promise<void> {
    const present = await this.#table(this.#netns, HOST_TABLE);
    const guarded = present.some((it) => (it.chain as { name?: string })?.name === 'guard');
    const off = getSysctl(this.#netns, 'net/ipv4/ip_forward') === '0';
    const all = getSysctl(this.#netns, 'net/netfilter/nf_conntrack_max');
    const flowsMax = this.#flowsMax ?? Math.max(1, Math.floor(Number(all) / FLOWS_PART));
    for (const one of hostTransactions(linked, { guard: guarded || off, flowsMax }, present)) {
      await nft(this.#netns, one);
    }
    if (off) setSysctl(this.#netns, 'net/ipv4/ip_forward', '1');
  }

  async #removeHostTable(): Promise<void> {
    const present = await this.#table(this.#netns, HOST_TABLE);
    if (present.length === 0) return;
    const guarded = present.some((it) => (it.chain as { name?: string })?.name === 'guard');
    if (guarded) setSysctl(this.#netns, 'net/ipv4/ip_forward', '0');
    await nft(this.#netns, [{ delete: { table: { family: 'ip', name: HOST_TABLE } } }]);
  }

  #locked<T>(work: () => Promise<T>): Promise<T> {
    return withLock(this.#runDir, work);
  }
}

const limitsPackets = ({ per_clone, per_family }: FamilyPolicy): boolean =>
  (per_clone?.packets_per_s ?? per_family?.packets_per_s) !== undefined;

function familyOfName(name: string | undefined, prefix: string): number | undefined {
  if (name === undefined || !name.startsWith(prefix)) return undefined;
  const rest = name.slice(prefix.length);
  return /^[0-9a-f]{6}$/.test(rest) ? Number.parseInt(rest, 16) : undefined;
}

function freeSlot(taken: ReadonlySet<number>): number {
  for (let slot = 0; slot < LINKS_MAX; slot++) if (!taken.has(slot)) return slot;
  throw new SnowflockError('E_CAPACITY', `a host has at most ${LINKS_MAX} gateways`);
}

function counters(table: readonly Record<string, unknown>[]): Record<string, Counts> {
  const out: Record<string, Counts> = {};
  for (const { counter } of table) {
    const it = counter as { name: string; packets: number; bytes: number } | undefined;
    if (it !== undefined) out[it.name] = { packets: it.packets, bytes: it.bytes };
  }
  return out;
}

/** Reads and checks a policy file. E_CONFIG, E_IO. */
export function loadPolicy(path: string): NatPolicy {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw new SnowflockError('E_IO', `cannot read ${path}: ${String(error)}`);
  }
  try {
    return parsePolicy(JSON.parse(text), path);
  } catch (error) {
    if (error instanceof SnowflockError) throw error;
    throw new SnowflockError('E_CONFIG', `${path} is not JSON: ${String(error)}`);
  }
}

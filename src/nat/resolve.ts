/**
 * DNS names of rules: asked by the host, never believed from a guest. An address stays for a while
 * after a name has lost it, so that names with many addresses in turn do not cut flows. Bounded: so
 * many addresses a name, the newest; so long a query.
 *
 * Whoever owns a name chooses its addresses. He is not to open the host's own network to guests
 * (DNS rebinding): addresses that are not of the public network (RFC 6890) are left out, those of
 * private networks unless the policy wants them, the others always. Rules can have them as numbers.
 */
import { promises as dns } from 'node:dns';
import { isIPv4 } from 'node:net';
import { ipNumber } from '../network/addresses.js';
import { parseBlock } from './policy.js';

export const ADDRESSES_MAX = 64;
const LIMIT_MS = 5_000;

/** By name, by address: when it was last seen, in ms of the clock. */
export type Resolved = Record<string, Record<string, number>>;

export type Resolver = (name: string) => Promise<readonly string[]>;

const ranges = (...blocks: string[]) => blocks.flatMap((block) => parseBlock(block) ?? []);
const PRIVATE = ranges('10.0.0.0/8', '100.64.0.0/10', '172.16.0.0/12', '192.168.0.0/16');
/** This host, the link (clouds have their metadata there), protocols, benchmarks, groups. */
const SPECIAL = ranges(
  '0.0.0.0/8',
  '127.0.0.0/8',
  '169.254.0.0/16',
  '192.0.0.0/24',
  '198.18.0.0/15',
  '224.0.0.0/3',
);

/** Whether a name may lead there. */
type Verdict = 'yes' | 'private' | 'never';

function verdictOf(address: string): Verdict {
  if (!isIPv4(address)) return 'never';
  const number = ipNumber(address);
  const within = (all: typeof PRIVATE) =>
    all.some(({ first, last }) => number >= first && number <= last);
  if (within(SPECIAL)) return 'never';
  return within(PRIVATE) ? 'private' : 'yes';
}

/** Through the servers of /etc/resolv.conf. */
export async function resolveByHost(name: string): Promise<readonly string[]> {
  const resolver = new dns.Resolver({ timeout: LIMIT_MS / 2, tries: 2 });
  return await resolver.resolve4(name.replace(/\.$/, ''));
}

export interface RefreshOptions {
  keepMs: number;
  nowMs: number;
  /** Names may lead to addresses of private networks. */
  allowPrivate: boolean;
  resolver?: Resolver | undefined;
}

/**
 * Asks for all names. A name that cannot be resolved keeps what it had, but for addresses that are to
 * be left out; `failed` says what is wrong with which name. Names not asked for are forgotten.
 */
export async function refresh(
  names: readonly string[],
  before: Resolved,
  { keepMs, nowMs, allowPrivate, resolver = resolveByHost }: RefreshOptions,
): Promise<{ resolved: Resolved; failed: Record<string, string> }> {
  const resolved: Resolved = {};
  const failed: Record<string, string> = {};
  const good = (address: string): boolean => {
    const verdict = verdictOf(address);
    return verdict === 'yes' || (verdict === 'private' && allowPrivate);
  };
  await Promise.all(
    names.map(async (name) => {
      const had = Object.entries(before[name] ?? {}).filter(([address]) => good(address));
      try {
        const addresses = await resolver(name);
        const all = new Map(had.filter(([, seenMs]) => nowMs - seenMs <= keepMs));
        for (const address of addresses.filter(good)) all.set(address, nowMs);
        const newest = [...all].sort((a, b) => b[1] - a[1]).slice(0, ADDRESSES_MAX);
        resolved[name] = Object.fromEntries(newest);
        const bad = addresses.filter((address) => !good(address));
        if (bad.length > 0) failed[name] = leftOut(bad);
      } catch (error) {
        resolved[name] = Object.fromEntries(had);
        failed[name] = error instanceof Error ? error.message : String(error);
      }
    }),
  );
  return { resolved, failed };
}

function leftOut(addresses: readonly string[]): string {
  const of = (verdict: Verdict) => addresses.filter((address) => verdictOf(address) === verdict);
  const text = (verdict: Verdict, what: string) => {
    const all = of(verdict);
    const shown = `${all.slice(0, 3).join(', ')}${all.length > 3 ? ', ...' : ''}`;
    return all.length === 0 ? [] : [`${what} left out: ${shown}`];
  };
  return [
    ...text('private', 'private addresses (dns_private would allow them)'),
    ...text('never', 'addresses that no name may lead to'),
  ].join('; ');
}

/**
 * DNS names of rules: asked by the host, never believed from a guest. An address stays for a while
 * after a name has lost it, so that names with many addresses in turn do not cut flows. Bounded: so
 * many addresses a name, the newest; so long a query.
 */
import { promises as dns } from 'node:dns';

export const ADDRESSES_MAX = 64;
const LIMIT_MS = 5_000;

/** By name, by address: when it was last seen, in ms of the clock. */
export type Resolved = Record<string, Record<string, number>>;

export type Resolver = (name: string) => Promise<readonly string[]>;

/** Through the servers of /etc/resolv.conf. */
export async function resolveByHost(name: string): Promise<readonly string[]> {
  const resolver = new dns.Resolver({ timeout: LIMIT_MS / 2, tries: 2 });
  return await resolver.resolve4(name.replace(/\.$/, ''));
}

/**
 * Asks for all names. A name that cannot be resolved keeps what it had; `failed` says why. Names not
 * asked for are forgotten.
 */
export async function refresh(
  names: readonly string[],
  before: Resolved,
  keepMs: number,
  nowMs: number,
  resolver: Resolver = resolveByHost,
): Promise<{ resolved: Resolved; failed: Record<string, string> }> {
  const resolved: Resolved = {};
  const failed: Record<string, string> = {};
  await Promise.all(
    names.map(async (name) => {
      const had = before[name] ?? {};
      try {
        const addresses = await resolver(name);
        const kept = Object.entries(had).filter(([, seenMs]) => nowMs - seenMs <= keepMs);
        const all = new Map(kept);
        for (const address of addresses) all.set(address, nowMs);
        const newest = [...all].sort((a, b) => b[1] - a[1]).slice(0, ADDRESSES_MAX);
        resolved[name] = Object.fromEntries(newest);
      } catch (error) {
        resolved[name] = had;
        failed[name] = error instanceof Error ? error.message : String(error);
      }
    }),
  );
  return { resolved, failed };
}

/** The replicas of this host and of all others, for people. */
import { isRemote, KINDS } from './bases.js';
import type { Host } from './host.js';
import type { Orphans } from './orphans.js';
import type { ReplicaSummary } from './peers.js';

export async function replicasHere(host: Host, orphans: Orphans): Promise<ReplicaSummary[]> {
  const found = new Map<string, ReplicaSummary>();
  for (const record of host.vms.all()) {
    if (record.base === null || record.state === 'ended') continue;
    const source = isRemote(host, record)
      ? orphans.source(record.base.ram.generation)
      : ({ state: 'live', heard_ms: null, coverage: [] } as const);
    for (const kind of KINDS) {
      const { generation } = record.base[kind];
      const known = found.get(generation);
      if (known !== undefined) {
        known.vms.push(record.id);
        continue;
      }
      const without = source.coverage.find((one) => one.generation === generation);
      found.set(generation, {
        generation,
        kind,
        host: host.config.name,
        vms: [record.id],
        pages: record.base[kind].pages,
        held_pages: 0,
        complete: false,
        served: false,
        source: {
          host: record.parent?.host ?? host.config.name,
          state: source.state,
          heard_ms: source.heard_ms,
        },
        needed_pages: without?.needed_pages ?? null,
        unheld_pages: without?.unheld_pages ?? null,
        held_by: without?.held_by.map((one) => one.host) ?? [],
      });
    }
  }
  await Promise.all(
    [...found.values()].map(async (replica) => {
      const { generation } = replica;
      // Being opened, or closed: it holds nothing.
      const stats = await host.dataplane
        .call('replica.stats', { generation })
        .catch(() => undefined);
      if (stats === undefined) return;
      replica.held_pages = stats.present + stats.zero;
      replica.complete = stats.complete;
      replica.served = stats.served;
    }),
  );
  return [...found.values()];
}

/** Replicas of all hosts that answer, and the hosts that do not. */
export async function allReplicas(
  host: Host,
): Promise<{ replicas: ReplicaSummary[]; unreachable: { host: string; message: string }[] }> {
  const unreachable: { host: string; message: string }[] = [];
  const lists = await Promise.all(
    host.peers.all().map((port) =>
      port.replicas().catch((error: unknown) => {
        unreachable.push({ host: port.name, message: String(error) });
        return [];
      }),
    ),
  );
  const order = (one: ReplicaSummary): string => `${one.generation} ${one.host}`;
  const replicas = lists.flat().sort((a, b) => (order(a) < order(b) ? -1 : 1));
  return { replicas, unreachable };
}

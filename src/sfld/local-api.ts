/** The daemon's API for this host's users: HTTP over a Unix socket that only root may open. */
import { chmod, unlink } from 'node:fs/promises';
import Fastify, { type FastifyInstance } from 'fastify';
import Type, { type Static } from 'typebox';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { DhcpCounters } from '../dhcp/counters.js';
import { REGIONS_MAX, setDisjoint } from './disjoint.js';
import {
  checkpointVm,
  createClones,
  forkVm,
  joinFork,
  killClones,
  releaseCheckpoint,
} from './fork.js';
import type { Host } from './host.js';
import { summary } from './local-host.js';
import { listAll, locate } from './locate.js';
import { type ForkRecord, showFork } from './records.js';
import { allReplicas } from './replicas.js';
import { acceptSession } from './sessions.js';
import { requestTicket } from './tickets.js';
import { findVm, runVm } from './vms.js';

const RunBody = Type.Object(
  {
    image: Type.String({ minLength: 1, maxLength: 64 }),
    name: Type.String({ pattern: '^[a-z][a-z0-9-]{0,31}$' }),
    ram_bytes: Type.Integer({ minimum: 64 * 2 ** 20, maximum: 2 ** 42, multipleOf: 2 ** 20 }),
    vcpus: Type.Integer({ minimum: 1, maximum: 64 }),
    addressing: Type.Optional(Type.Union([Type.Literal('agent'), Type.Literal('dhcp')])),
  },
  { additionalProperties: false },
);
const Count = Type.Integer({ minimum: 1, maximum: 4096 });
const ForkBody = Type.Object({ clones: Count }, { additionalProperties: false });
const TicketBody = Type.Object({ ticket: Type.String() }, { additionalProperties: false });
const Regions = Type.Array(
  Type.Object(
    {
      offset_bytes: Type.Integer({ minimum: 0 }),
      size_bytes: Type.Integer({ minimum: 0 }),
    },
    { additionalProperties: false },
  ),
  { maxItems: REGIONS_MAX },
);
const DisjointBody = Type.Object({ ram: Regions, disk: Regions }, { additionalProperties: false });
const JoinBody = Type.Object(
  {
    ref: Type.String({ minLength: 1 }),
    timeout_ms: Type.Integer({ minimum: 0, maximum: 86_400_000 }),
  },
  { additionalProperties: false },
);
const KillBody = Type.Union([
  Type.Object({ fork: Type.String() }, { additionalProperties: false }),
  Type.Object({ vmid: Type.Integer({ minimum: 1 }) }, { additionalProperties: false }),
]);
interface Ref {
  ref: string;
}

export async function listenLocal(host: Host, socket: string): Promise<FastifyInstance> {
  const app = Fastify({
    forceCloseConnections: true,
    // What is wrong is refused, not bent into shape.
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false } },
  });
  app.setErrorHandler((error, _request, reply) => {
    const status = (error as { statusCode?: number }).statusCode;
    const mapped = asSnowflockError(
      error,
      status !== undefined && status < 500 ? 'E_ARGUMENT' : 'E_INTERNAL',
    );
    if (mapped.code === 'E_INTERNAL') host.log.error({ error: String(error) }, 'request failed');
    return reply.code(mapped.code === 'E_NOT_FOUND' ? 404 : 400).send({ error: mapped.toJSON() });
  });
  routes(host, app);
  app.server.on('upgrade', (request, stream) => void acceptSession(host, request, stream, false));
  await unlink(socket).catch(() => {}); // left by an earlier daemon; ours is the only one (lock)
  await app.listen({ path: socket });
  await chmod(socket, 0o600);
  return app;
}

/** With what its VMs' servers have not yet counted. */
function dhcpTotals(host: Host): DhcpCounters {
  for (const { dhcp } of host.live.values()) dhcp.counters();
  return host.dhcp;
}

function routes(host: Host, app: FastifyInstance): void {
  app.get('/v1/host', async () => ({
    name: host.config.name,
    address: host.config.address,
    hosts: host.config.hosts.map(({ name }) => name),
    driver: host.driver.name,
    capabilities: await host.driver.probe(),
    dataplane_restarts: host.dataplane.restarts,
    free: host.resources.free(),
    groups: host.groups.stats(),
    dhcp: dhcpTotals(host),
  }));
  app.get('/v1/vms', () => listAll(host));
  app.get('/v1/replicas', () => allReplicas(host));
  app.post<{ Body: Static<typeof RunBody> }>(
    '/v1/vms',
    { schema: { body: RunBody } },
    async (request) => summary(host.config.name, await runVm(host, request.body)),
  );
  app.get<{ Params: Ref }>('/v1/vms/:ref/counters', async (request) => {
    const where = await locate(host, request.params.ref);
    return host.peers.get(where.host).counters(where.vm);
  });
  app.post<{ Params: Ref; Body: Static<typeof ForkBody> }>(
    '/v1/vms/:ref/tickets',
    { schema: { body: ForkBody } },
    async (request) => {
      const ticket = await requestTicket(
        host,
        findVm(host, request.params.ref),
        request.body.clones,
      );
      return { ticket: ticket.id, granted: ticket.granted };
    },
  );
  app.post<{ Params: Ref; Body: Static<typeof TicketBody> }>(
    '/v1/vms/:ref/fork',
    { schema: { body: TicketBody } },
    async (request) =>
      showFork(await forkVm(host, findVm(host, request.params.ref), request.body.ticket, null)),
  );
  app.post<{ Params: Ref }>('/v1/vms/:ref/checkpoints', async (request) =>
    showFork(await checkpointVm(host, findVm(host, request.params.ref), null)),
  );
  app.post<{ Params: Ref & { id: string }; Body: Static<typeof TicketBody> }>(
    '/v1/vms/:ref/checkpoints/:id/clones',
    { schema: { body: TicketBody } },
    async (request) =>
      showFork(
        await createClones(
          host,
          findVm(host, request.params.ref),
          request.params.id,
          request.body.ticket,
        ),
      ),
  );
  app.put<{ Params: Ref; Body: Static<typeof DisjointBody> }>(
    '/v1/vms/:ref/disjoint',
    { schema: { body: DisjointBody } },
    async (request) => setDisjoint(host, findVm(host, request.params.ref), request.body),
  );
  app.delete<{ Params: { id: string } }>('/v1/checkpoints/:id', async (request) => {
    await releaseCheckpoint(host, knownFork(host, request.params.id));
    return {};
  });
  app.get('/v1/forks', async () => ({ forks: host.forks.all().map(showFork) }));
  app.get<{ Params: { id: string } }>('/v1/forks/:id', async (request) => {
    const fork = knownFork(host, request.params.id);
    return { fork: showFork(fork), wire: await wireStats(host, fork) };
  });
  app.post<{ Params: Ref; Body: Static<typeof JoinBody> }>(
    '/v1/vms/:ref/join',
    { schema: { body: JoinBody } },
    async (request) => ({
      clones: await joinFork(
        host,
        findVm(host, request.params.ref),
        request.body.ref,
        request.body.timeout_ms,
      ),
    }),
  );
  app.post<{ Params: Ref; Body: Static<typeof KillBody> }>(
    '/v1/vms/:ref/kill-clones',
    { schema: { body: KillBody } },
    async (request) => ({
      killed: await killClones(host, findVm(host, request.params.ref), request.body),
    }),
  );
  app.delete<{ Params: Ref }>('/v1/vms/:ref', async (request) => {
    const where = await locate(host, request.params.ref);
    const end = { status: null, reason: 'killed', message: 'killed by the operator' } as const;
    // Also one that is being made, or that this daemon could not take over.
    await host.peers.get(where.host).endClone(where.vm, end);
    return {};
  });
}

function knownFork(host: Host, id: string): ForkRecord {
  const fork = host.forks.get(id);
  if (fork === undefined) throw new SnowflockError('E_NOT_FOUND', `no fork ${id} on this host`);
  return fork;
}

/** What the fork put on the wire so far; nothing once its generations are closed. */
async function wireStats(
  host: Host,
  fork: ForkRecord,
): Promise<Record<'ram' | 'disk', Record<string, number>> | null> {
  if (fork.state !== 'open') return fork.wire;
  const [ram, disk] = await Promise.all([
    host.dataplane.call('generation.stats', { generation: fork.ram.generation }),
    host.dataplane.call('generation.stats', { generation: fork.disk.generation }),
  ]);
  return { ram, disk };
}

/**
 * What other hosts' daemons may ask of this one, over mutual TLS. A host can speak only for itself:
 * a fork is prepared, started, given up and renewed by its parent's host, a clone's end and answer
 * are told by the host it runs on, as the certificate names them. Any host may end a VM: that is
 * what `snowflock kill` does.
 */
import type { TLSSocket } from 'node:tls';
import Type, { type Static } from 'typebox';
import { createPeerServer, listenForPeers, type PeerServer } from '../cluster/server.js';
import { peerHostName } from '../cluster/tls.js';
import { SnowflockError } from '../common/errors.js';
import { MAX_CONNECTIONS } from '../network/tcp-guard.js';
import type { Host } from './host.js';
import type { LocalHost } from './local-host.js';
import type { EndReport, PrepareRequest } from './records.js';
import { acceptSession } from './sessions.js';

const Id = Type.String({ pattern: '^[a-zA-Z0-9/_.-]{1,128}$' });
const Hex32 = Type.String({ pattern: '^[0-9a-f]{64}$' });
const Vmid = Type.Integer({ minimum: 0, maximum: 0xffff });
const Port = Type.Integer({ minimum: 0, maximum: 65535 });
const Generation = Type.Object({
  generation: Type.String({ pattern: '^[0-9a-f]{32}$' }),
  pages: Type.Integer({ minimum: 1, maximum: 2 ** 36 }),
  source: Type.Object({
    address: Type.String({ format: 'ipv4' }),
    port: Type.Integer({ minimum: 1, maximum: 65535 }),
    group: Type.String({ format: 'ipv4' }),
    group_port: Type.Integer({ minimum: 1, maximum: 65535 }),
    key: Hex32,
  }),
});
const Prepare = Type.Object({
  fork: Id,
  parent: Type.Object({ host: Id, vm: Id }),
  family: Type.Integer({ minimum: 0, maximum: 0xffffff }),
  family_host: Id,
  image: Type.String({ maxLength: 64 }),
  name: Type.String({ pattern: '^[a-z][a-z0-9-]{0,63}$' }),
  ram_bytes: Type.Integer({ minimum: 2 ** 20, maximum: 2 ** 42 }),
  vcpus: Type.Integer({ minimum: 1, maximum: 255 }),
  shape: Type.Unknown(),
  ram: Generation,
  disk: Generation,
  reservation: Id,
  addressing: Type.Optional(Type.Union([Type.Literal('agent'), Type.Literal('dhcp')])),
  inherited: Type.Optional(
    Type.Object({
      address: Type.String({ format: 'ipv4' }),
      connections: Type.Array(
        Type.Object({ peer: Type.String({ format: 'ipv4' }), peer_port: Port, port: Port }),
        { maxItems: MAX_CONNECTIONS },
      ),
    }),
  ),
  clones: Type.Array(
    Type.Object({
      vm: Type.String({ pattern: '^vm[0-9a-f]{8}$' }),
      vmid: Vmid,
      epoch: Id,
      seed: Hex32,
      reply: Type.Union([
        Type.Null(),
        Type.Object({ id: Id, args: Type.Record(Type.String(), Type.String()) }),
      ]),
    }),
    { minItems: 1, maxItems: 4096 },
  ),
});
const End = Type.Object({
  status: Type.Union([Type.Null(), Type.Integer({ minimum: 0, maximum: 255 })]),
  reason: Type.Union(
    (['exit', 'killed', 'shutdown', 'crashed', 'lost', 'failed'] as const).map((one) =>
      Type.Literal(one),
    ),
  ),
  message: Type.String({ maxLength: 8192 }),
  pages_fetched: Type.Optional(Type.Integer({ minimum: 0 })),
});
const Reserve = Type.Object({
  id: Id,
  n: Type.Integer({ minimum: 1, maximum: 4096 }),
  memory_bytes: Type.Integer({ minimum: 1, maximum: 2 ** 42 }),
  vcpus: Type.Integer({ minimum: 1, maximum: 255 }),
});
const Vms = Type.Object({ vms: Type.Array(Id, { maxItems: 65536 }) });
const Standings = Type.Object({
  clones: Type.Array(Type.Object({ vm: Id, fork: Id, parent: Id }), { maxItems: 65536 }),
});
const Generations = Type.Object({
  generations: Type.Array(Type.String({ pattern: '^[0-9a-f]{32}$' }), { maxItems: 64 }),
});
const Ended = Type.Object({ vmid: Vmid, end: End });
const Reply = Type.Object({ vmid: Vmid, reply_ms: Type.Number({ minimum: 0 }) });
const Count = Type.Object({ n: Type.Integer({ minimum: 1, maximum: 4096 }) });

interface ForkId {
  fork: string;
}

export async function listenPeers(host: Host, self: LocalHost): Promise<PeerServer> {
  const server = createPeerServer(host.config, host.log);
  routes(host, server, self);
  server.server.on('upgrade', (request, socket) => {
    const name = peerHostName(request.socket as TLSSocket);
    if (!host.config.hosts.some((one) => one.name === name)) {
      socket.destroy();
      return;
    }
    void acceptSession(host, request, socket, true);
  });
  await listenForPeers(server, host.config);
  return server;
}

function routes(host: Host, server: PeerServer, self: LocalHost): void {
  const own = (peer: string, claimed: string): void => {
    if (peer !== claimed) {
      throw new SnowflockError('E_PEER_AUTH', `host ${peer} may not speak for ${claimed}`);
    }
  };
  const ownFork = (peer: string, fork: string): void => own(peer, self.preparedBy(fork) ?? peer);
  const ownClone = (peer: string, fork: string, vmid: number): void => {
    const clone = host.forks.get(fork)?.clones.find((one) => one.vmid === vmid);
    own(peer, clone?.host ?? peer);
  };
  server.get('/v1/capacity', () => self.capacity());
  server.post<{ Body: Static<typeof Reserve> }>(
    '/v1/reservations',
    { schema: { body: Reserve } },
    async (r) => ({ granted: await self.reserve(r.body.id, r.body.n, r.body) }),
  );
  server.delete<{ Params: { id: string } }>('/v1/reservations/:id', async (r) => {
    await self.release(r.params.id);
    return {};
  });
  server.post<{ Body: PrepareRequest }>(
    '/v1/forks',
    { schema: { body: Prepare }, bodyLimit: 16 * 1024 * 1024 },
    async (r) => {
      own(r.peerHost, r.body.parent.host);
      await self.prepare(r.body);
      return {};
    },
  );
  server.post<{ Params: ForkId; Body: Buffer }>('/v1/forks/:fork/descriptor', async (r) => {
    ownFork(r.peerHost, r.params.fork);
    if (!Buffer.isBuffer(r.body)) {
      throw new SnowflockError('E_DESCRIPTOR', 'a descriptor is sent as bytes');
    }
    return { reports: await self.start(r.params.fork, r.body) };
  });
  server.post<{ Params: ForkId; Body: Static<typeof Vms> }>(
    '/v1/forks/:fork/abort',
    { schema: { body: Vms } },
    async (r) => {
      ownFork(r.peerHost, r.params.fork);
      await self.abort(r.params.fork, childrenOf(host, r.peerHost, r.body.vms));
      return {};
    },
  );
  server.post<{ Params: { vm: string }; Body: EndReport }>(
    '/v1/clones/:vm/end',
    { schema: { body: End } },
    async (r) => {
      await self.endClone(r.params.vm, r.body);
      return {};
    },
  );
  server.post<{ Params: ForkId; Body: { vmid: number; end: EndReport } }>(
    '/v1/forks/:fork/ended',
    { schema: { body: Ended } },
    async (r) => {
      ownClone(r.peerHost, r.params.fork, r.body.vmid);
      await self.reportEnd(r.params.fork, r.body.vmid, r.body.end);
      return {};
    },
  );
  server.post<{ Params: ForkId; Body: Static<typeof Reply> }>(
    '/v1/forks/:fork/reply',
    { schema: { body: Reply } },
    async (r) => {
      ownClone(r.peerHost, r.params.fork, r.body.vmid);
      await self.reportReply(r.params.fork, r.body.vmid, r.body.reply_ms);
      return {};
    },
  );
  server.post<{ Params: { family: string }; Body: Static<typeof Count> }>(
    '/v1/families/:family/vmids',
    { schema: { body: Count } },
    async (r) => ({ vmids: await self.allocateVmids(Number(r.params.family), r.body.n) }),
  );
  server.post<{ Body: Static<typeof Vms> }>('/v1/leases', { schema: { body: Vms } }, async (r) => ({
    alive: await self.renew(r.peerHost, r.body.vms),
  }));
  server.post<{ Body: Static<typeof Standings> }>(
    '/v1/standings',
    { schema: { body: Standings } },
    async (r) => ({ standings: await self.standings(r.peerHost, r.body.clones) }),
  );
  server.post<{ Body: Static<typeof Generations> }>(
    '/v1/holdings',
    { schema: { body: Generations } },
    async (r) => ({ holdings: await self.holdings(r.body.generations) }),
  );
  server.post('/v1/nat/families', async () => {
    await self.familiesChanged();
    return {};
  });
  server.get('/v1/replicas', async () => ({ replicas: await self.replicas() }));
  server.get('/v1/vms', async () => ({ vms: await self.list() }));
  server.get<{ Params: { vm: string } }>('/v1/vms/:vm/counters', (r) => self.counters(r.params.vm));
}

/** Of the named VMs those whose parent is on `peer`: a host may give up only its own clones. */
function childrenOf(host: Host, peer: string, vms: string[]): string[] {
  return vms.filter((id) => host.vms.get(id)?.parent?.host === peer);
}

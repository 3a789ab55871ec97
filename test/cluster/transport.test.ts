import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { connect, type TLSSocket } from 'node:tls';
import Type from 'typebox';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import {
  BODY_BYTES_MAX,
  Cluster,
  type ClusterConfig,
  createPeerServer,
  listenForPeers,
  loadTlsIdentity,
  PeerClient,
  type PeerClientOptions,
  type PeerServer,
  sendEvents,
} from '../../src/cluster/index.js';
import { SnowflockError } from '../../src/common/errors.js';
import { get, makeCluster, temporaryFolder } from './helpers.js';

const folder = temporaryFolder();
let hosts: Map<string, ClusterConfig>;
/** A cluster of others, at the same addresses, with the same names. */
let foreign: Map<string, ClusterConfig>;
const closing: (() => unknown)[] = [];

beforeAll(async () => {
  hosts = await makeCluster(join(folder.path, 'a'), ['h1', 'h2', 'h3']);
  foreign = await makeCluster(join(folder.path, 'b'), ['h1', 'h2', 'h3']);
});
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});
afterAll(() => folder.remove());

async function serve(
  config: ClusterConfig,
  routes: (server: PeerServer) => void = () => {},
): Promise<PeerServer> {
  const server = createPeerServer(config);
  routes(server);
  await listenForPeers(server, config);
  closing.push(() => server.close());
  return server;
}

function client(config: ClusterConfig, to: string, options?: PeerClientOptions): PeerClient {
  const cluster = new Cluster(config, options);
  closing.push(() => cluster.close());
  return cluster.peer(to);
}

describe('control channel', () => {
  it('carries JSON and bytes both ways and tells the handler who asks', async () => {
    await serve(get(hosts, 'h2'), (server) => {
      server.post('/v1/who', async (request) => ({ peer: request.peerHost, body: request.body }));
      server.put('/v1/bytes', async (request, reply) => {
        expect(request.query).toEqual({ generation: 'a b&c' });
        await reply.type('application/octet-stream').send(request.body);
      });
      server.delete('/v1/nothing', async (_request, reply) => reply.code(204).send());
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    expect(await peer.request('POST', '/v1/who', { body: { n: 1 } })).toEqual({
      peer: 'h1',
      body: { n: 1 },
    });
    const binary = Buffer.alloc(3_000_000, 'snow');
    const query = { generation: 'a b&c' };
    const answer = await peer.request<Buffer>('PUT', '/v1/bytes', { binary, query });
    expect(answer.equals(binary)).toBe(true);
    expect(await peer.request('DELETE', '/v1/nothing')).toBeUndefined();
  });

  it('keeps connections that were opened in advance', async () => {
    let connections = 0;
    const server = await serve(get(hosts, 'h2'), (s) => {
      s.server.on('secureConnection', () => {
        connections += 1;
      });
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    await peer.warm(3);
    expect(connections).toBe(3);
    await Promise.all([peer.ping(), peer.ping(), peer.ping()]);
    expect(connections).toBe(3);
    expect(server.server.listening).toBe(true);
  });

  it('carries errors with their code and the name of the host', async () => {
    await serve(get(hosts, 'h2'), (server) => {
      server.get('/v1/full', async () => {
        throw new SnowflockError('E_CAPACITY', 'no memory left');
      });
      server.get('/v1/defect', async () => {
        throw new TypeError('x is not a function');
      });
      server.post('/v1/checked', {
        schema: { body: Type.Object({ n: Type.Integer() }) },
        handler: async () => ({}),
      });
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    await expect(peer.request('GET', '/v1/full')).rejects.toMatchObject({
      code: 'E_CAPACITY',
      message: 'h2: no memory left',
    });
    await expect(peer.request('GET', '/v1/defect')).rejects.toMatchObject({
      code: 'E_INTERNAL',
      message: 'h2: x is not a function',
    });
    await expect(peer.request('GET', '/v1/unknown')).rejects.toMatchObject({
      code: 'E_NOT_FOUND',
      message: 'h2: no such call: GET /v1/unknown',
    });
    await expect(
      peer.request('POST', '/v1/checked', { body: { n: 'many' } }),
    ).rejects.toMatchObject({ code: 'E_ARGUMENT', message: 'h2: body/n must be integer' });
  });

  it('refuses an answer that does not fit what the caller expects', async () => {
    await serve(get(hosts, 'h2'));
    const peer = client(get(hosts, 'h1'), 'h2');
    const schema = Type.Object({ host: Type.Integer() });
    await expect(peer.request('GET', '/v1/ping', { schema })).rejects.toMatchObject({
      code: 'E_PEER',
      message: expect.stringContaining('/host must be integer'),
    });
  });

  it('refuses bodies over the limit on both ends', async () => {
    await serve(get(hosts, 'h2'), (server) => server.put('/v1/bytes', async () => ({})));
    const peer = client(get(hosts, 'h1'), 'h2');
    const binary = Buffer.alloc(BODY_BYTES_MAX + 1);
    await expect(peer.request('PUT', '/v1/bytes', { binary })).rejects.toMatchObject({
      code: 'E_ARGUMENT',
    });
    const { address, port } = get(hosts, 'h2');
    const socket = connect({
      ...loadTlsIdentity(get(hosts, 'h1')),
      host: address,
      port,
      servername: 'h2',
    });
    await once(socket, 'secureConnect');
    socket.write(
      `PUT /v1/bytes HTTP/1.1\r\nhost: h2\r\ncontent-type: application/octet-stream\r\ncontent-length: ${BODY_BYTES_MAX + 1}\r\n\r\n`,
    );
    const [answer] = (await once(socket, 'data')) as [Buffer];
    expect(answer.toString()).toContain('"code":"E_ARGUMENT"');
    socket.destroy();
  });

  it('streams events until the caller has enough', async () => {
    let ended = false;
    async function* count() {
      try {
        for (let n = 0; ; n++) {
          yield { n };
          await new Promise((resolve) => setImmediate(resolve));
        }
      } finally {
        ended = true;
      }
    }
    await serve(get(hosts, 'h2'), (server) => {
      server.get('/v1/count', (request, reply) => sendEvents(request, reply, count()));
    });
    const seen: number[] = [];
    for await (const event of client(get(hosts, 'h1'), 'h2').events<{ n: number }>('/v1/count')) {
      seen.push(event.n);
      if (seen.length === 100) break;
    }
    expect(seen).toEqual(Array.from({ length: 100 }, (_, n) => n));
    await expect.poll(() => ended).toBe(true);
  });

  it('ends a stream with the error of its source', async () => {
    async function* broken() {
      yield 1;
      throw new SnowflockError('E_SOURCE_LOST', 'the parent is gone');
    }
    await serve(get(hosts, 'h2'), (server) => {
      server.get('/v1/broken', (request, reply) => sendEvents(request, reply, broken()));
    });
    const events = client(get(hosts, 'h1'), 'h2').events('/v1/broken');
    expect((await events.next()).value).toBe(1);
    await expect(events.next()).rejects.toMatchObject({
      code: 'E_SOURCE_LOST',
      message: 'h2: the parent is gone',
    });
  });
});

describe('identity', () => {
  it('of a client of another cluster is refused', async () => {
    await serve(get(hosts, 'h2'));
    const stranger = get(foreign, 'h1');
    // Trusts the right authority, but shows a certificate of its own.
    const identity = { ...loadTlsIdentity(stranger), ca: loadTlsIdentity(get(hosts, 'h1')).ca };
    const peer = new PeerClient({ ...get(hosts, 'h2') }, identity);
    closing.push(() => peer.close());
    await expect(peer.ping()).rejects.toMatchObject({ code: 'E_PEER_AUTH' });
    await expect(peer.request('POST', '/v1/fork', { body: {} })).rejects.toMatchObject({
      code: 'E_PEER_AUTH',
      message: expect.stringContaining('h2'),
    });
  });

  it('of a server of another cluster is refused', async () => {
    let reached = 0;
    await serve(get(foreign, 'h2'), (server) => {
      server.addHook('onRequest', async () => {
        reached += 1;
      });
    });
    await expect(client(get(hosts, 'h1'), 'h2').ping()).rejects.toMatchObject({
      code: 'E_PEER_AUTH',
      message: expect.stringContaining('h2'),
    });
    expect(reached).toBe(0);
  });

  it('of a member that stands in for another is refused', async () => {
    const h2 = get(hosts, 'h2');
    await serve({ ...h2, name: 'h3', tls: get(hosts, 'h3').tls });
    await expect(client(get(hosts, 'h1'), 'h2').ping()).rejects.toMatchObject({
      code: 'E_PEER_AUTH',
    });
  });

  it('of a host taken off the list is refused by name', async () => {
    const h2 = get(hosts, 'h2');
    await serve({ ...h2, hosts: h2.hosts.filter((host) => host.name !== 'h3') });
    await expect(client(get(hosts, 'h3'), 'h2').ping()).rejects.toMatchObject({
      code: 'E_PEER_AUTH',
      message: expect.stringContaining('h3'),
    });
    expect(await client(get(hosts, 'h1'), 'h2').ping()).toBeGreaterThan(0);
  });

  it('is asked for: without a certificate, or with TLS 1.2, there is no answer', async () => {
    const h2 = get(hosts, 'h2');
    await serve(h2);
    const ca = readFileSync(h2.tls.caFile);
    const base = { host: h2.address, port: h2.port, servername: 'h2', ca };
    for (const options of [
      base,
      { ...base, ...loadTlsIdentity(get(hosts, 'h1')), maxVersion: 'TLSv1.2' as const },
    ]) {
      const socket = connect(options);
      const received: Buffer[] = [];
      socket.on('data', (part: Buffer) => received.push(part));
      socket.on('error', () => {});
      socket.write('GET /v1/ping HTTP/1.1\r\nhost: h2\r\n\r\n');
      await new Promise((resolve) => socket.on('close', resolve));
      expect(Buffer.concat(received).toString()).toBe('');
    }
  });

  it('survives the resumption of a TLS session', async () => {
    let resumed = 0;
    await serve(get(hosts, 'h2'), (server) => {
      server.get('/v1/who', async (request, reply) => {
        if ((request.raw.socket as TLSSocket).isSessionReused()) resumed += 1;
        reply.header('connection', 'close');
        return { peer: request.peerHost };
      });
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    for (let n = 0; n < 4; n++) {
      expect(await peer.request('GET', '/v1/who')).toEqual({ peer: 'h1' });
    }
    expect(resumed).toBeGreaterThan(0);
  });
});

describe('a peer that fails', () => {
  it('is named when nothing listens', async () => {
    await expect(client(get(hosts, 'h1'), 'h2').ping()).rejects.toMatchObject({
      code: 'E_PEER',
      message: expect.stringContaining('h2'),
    });
  });

  it('is given up when it accepts and never speaks', async () => {
    const { address, port } = get(hosts, 'h2');
    const mute = createServer(() => {});
    mute.listen(port, address);
    await once(mute, 'listening');
    closing.push(() => mute.close());
    const peer = client(get(hosts, 'h1'), 'h2', { connectTimeoutMs: 100 });
    await expect(peer.ping()).rejects.toMatchObject({
      code: 'E_PEER',
      message: expect.stringContaining('h2'),
    });
  });

  it('may be slow: only the limit of the request counts while it answers pings', async () => {
    await serve(get(hosts, 'h2'), (server) => {
      server.post('/v1/slow', () => new Promise(() => {}));
    });
    const options = { pingIntervalMs: 10, pingTimeoutMs: 500 };
    const peer = client(get(hosts, 'h1'), 'h2', options);
    await expect(peer.request('POST', '/v1/slow', { timeoutMs: 300 })).rejects.toMatchObject({
      code: 'E_TIMEOUT',
      message: expect.stringContaining('h2'),
    });
  });

  it('takes its requests with it when it closes', async () => {
    const server = await serve(get(hosts, 'h2'), (s) => {
      s.post('/v1/slow', () => new Promise(() => {}));
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    await peer.warm(1);
    const asked = peer.request('POST', '/v1/slow', { timeoutMs: 60_000 });
    const refused = expect(asked).rejects.toMatchObject({ code: 'E_PEER' });
    server.server.closeAllConnections();
    await refused;
  });

  it('is reached again over a new connection after a restart', async () => {
    const first = await serve(get(hosts, 'h2'));
    const peer = client(get(hosts, 'h1'), 'h2');
    await peer.warm(2);
    await first.close();
    await serve(get(hosts, 'h2'));
    expect(await peer.ping()).toBeGreaterThan(0);
  });

  it('can be left: by a signal, and by closing', async () => {
    await serve(get(hosts, 'h2'), (server) => {
      server.post('/v1/slow', () => new Promise(() => {}));
    });
    const peer = client(get(hosts, 'h1'), 'h2');
    const abort = new AbortController();
    const asked = peer.request('POST', '/v1/slow', { signal: abort.signal });
    abort.abort();
    await expect(asked).rejects.toMatchObject({ code: 'E_INTERRUPTED' });
    const other = peer.request('POST', '/v1/slow');
    peer.close();
    await expect(other).rejects.toMatchObject({ code: 'E_CLOSED' });
    await expect(peer.ping()).rejects.toMatchObject({ code: 'E_CLOSED' });
  });

  it('is reported by warm(), the others are connected', async () => {
    await serve(get(hosts, 'h2'));
    const cluster = new Cluster(get(hosts, 'h1'));
    closing.push(() => cluster.close());
    const reach = await cluster.warm();
    expect(reach).toEqual([
      { host: 'h2', error: undefined },
      { host: 'h3', error: expect.objectContaining({ code: 'E_PEER' }) },
    ]);
  });

  it('does not share its port', async () => {
    await serve(get(hosts, 'h2'));
    const second = createPeerServer(get(hosts, 'h2'));
    closing.push(() => second.close());
    await expect(listenForPeers(second, get(hosts, 'h2'))).rejects.toMatchObject({
      code: 'E_IN_USE',
    });
  });
});

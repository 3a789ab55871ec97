import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { loadAddon } from '../../src/common/native.js';
import { randomGroup } from '../../src/mcdist/groups.js';
import { McdistClient, McdistServer } from '../../src/mcdist/mcdist.js';

interface Replica {
  readonly handle: unknown;
  readonly provider: unknown;
  fill(page: number, data: Buffer): void;
  read(page: number): Buffer | null;
  close(): void;
}
const { Replica } = loadAddon<{
  Replica: new (path: string, generation: string, pages: number, medium: string) => Replica;
}>('dataplane');

const loopback = '127.0.0.1';
let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'sf-mcdist-'));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

function pair() {
  const generation = randomBytes(16).toString('hex');
  const key = randomBytes(32);
  const { group, port: groupPort } = randomGroup();
  const source = new Replica(join(folder, 'source'), generation, 16, 'disk');
  const replica = new Replica(join(folder, 'replica'), generation, 16, 'disk');
  const server = new McdistServer({ bindAddress: loopback, interfaceAddress: loopback });
  const serve = { generation, key, provider: source.provider, group, groupPort };
  const clientOptions = {
    ...{ generation, key, replica: replica.handle, group, groupPort },
    server: { address: loopback, port: server.port },
    interfaceAddress: loopback,
  };
  return { generation, source, replica, server, serve, clientOptions };
}

test('server and client in one process on loopback', async () => {
  const { generation, source, replica, server, serve, clientOptions } = pair();
  const page = randomBytes(4096);
  source.fill(7, page);
  server.serve(serve);
  expect(() => server.serve(serve)).toThrow(expect.objectContaining({ code: 'E_EXISTS' }));
  const client = new McdistClient(clientOptions);
  await client.fetch(7);
  expect(replica.read(7)).toEqual(page);
  expect(client.stats()).toMatchObject({ pagesFilled: 1, welcomed: true, lost: false });
  expect(server.stats(generation)).toMatchObject({ pagesServed: 1, generations: 1, peers: 1 });
  await expect(client.fetch(16)).rejects.toMatchObject({ code: 'E_ARGUMENT' });
  await server.unserve(generation);
  await server.unserve(generation);
  expect(() => server.stats(generation)).toThrow(expect.objectContaining({ code: 'E_NOT_FOUND' }));
  server.serve(serve);
  source.fill(8, page);
  await client.fetch(8);
  await client.close();
  await server.close();
  expect(() => client.stats()).toThrow(expect.objectContaining({ code: 'E_CLOSED' }));
  expect(() => server.serve(serve)).toThrow(expect.objectContaining({ code: 'E_CLOSED' }));
  await server.unserve(generation);
  await server.close();
  await client.close();
});

test('bad arguments are refused by name', async () => {
  const { server, serve, clientOptions, generation } = pair();
  const argument = (part: string) =>
    expect.objectContaining({ code: 'E_ARGUMENT', message: expect.stringContaining(part) });
  expect(() => server.serve({ ...serve, key: Buffer.alloc(31) })).toThrow(argument('key'));
  expect(() => server.serve({ ...serve, generation: 'xyz' })).toThrow(argument('generation'));
  expect(() => server.serve({ ...serve, group: '10.0.0.1' })).toThrow(argument('multicast'));
  expect(() => server.serve({ ...serve, groupPort: 70000 })).toThrow(argument('port'));
  expect(() => server.serve({ ...serve, provider: {} })).toThrow(argument('provider'));
  expect(() => server.serve({ ...serve, policy: { maxRateBytesPerS: 1 } })).toThrow(
    argument('maxRateBytesPerS'),
  );
  expect(() => new McdistClient({ ...clientOptions, mtuBytes: 500 })).toThrow(argument('MTU'));
  expect(() => new McdistClient({ ...clientOptions, replica: null })).toThrow(argument('replica'));
  const other = generation.replace(/^./, (c) => (c === '0' ? '1' : '0'));
  expect(() => new McdistClient({ ...clientOptions, generation: other })).toThrow(
    expect.objectContaining({ code: 'E_REPLICA_MISMATCH' }),
  );
  expect(() => new McdistServer({ bindAddress: '192.0.2.1', interfaceAddress: loopback })).toThrow(
    expect.objectContaining({ code: 'E_NETWORK' }),
  );
  const taken = { bindAddress: loopback, port: server.port, interfaceAddress: loopback };
  expect(() => new McdistServer(taken)).toThrow(expect.objectContaining({ code: 'E_IN_USE' }));
  await server.close();
});

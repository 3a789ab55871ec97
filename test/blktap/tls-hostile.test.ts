// Clients of a TLS server that are strangers, rude, or late.
import { once } from 'node:events';
import { readFile, rm } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { NbdServer } from '../../src/cow-disk/nbd-server.js';
import { counted, FLAGS, infoData, NONE, OPT, option, REP, rawNbd, u32 } from './raw-nbd.js';
import { codeOf, execute, newDisk, newServer, until } from './support.js';
import { Authority, beforeTls, HOST, insideTls, keyFile, serveTls } from './tls-support.js';

const SIZE = String(64 * 2 ** 20);
const PAST = [
  'activation_date = "2001-01-01 00:00:00"',
  'expiration_date = "2002-01-01 00:00:00"',
].join('\n');

type Limits = Parameters<typeof serveTls>[1];

async function mutual(limits: Limits = {}) {
  const authority = await Authority.make();
  const directory = await authority.issue('server', 'server');
  const client = await authority.issue('client', 'client');
  const tls = await serveTls({ directory }, limits);
  const enter = async (certificates: string) =>
    (await execute('nbdinfo', ['--size', tls.uri({ 'tls-certificates': certificates })])).stdout;
  return { ...tls, authority, directory, client, enter };
}

/** A client's folder, as Node's TLS takes it. */
async function material(folder: string) {
  const [cert, key] = ['client-cert.pem', 'client-key.pem'].map((name) => join(folder, name));
  return { cert: await readFile(cert ?? ''), key: await readFile(key ?? '') };
}

const ended = async (socket: Socket) => {
  socket.resume();
  if (!socket.closed) await once(socket, 'close');
};

test('only certificates of the authority, for clients and in their time, get in', async () => {
  const { server, authority, client, enter } = await mutual();
  const strangers = await (await Authority.make()).issue('client', 'client');
  // Trusts our server, shows a certificate of somebody else.
  await execute('cp', [join(authority.folder, 'ca-cert.pem'), strangers]);
  const late = await authority.issue('late', 'client', { dates: PAST });
  const wrong = await authority.issue('wrong', 'client', { purpose: 'server' });
  for (const [what, folder, why] of [
    ['another authority', strangers, /issuer is unknown|not trusted/],
    ['expired', late, /expired/],
    ['a certificate of a server', wrong, /purpose|not trusted/],
  ] as const) {
    const { failed } = server.stats().tls;
    await expect(enter(folder), what).rejects.toThrow();
    await until(() => server.stats().tls.failed > failed);
    expect(server.stats().tls.lastError, what).toMatch(why);
    expect(server.stats().tls.lastError).toContain(HOST);
  }
  expect((await enter(client)).trim()).toBe(SIZE);
  expect(server.stats().tls).toMatchObject({ accepted: 1, failed: 3 });
});

test('a client without a certificate gets in only where that was allowed', async () => {
  const { server, place, directory } = await mutual();
  // In TLS 1.3 the client is done before it is refused; what it asks is answered by an alert.
  for (const version of [{}, { maxVersion: 'TLSv1.2' as const }]) {
    const { failed } = server.stats().tls;
    const asked = insideTls(place, version).then(({ ask }) => ask(OPT.list, NONE));
    if ('maxVersion' in version) asked.catch(() => undefined);
    else await expect(asked).rejects.toThrow();
    await until(() => server.stats().tls.failed > failed);
    expect(server.stats().tls.lastError).toMatch(/ertificate/);
  }
  expect(server.stats().tls.accepted).toBe(0);
  const open = await serveTls({ directory, verifyPeer: false });
  const { ask } = await insideTls(open.place, {});
  expect((await ask(OPT.list, NONE)).map(({ type }) => type)).toEqual([REP.server, REP.ack]);
});

test('a revoked certificate, and a renewed one of the server, count from the next client on', async () => {
  const { server, place, authority, directory, client, enter } = await mutual();
  const stays = await insideTls(place, await material(client));
  await authority.revoke(client, directory);
  await expect(enter(client)).rejects.toThrow();
  expect(server.stats().tls.lastError).toMatch(/revoked/);
  expect((await enter(await authority.issue('other', 'client'))).trim()).toBe(SIZE);
  expect((await stays.ask(OPT.info, infoData('disk'))).at(-1)?.type).toBe(REP.ack);
  const other = await material(await authority.issue('other', 'client'));
  const serial = async () =>
    (await insideTls(place, other)).secure.getPeerCertificate().serialNumber;
  const before = await serial();
  await authority.issue('server', 'server');
  expect(await serial()).not.toBe(before);
});

test('credentials that went away let nobody in, and say which file', async () => {
  const { server, client, directory, enter } = await mutual();
  await rm(join(directory, 'server-key.pem'));
  await expect(enter(client)).rejects.toThrow();
  expect(server.stats().tls.lastError).toContain(join(directory, 'server-key.pem'));
});

test('before TLS every option but STARTTLS and ABORT is refused', async () => {
  const { place } = await mutual();
  const { socket, ask } = await rawNbd(place);
  socket.write(FLAGS);
  const context = Buffer.concat([counted('disk'), u32(0)]);
  for (const [number, data] of [
    [OPT.list, NONE],
    [OPT.info, infoData('disk')],
    [OPT.go, infoData('disk')],
    [OPT.structured, NONE],
    [OPT.setContexts, context],
    [OPT.listContexts, context],
    [0xffff, NONE],
    [OPT.list, Buffer.alloc(100_000)],
  ] as const) {
    expect((await ask(number, data)).map(({ type }) => type)).toEqual([REP.tlsRequired]);
  }
  expect((await ask(OPT.startTls, Buffer.alloc(1)))[0]?.type).toBe(REP.invalid);
  expect((await ask(OPT.abort, NONE))[0]?.type).toBe(REP.ack);
  await ended(socket);
  for (const bytes of [
    Buffer.concat([FLAGS, option(OPT.exportName, Buffer.from('disk'))]),
    Buffer.from([0, 0, 0, 0]), // no fixed newstyle: no way to start TLS
  ]) {
    const other = await rawNbd(place);
    other.socket.write(bytes);
    await expect(other.reader.take(1)).rejects.toThrow();
  }
  const plain = `nbd://${HOST}:${place.port}/disk`;
  await expect(execute('nbdinfo', ['--size', plain])).rejects.toThrow(/TLS/);
});

test('inside TLS STARTTLS is invalid, and nothing that follows is refused for want of TLS', async () => {
  const { place, client } = await mutual();
  const { ask } = await insideTls(place, await material(client));
  expect((await ask(OPT.startTls, NONE))[0]?.type).toBe(REP.invalid);
  expect((await ask(OPT.structured, NONE))[0]?.type).toBe(REP.ack);
  expect((await ask(OPT.go, infoData('disk'))).at(-1)?.type).toBe(REP.ack);
});

test('plain bytes sent ahead of the handshake are never taken for options', async () => {
  const { server, disk, place } = await mutual();
  const injected = [
    option(OPT.go, infoData('disk')),
    option(OPT.exportName, Buffer.from('disk')),
    option(OPT.list, NONE),
  ];
  for (const bytes of injected) {
    const { failed } = server.stats().tls;
    const { socket, reader } = await rawNbd(place);
    socket.write(Buffer.concat([FLAGS, option(OPT.startTls, NONE), bytes]));
    expect((await reader.take(20)).readUInt32BE(12)).toBe(REP.ack);
    await ended(socket);
    await until(() => server.stats().tls.failed === failed + 1);
  }
  expect(server.stats().tls.accepted).toBe(0);
  expect(disk.stats().connections).toBe(0);
});

test('a client that falls silent is disconnected at the deadline, wherever it stopped', async () => {
  const { server, place } = await mutual({ handshakeTimeoutMs: 300 });
  const silent = await rawNbd(place);
  const waiting = await beforeTls(place);
  // The head of a ClientHello's record, and no more.
  const half = await beforeTls(place);
  half.socket.write(Buffer.from([0x16, 3, 1, 1, 0, 1, 0]));
  await Promise.all([silent, waiting, half].map(({ socket }) => ended(socket)));
  expect(server.stats().tls.failed).toBe(2);
  expect(server.stats().tls.lastError).toContain('in time');
});

test('strangers that stall keep nobody out, and take no slots of clients', async () => {
  const { server, place, client, enter } = await mutual({ maxConnections: 2, maxHandshakes: 8 });
  const strangers: Socket[] = [];
  for (let i = 0; i < 64; i++) strangers.push((await beforeTls(place)).socket);
  expect((await enter(client)).trim()).toBe(SIZE);
  await Promise.all(strangers.slice(0, 56).map(ended)); // the oldest
  expect(server.stats().tls.dropped).toBeGreaterThanOrEqual(56);
  expect(server.stats().refused).toBe(0);
  // Those that got in count, and one too many is closed.
  const credentials = await material(client);
  await until(() => server.stats().connections === 0);
  const inside = [await insideTls(place, credentials), await insideTls(place, credentials)];
  for (const { ask } of inside) expect((await ask(OPT.list, NONE)).at(-1)?.type).toBe(REP.ack);
  const third = await insideTls(place, credentials);
  await expect(third.ask(OPT.list, NONE)).rejects.toThrow();
  expect(server.stats()).toMatchObject({ connections: 2, refused: 1 });
});

test('TCP without TLS is for loopback, when it is asked for', async () => {
  const start = (listen: object) =>
    codeOf(NbdServer.start({ listen: { port: 0, ...listen } } as never));
  const directory = '/nonexistent';
  expect(await start({ host: HOST })).toBe('E_ARGUMENT');
  expect(await start({ host: '0.0.0.0', plaintext: true })).toBe('E_ARGUMENT');
  expect(await start({ host: '::', plaintext: true })).toBe('E_ARGUMENT');
  expect(await start({ host: 'localhost', plaintext: true })).toBe('E_ARGUMENT');
  expect(await start({ host: HOST, plaintext: true, tls: { directory } })).toBe('E_ARGUMENT');
  expect(await start({ host: HOST, tls: {} })).toBe('E_CONFIG');
  expect(await start({ host: HOST, tls: { directory } })).toBe('E_CONFIG');
  expect(await start({ host: HOST, tls: { pskFile: directory } })).toBe('E_CONFIG');
  expect(await codeOf(NbdServer.start({}))).toBe('E_ARGUMENT');
  const { folder, disk } = await newDisk(2 ** 20);
  const socketPath = join(folder, 'both');
  const server = await newServer(socketPath, { listen: { host: HOST, port: 0, plaintext: true } });
  await disk.serve({ server, exportName: 'disk' });
  const port = server.tcp?.port ?? 0;
  expect(server.stats().port).toBe(port);
  for (const uri of [`nbd://${HOST}:${port}/disk`, `nbd+unix:///disk?socket=${socketPath}`]) {
    expect((await execute('nbdinfo', ['--size', uri])).stdout.trim()).toBe(String(2 ** 20));
  }
  expect(await start({ host: HOST, port, plaintext: true })).toBe('E_IN_USE');
});

test('with certificates and keys a client comes in by either, and by neither not', async () => {
  const authority = await Authority.make();
  const directory = await authority.issue('server', 'server');
  const client = await authority.issue('client', 'client');
  const keys = await keyFile('alice');
  const { server, place, uri } = await serveTls({ directory, pskFile: keys });
  for (const one of [uri({ 'tls-certificates': client }), uri({ 'tls-psk-file': keys }, 'alice')]) {
    expect((await execute('nbdinfo', ['--size', one])).stdout.trim()).toBe(SIZE);
  }
  const nobody = insideTls(place, {}).then(({ ask }) => ask(OPT.list, NONE));
  await expect(nobody).rejects.toThrow();
  expect(server.stats().tls).toMatchObject({ accepted: 2, failed: 1 });
});

import { once } from 'node:events';
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { FLAGS, infoData, NONE, OPT, option, REP, rawNbd } from './raw-nbd.js';
import {
  codeOf,
  connectTo,
  execute,
  newGeneration,
  newServer,
  openDisk,
  PAGE,
  temporary,
  until,
  uri,
} from './support.js';

const MIB = 2 ** 20;

async function unservedDisk(folder: string, name: string): Promise<Disk> {
  const directory = join(folder, name);
  await Disk.create(directory, { sizeBytes: MIB });
  return openDisk(directory);
}

test('disks and generations are exports of one server, each with its own bytes', async () => {
  const folder = await temporary();
  const [one, two] = [await unservedDisk(folder, 'one'), await unservedDisk(folder, 'two')];
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  await one.serve({ server, exportName: 'one', description: 'the first' });
  await two.serve({ server, exportName: 'two', isDefault: true });
  const clients = [await connectTo(socketPath, 'one'), await connectTo(socketPath, 'two')];
  await Promise.all(clients.map((client, i) => client.write(0, Buffer.alloc(PAGE, i + 1))));
  const generation = newGeneration();
  await one.fork(generation);
  await one.serveGeneration(generation, { server, exportName: 'earlier' });
  await clients[0]?.write(0, Buffer.alloc(PAGE, 9));
  const first = async (name: string) => (await (await connectTo(socketPath, name)).read(0, 1))[0];
  expect(await first('one')).toBe(9);
  expect(await first('two')).toBe(2);
  expect(await first('')).toBe(2);
  expect(await first('earlier')).toBe(1);
  const { stdout } = await execute('nbdinfo', ['--json', '--list', uri(socketPath, '')]);
  const { exports } = JSON.parse(stdout) as { exports: Record<string, unknown>[] };
  expect(exports).toMatchObject([
    { 'export-name': 'earlier', is_read_only: true },
    { 'export-name': 'one', description: 'the first', is_read_only: false },
    { 'export-name': 'two', is_read_only: false },
  ]);
  const stats = server.stats();
  expect(stats.exports).toMatchObject([
    { exportName: 'earlier', readOnly: true, isDefault: false, requests: 1 },
    { exportName: 'one', description: 'the first', sizeBytes: MIB, requests: 3, connections: 2 },
    { exportName: 'two', isDefault: true, requests: 3, connections: 3 },
  ]);
  expect(stats.connections).toBe(6);
});

test('without a default the empty name is no export', async () => {
  const folder = await temporary();
  const disk = await unservedDisk(folder, 'disk');
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  const ask = async (number: number, data: Buffer) => {
    const raw = await rawNbd(socketPath);
    raw.socket.write(FLAGS);
    return (await raw.ask(number, data)).map((reply) => reply.type);
  };
  expect(await ask(OPT.list, NONE)).toEqual([REP.ack]); // none at all yet
  await disk.serve({ server, exportName: 'disk' });
  expect(await ask(OPT.list, NONE)).toEqual([REP.server, REP.ack]);
  expect(await ask(OPT.go, infoData(''))).toEqual([REP.unknown]);
  expect(await ask(OPT.go, infoData('disk'))).toEqual([REP.info, REP.ack]);
});

test('removing an export ends its connections and no others; the name is free again', async () => {
  const folder = await temporary();
  const [one, two] = [await unservedDisk(folder, 'one'), await unservedDisk(folder, 'two')];
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  await one.serve({ server, exportName: 'one' });
  await two.serve({ server, exportName: 'two' });
  const [a, b] = [await connectTo(socketPath, 'one'), await connectTo(socketPath, 'two')];
  const ended = once(a.socket, 'close');
  await server.removeExport('one');
  await ended;
  expect(one.stats().connections).toBe(0);
  await b.write(0, Buffer.alloc(PAGE, 2));
  expect(await codeOf(server.removeExport('one'))).toBe('E_NOT_FOUND');
  await expect(connectTo(socketPath, 'one')).rejects.toThrow();
  await two.serve({ server, exportName: 'one' });
  expect((await (await connectTo(socketPath, 'one')).read(0, 1))[0]).toBe(2);
});

test('a disk that is closed takes its exports with it, and the server stays', async () => {
  const folder = await temporary();
  const [one, two] = [await unservedDisk(folder, 'one'), await unservedDisk(folder, 'two')];
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  await one.serve({ server, exportName: 'one' });
  await two.serve({ server, exportName: 'two' });
  const client = await connectTo(socketPath, 'one');
  await client.write(0, Buffer.alloc(PAGE, 7));
  await one.close();
  expect(server.stats().exports.map((entry) => entry.exportName)).toEqual(['two']);
  const again = await openDisk(one.directory);
  await again.serve({ server, exportName: 'one' });
  expect((await (await connectTo(socketPath, 'one')).read(0, 1))[0]).toBe(7);
  await server.close();
  await expect(stat(socketPath)).rejects.toThrow();
  expect(again.stats().connections).toBe(0);
  await again.close();
});

test('names that cannot be, are there already, or are too many are refused', async () => {
  const folder = await temporary();
  const disk = await unservedDisk(folder, 'disk');
  const server = await newServer(join(folder, 'nbd'));
  const add = (options: object) => codeOf(disk.serve({ server, ...options }));
  await disk.serve({ server, exportName: 'disk', isDefault: true });
  expect(await add({ exportName: 'disk' })).toBe('E_EXISTS');
  expect(await add({ exportName: 'other', isDefault: true })).toBe('E_EXISTS');
  expect(await add({})).toBe('E_EXISTS'); // the empty name is the default
  expect(await add({ exportName: 'x'.repeat(4097) })).toBe('E_ARGUMENT');
  expect(await add({ exportName: 'é'.repeat(2049) })).toBe('E_ARGUMENT');
  expect(await add({ exportName: 'a\0b' })).toBe('E_ARGUMENT');
  expect(await add({ exportName: 'x', description: 'y'.repeat(4097) })).toBe('E_ARGUMENT');
  expect(await add({ exportName: 'x', maxConnections: 0 })).toBe('E_ARGUMENT');
  expect(await codeOf(newServer(join(folder, 'many'), { maxConnections: 5000 }))).toBe(
    'E_ARGUMENT',
  );
  for (let i = 1; i < 1024; i++) await disk.serve({ server, exportName: `export ${i}` });
  expect(await add({ exportName: 'one more' })).toBe('E_CAPACITY');
  await server.removeExport('export 1023');
  await disk.serve({ server, exportName: 'one more' });
  await server.close();
  expect(await add({ exportName: 'late' })).toBe('E_CLOSED');
});

test('an export has as many connections as it may; who comes later is told so', async () => {
  const folder = await temporary();
  const disk = await unservedDisk(folder, 'disk');
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  await disk.serve({ server, exportName: 'narrow', maxConnections: 2 });
  await disk.serve({ server, exportName: 'wide' });
  const first = await connectTo(socketPath, 'narrow');
  await connectTo(socketPath, 'narrow');
  const raw = await rawNbd(socketPath);
  raw.socket.write(FLAGS);
  const [refusal] = await raw.ask(OPT.go, infoData('narrow'));
  expect(refusal?.type).toBe(REP.policy);
  expect(refusal?.data.toString()).toContain('connections');
  await expect(connectTo(socketPath, 'narrow')).rejects.toThrow(); // EXPORT_NAME has no answer
  await first.close();
  await until(() => disk.stats().connections === 1);
  const go = async (name: string) => (await raw.ask(OPT.go, infoData(name))).map((r) => r.type);
  expect(await go('narrow')).toEqual([REP.info, REP.ack]); // the same connection, later
  await connectTo(socketPath, 'wide');
});

test('a server has as many connections as it may; more are closed at once, and counted', async () => {
  const folder = await temporary();
  const disk = await unservedDisk(folder, 'disk');
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath, { maxConnections: 2 });
  await disk.serve({ server, exportName: 'disk', isDefault: true });
  const served = await connectTo(socketPath);
  const raw = await rawNbd(socketPath); // says nothing, and counts
  await expect(rawNbd(socketPath)).rejects.toThrow();
  expect(server.stats()).toMatchObject({ connections: 2, accepted: 2, refused: 1 });
  raw.socket.destroy();
  await until(() => server.stats().connections === 1);
  await connectTo(socketPath);
  await served.write(0, Buffer.alloc(PAGE, 1));
});

test('an export removed while clients come and go leaves nothing behind', async () => {
  const folder = await temporary();
  const disk = await unservedDisk(folder, 'disk');
  const socketPath = join(folder, 'nbd');
  const server = await newServer(socketPath);
  for (let round = 0; round < 20; round++) {
    await disk.serve({ server, exportName: 'disk' });
    const comers = Array.from({ length: 8 }, async () => {
      const raw = await rawNbd(socketPath);
      raw.socket.write(Buffer.concat([FLAGS, option(OPT.exportName, Buffer.from('disk'))]));
      await once(raw.socket, 'close');
    });
    if (round % 2 === 0) await until(() => server.stats().connections > 3);
    await server.removeExport('disk');
    expect(disk.stats().connections).toBe(0);
    await Promise.all(comers); // those that came too late were sent away
  }
  await until(() => server.stats().connections === 0);
});

import { connect } from 'node:net';
import { join } from 'node:path';
import { pino } from 'pino';
import { expect, test } from 'vitest';
import { controlSocket, listenForControl, RemoteStore } from '../../src/cow-disk/control.js';
import { CONTROL_CALL_BYTES } from '../../src/cow-disk/control-protocol.js';
import { Store } from '../../src/cow-disk/store.js';
import { StoreServer } from '../../src/disk-server/store-server.js';
import { cleanup, codeOf, temporary, until } from '../blktap/support.js';

const MIB = 2 ** 20;

async function servedStore(): Promise<{ directory: string; store: StoreServer }> {
  const directory = join(await temporary(), 's');
  await Store.create(directory);
  const store = await StoreServer.open(directory);
  cleanup(() => store.close());
  await store.serve({ socketPath: join(directory, 'nbd.sock'), disks: true, generations: 'named' });
  const control = await listenForControl(store, pino({ level: 'silent' }));
  cleanup(() => control.close());
  return { directory, store };
}

async function connected(directory: string): Promise<RemoteStore> {
  const remote = await RemoteStore.connect(directory);
  cleanup(() => remote.close());
  return remote;
}

/** Sends lines as they are; the answers, or null when the connection was ended. */
async function raw(directory: string, data: string, answers: number): Promise<unknown[] | null> {
  const socket = connect(controlSocket(directory));
  cleanup(() => socket.destroy());
  let text = '';
  return new Promise((resolve) => {
    socket.on('error', () => undefined);
    socket.on('close', () => resolve(null));
    socket.on('data', (chunk) => {
      text += chunk.toString();
      const lines = text.split('\n').slice(0, -1);
      if (lines.length >= answers) resolve(lines.map((line) => JSON.parse(line)));
    });
    socket.write(data);
  });
}

test('the calls of a store and their errors pass through', async () => {
  const { directory } = await servedStore();
  const remote = await connected(directory);
  const made = await remote.createDisk({ name: 'web', size_bytes: MIB });
  expect(made).toMatchObject({ name: 'web', open: true });
  const one = await remote.snapshot({ disk: 'web', name: 'one' });
  await remote.clone({ disk: 'web', generation: one.id, name: 'copy' });
  expect((await remote.list()).disks.map((disk) => disk.name)).toEqual(['web', 'copy']);
  expect(await codeOf(remote.createDisk({ name: 'web', size_bytes: MIB }))).toBe('E_EXISTS');
  await remote.removeGeneration({ disk: 'web', generation: 'one' });
  await remote.removeDisk({ disk: 'web' });
  await remote.settled();
  expect((await remote.list()).disks.map((disk) => disk.name)).toEqual(['copy']);
  expect(await remote.tasks()).toEqual([]);
  expect((await remote.usage()).disks).toHaveLength(1);
});

test.each<[string, unknown]>([
  ['no JSON', '{'],
  ['no call', '[]'],
  ['an unknown method', { id: 1, method: 'format', params: {} }],
  ['an inherited member as method', { id: 1, method: 'toString', params: {} }],
  ['a missing parameter', { id: 1, method: 'createDisk', params: { name: 'x' } }],
  ['a name that is a path', { id: 1, method: 'removeDisk', params: { disk: '../x' } }],
  ['a parameter too many', { id: 1, method: 'list', params: { force: true } }],
  ['a handle of nobody', { id: 1, method: 'closeView', params: { handle: 1.5 } }],
])('a line with %s is answered with E_ARGUMENT, and the server goes on', async (_what, call) => {
  const { directory } = await servedStore();
  const line = typeof call === 'string' ? call : JSON.stringify(call);
  const hello = JSON.stringify({ id: 2, method: 'hello', params: {} });
  const answers = await raw(directory, `${line}\n${hello}\n`, 2);
  expect(answers).toContainEqual(
    expect.objectContaining({ error: expect.objectContaining({ code: 'E_ARGUMENT' }) }),
  );
  expect(answers).toContainEqual(expect.objectContaining({ id: 2, result: expect.anything() }));
});

test('a line without end costs its sender the connection', async () => {
  const { directory } = await servedStore();
  expect(await raw(directory, 'x'.repeat(CONTROL_CALL_BYTES + 1), 1)).toBeNull();
  const remote = await connected(directory);
  expect((await remote.list()).disks).toEqual([]);
});

test('calls beyond what a connection may have under way are refused', async () => {
  const { directory } = await servedStore();
  const calls = Array.from({ length: 200 }, (_, id) =>
    JSON.stringify({ id, method: 'usage', params: {} }),
  );
  const answers = (await raw(directory, `${calls.join('\n')}\n`, 200)) as {
    error?: { code: string };
  }[];
  const refused = answers.filter((one) => one.error !== undefined);
  expect(new Set(refused.map((one) => one.error?.code))).toEqual(new Set(['E_STATE']));
  expect(answers.length).toBe(200);
});

test('an import whose caller goes away is gone; it was never seen', async () => {
  const { directory, store } = await servedStore();
  const remote = await connected(directory);
  const target = await remote.beginImport({ name: 'web', size_bytes: MIB });
  expect(target.socket).toContain(directory);
  expect((await store.list()).disks).toEqual([]);
  expect(await store.tasks()).toMatchObject([{ kind: 'import', disk: 'web' }]);
  await remote.close();
  let ended = false;
  const wait = async () => {
    while ((await store.tasks()).length > 0) await new Promise((done) => setImmediate(done));
    ended = true;
  };
  await wait();
  await until(() => ended);
  expect((await store.usage()).disks.filter((disk) => disk.name === 'web')).toEqual([]);
  expect(await codeOf(target.finish())).toBe('E_SERVER');
});

test('a view of what a disk holds now ends with its caller, and its generation with it', async () => {
  const { directory, store } = await servedStore();
  const remote = await connected(directory);
  await remote.createDisk({ name: 'web', size_bytes: MIB });
  const view = await remote.openView({ disk: 'web', generation: null });
  expect(view.size_bytes).toBe(MIB);
  expect((await store.list()).generations).toEqual([]);
  expect((await store.usage()).generations).toHaveLength(1);
  await remote.close();
  while ((await store.usage()).generations.length > 0)
    await new Promise((done) => setImmediate(done));
});

test('what is in progress in a process that died is removed when the store is served', async () => {
  const directory = join(await temporary(), 's');
  await Store.create(directory);
  const dead = await Store.open(directory);
  await dead.createDisk({ name: 'in-progress-0123456789abcdef', size_bytes: MIB });
  await dead.createDisk({ name: 'web', size_bytes: MIB });
  await dead.snapshot({ disk: 'web', name: 'in-progress-0123456789abcdef' });
  await dead.close();
  const store = await StoreServer.open(directory);
  cleanup(() => store.close());
  await store.serve({ socketPath: join(directory, 'nbd.sock'), disks: true, generations: 'named' });
  const usage = await store.usage();
  expect(usage.disks.map((disk) => disk.name)).toEqual(['web']);
  expect(usage.generations).toEqual([]);
  expect(
    await codeOf(store.createDisk({ name: 'in-progress-0123456789abcdef', size_bytes: MIB })),
  ).toBe('E_ARGUMENT');
});

test('more exports than a server can have are refused before anything is exported', async () => {
  const directory = join(await temporary(), 's');
  await Store.create(directory);
  const store = await StoreServer.open(directory);
  cleanup(() => store.close());
  await store.createDisk({ name: 'web', size_bytes: MIB });
  const also = Array.from({ length: 1024 }, (_, i) => ({ disk: `d${i}`, generation: null }));
  const plan = { socketPath: join(directory, 'nbd.sock'), disks: true, also };
  await expect(store.serve(plan)).rejects.toMatchObject({
    code: 'E_CAPACITY',
    message: expect.stringContaining('1025'),
  });
  expect(store.exported()).toEqual([]);
});

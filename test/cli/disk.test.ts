import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, readdirSync, readlinkSync, watch } from 'node:fs';
import { chmod, mkdir, readFile, stat, truncate, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { RemoteStore } from '../../src/cow-disk/control.js';
import type {
  DiskEntry,
  GenerationEntry,
  StoreListing,
  StoreUsage,
} from '../../src/cow-disk/store-api.js';
import { cleanup, execute, temporary, until } from '../blktap/support.js';
import { outcome, serve, snowflock, snowflockJson, start } from './snowflock.js';

const MIB = 2 ** 20;

async function newStore(): Promise<string> {
  return join(await temporary(), 's');
}

async function list(store: string): Promise<StoreListing> {
  return snowflockJson<StoreListing>(['disk', 'ls', store]);
}

test('create, snapshot, clone: ls shows clones below what they were made from', async () => {
  const store = await newStore();
  expect((await snowflock(['disk', 'create', `${store}/web`, '--size', '64M'])).stdout).toBe(
    'web\n',
  );
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'before']);
  await snowflock(['disk', 'clone', `${store}/web@before`, 'copy']);
  await snowflock(['disk', 'snapshot', `${store}/copy`, '--name', 'mine']);
  const { stdout } = await snowflock(['disk', 'ls', store]);
  const names = stdout.split('\n').map((line) => line.replace(/(?<=\S) {2}.*/, ''));
  expect(names).toEqual(['NAME', 'web', '└─@before', '  └─copy', '    └─@mine', '']);
  const entry = await snowflockJson<DiskEntry>(['disk', 'info', `${store}/copy`]);
  expect(entry).toMatchObject({ name: 'copy', size_bytes: 64 * MIB, open: false });
});

test('a name without a folder is in $SNOWFLOCK_STORE', async () => {
  const store = await newStore();
  const env = { SNOWFLOCK_STORE: store };
  await snowflock(['disk', 'create', 'web', '--size', '1000001B'], { env });
  const listing = JSON.parse((await snowflock(['disk', 'ls', '--json'], { env })).stdout);
  expect(listing).toMatchObject({
    directory: store,
    disks: [{ name: 'web', size_bytes: 1000001 }],
  });
});

test('wrong use ends with the status of its error and makes nothing', async () => {
  const store = await newStore();
  const status = async (...args: string[]) => (await snowflock(['disk', ...args])).status;
  expect(await status('create', `${store}/.web`, '--size', '1M')).toBe(2);
  expect(await status('create', `${store}/web`)).toBe(2);
  expect(await status('create', `${store}/web@x`, '--size', '1M')).toBe(2);
  expect(await status('create', `${store}/web`, '--size', '0')).toBe(2);
  expect(await status('create', `${store}/none/web`, '--size', '1M')).toBe(2);
  const over = ['create', `${store}/web`, '--size', '1M', '--base'];
  expect(await status(...over, join(store, 'none'))).toBe(4);
  expect(await status('import', join(store, 'none'), `${store}/web`)).toBe(4);
  expect(await status('ls', store)).toBe(4);
  expect(existsSync(store)).toBe(false);
  // A folder of other files is never made a store.
  await mkdir(store);
  await writeFile(join(store, 'letter'), 'dear');
  expect(await status('create', `${store}/web`, '--size', '1M')).toBe(2);
  expect(readdirSync(store)).toEqual(['letter']);
});

test('a store that may not be looked into is not taken for one that is missing', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const nobody = { uid: 65534, gid: 65534 };
  await chmod(dirname(store), 0o755);
  for (const args of [
    ['ls', store],
    ['check', store],
    ['create', `${store}/web`, '--size', '1M'],
  ]) {
    const { status, stderr } = await snowflock(['disk', ...args], nobody);
    expect(status).toBe(18);
    expect(stderr).toContain(`cannot look into ${store}: EACCES`);
  }
});

test("what a disk's clients met is in the log and in its info", async () => {
  const store = await newStore();
  const image = join(dirname(store), 'image');
  await writeFile(image, Buffer.alloc(MIB, 1));
  await snowflock(['disk', 'create', `${store}/web`, '--base', image]);
  const serving = await serve([store], 1);
  expect(await snowflockJson<DiskEntry>(['disk', 'info', `${store}/web`])).not.toHaveProperty(
    'errors',
  );
  await truncate(image, MIB / 2);
  const read = ['-f', 'raw', '-c', 'read 768k 4k', serving.uris.get('web') ?? ''];
  await execute('qemu-io', read).catch(() => undefined); // its status is 1
  const last = expect.stringContaining(`read base image ${image}`);
  const { errors } = await snowflockJson<DiskEntry>(['disk', 'info', `${store}/web`]);
  expect(errors).toMatchObject({ no_space: 0, last });
  expect((await snowflock(['disk', 'info', `${store}/web`])).stdout).toContain(image);
  await until(() => serving.said().includes('requests failed'));
  expect(serving.said()).toMatch(/"disk":"web","io_errors":\d+,.*read base image/);
});

test('a disk exists once, and what does not exist is not found', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const again = await snowflock(['disk', 'create', `${store}/web`, '--size', '1M', '--json']);
  expect(again.status).toBe(5);
  expect(JSON.parse(again.stderr)).toMatchObject({ error: { code: 'E_EXISTS' } });
  expect((await snowflock(['disk', 'info', `${store}/web@none`])).status).toBe(4);
  expect((await snowflock(['disk', 'rm', `${store}/none`, '--yes'])).status).toBe(4);
});

test('a wrong option with --json is an error as JSON too', async () => {
  const store = await newStore();
  const args = ['disk', 'create', `${store}/web`, '--size', '0', '--json'];
  const { status, stderr } = await snowflock(args);
  expect(status).toBe(2);
  expect(JSON.parse(stderr)).toMatchObject({ error: { code: 'E_ARGUMENT' } });
});

test('serve goes on when nobody reads what it prints any more', async () => {
  const store = await newStore();
  for (const name of ['a', 'b'])
    await snowflock(['disk', 'create', `${store}/${name}`, '--size', '1M']);
  const child = start(['disk', 'serve', store]);
  child.stdout?.destroy();
  const ended = outcome(child);
  cleanup(async () => {
    child.kill('SIGKILL'); // does nothing if it has ended
    await ended;
  });
  await until(() => existsSync(join(store, 'store.sock')));
  expect((await list(store)).disks.map(({ exports }) => exports.length)).toEqual([1, 1]);
  child.kill('SIGTERM');
  expect((await ended).status).toBe(0);
  expect(existsSync(join(store, 'store.sock'))).toBe(false);
});

test('du of a generation is that of the generation, and a store is no disk', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'a']);
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'b']);
  const usage = await snowflockJson<StoreUsage>(['disk', 'du', `${store}/web@a`]);
  expect(usage.disks).toEqual([]);
  expect(usage.generations.map(({ name }) => name)).toEqual(['a']);
  expect((await snowflock(['disk', 'du', `${store}/web@c`])).status).toBe(4);
  const { status, stderr } = await snowflock(['disk', 'info', store]);
  expect(status).toBe(2);
  expect(stderr).toContain(`${store}/DISK`);
});

test('nothing is removed without a terminal or --yes', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'a']);
  for (const args of [
    ['rm', 'web'],
    ['rm', 'web@a'],
    ['rollback', 'web@a'],
  ]) {
    const [verb = '', what = ''] = args;
    expect((await snowflock(['disk', verb, `${store}/${what}`])).status).toBe(2);
  }
  const listing = await list(store);
  expect(listing.disks).toHaveLength(1);
  expect(listing.generations).toHaveLength(1);
  expect((await snowflock(['disk', 'rm', `${store}/web`, '--yes'])).status).toBe(0);
  expect((await list(store)).disks).toEqual([]);
});

test('rollback gives back what the generation holds', async () => {
  const store = await newStore();
  const pattern = Buffer.alloc(MIB, 'ab');
  await snowflock(['disk', 'import', '-', `${store}/web`, '--size', '1M'], { input: pattern });
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'a']);
  const serving = await serve([store], 1);
  await execute('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 1M', serving.uris.get('web') ?? '']);
  serving.kill('SIGTERM');
  expect((await serving.ended).status).toBe(0);
  expect((await snowflock(['disk', 'rollback', `${store}/web@a`, '--yes'])).status).toBe(0);
  const { bytes } = await snowflock(['disk', 'export', `${store}/web`, '-']);
  expect(bytes.equals(pattern)).toBe(true);
});

test('a served store takes all commands; new disks and snapshots are exported at once', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '4M']);
  const serving = await serve([store, '--generations'], 1);
  expect((await stat(join(store, 'store.sock'))).mode & 0o777).toBe(0o600);
  const uri = serving.uris.get('web') ?? '';
  await execute('qemu-io', ['-f', 'raw', '-c', 'write -P 7 1M 1M', uri]);
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'one']);
  await execute('qemu-io', ['-f', 'raw', '-c', 'write -P 8 1M 1M', uri]);
  const clone = await snowflockJson<DiskEntry>(['disk', 'clone', `${store}/web@one`, 'copy']);
  const [place] = clone.exports;
  const of = (name: string) => uri.replaceAll(/(?<=\/\/\/|sock\.)web/g, name);
  expect(place).toMatchObject({ name: 'copy' });
  await execute('qemu-io', ['-f', 'raw', '-c', 'read -P 7 1M 1M', of('copy')]);
  await execute('qemu-io', ['-r', '-f', 'raw', '-c', 'read -P 7 1M 1M', of('web@one')]);
  await execute('qemu-io', ['-f', 'raw', '-c', 'read -P 8 1M 1M', uri]);
  expect((await snowflock(['disk', 'flatten', `${store}/copy`])).status).toBe(0);
  expect((await snowflock(['disk', 'gc', store])).status).toBe(0);
  const check = await snowflock(['disk', 'check', store]);
  expect(check.status).toBe(5);
  expect(check.stderr).toContain('disk serve');
  serving.kill('SIGINT');
  expect((await serving.ended).status).toBe(0);
  expect(existsSync(join(store, 'store.sock'))).toBe(false);
  expect((await snowflock(['disk', 'check', store])).status).toBe(0);
});

test('a disk with a client connected is not removed; without one it is', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '4M']);
  const serving = await serve([store], 1);
  const script = [
    'import nbd, sys',
    'h = nbd.NBD()',
    'h.connect_uri(sys.argv[1])',
    'print("in", flush=True)',
    'sys.stdin.read()',
  ].join('\n');
  const client = spawn('/usr/bin/python3', ['-c', script, serving.uris.get('web') ?? ''], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const gone = once(client, 'exit');
  cleanup(async () => {
    client.kill('SIGKILL');
    await gone;
  });
  await once(client.stdout, 'data');
  const refused = await snowflock(['disk', 'rm', `${store}/web`, '--yes', '--json']);
  expect(JSON.parse(refused.stderr)).toMatchObject({ error: { code: 'E_IN_USE' } });
  await execute('nbdinfo', ['--size', serving.uris.get('web') ?? '']);
  client.stdin.end();
  await gone;
  // The server sees the connection end a moment later.
  for (;;) {
    const { status } = await snowflock(['disk', 'rm', `${store}/web`, '--yes']);
    if (status === 0) break;
    expect(status).toBe(5);
  }
  expect((await list(store)).disks).toEqual([]);
});

test('a service manager is told when the exports can be used', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const script = [
    'import socket,sys',
    's=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM)',
    's.bind(sys.argv[1])',
    'print("bound",flush=True)',
    'print(s.recv(99).decode(),flush=True)',
    'print(s.recv(99).decode(),flush=True)',
  ].join('\n');
  const path = join(await temporary(), 'notify');
  const manager = spawn('/usr/bin/python3', ['-c', script, path], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const told = outcome(manager);
  cleanup(async () => {
    manager.kill('SIGKILL');
    await told;
  });
  await once(manager.stdout, 'data');
  const serving = await serve([store], 1, { NOTIFY_SOCKET: path });
  serving.kill('SIGTERM');
  expect((await serving.ended).status).toBe(0);
  expect((await told).stdout).toBe('bound\nREADY=1\nSTOPPING=1\n');
});

test('an import that is interrupted leaves nothing', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const before = readdirSync(store).filter((name) => name.endsWith('.data')).length;
  const begun = new Promise<void>((resolve) => {
    const watcher = watch(store, (_event, name) => {
      if (name?.endsWith('.data') !== true) return;
      watcher.close();
      resolve();
    });
  });
  const child = start(['disk', 'import', '-', `${store}/half`, '--size', '64M']);
  const ended = outcome(child);
  child.stdin?.on('error', () => undefined);
  child.stdin?.write(Buffer.alloc(MIB, 1)); // and never the rest
  await begun;
  child.kill('SIGINT');
  expect((await ended).status).toBe(130);
  const { disks } = await list(store);
  expect(disks.map((disk) => disk.name)).toEqual(['web']);
  await snowflock(['disk', 'gc', store]);
  expect(readdirSync(store).filter((name) => name.endsWith('.data')).length).toBe(before);
});

test('commit gives the origin what the clone holds', async () => {
  const store = await newStore();
  const [old, now] = [Buffer.alloc(MIB, 'old'), Buffer.alloc(MIB, 'new')];
  await snowflock(['disk', 'import', '-', `${store}/web`, '--size', '1M'], { input: old });
  await snowflock(['disk', 'clone', `${store}/web`, 'next']);
  const serving = await serve([`${store}/next`], 1);
  const file = join(await temporary(), 'new');
  await writeFile(file, now);
  await execute('nbdcopy', ['--flush', file, serving.uris.get('next') ?? '']);
  expect([...serving.uris.keys()]).toEqual(['next']);
  const done = await snowflockJson<{ origin: string }>([
    'disk',
    'commit',
    `${store}/next`,
    '--yes',
  ]);
  expect(done.origin).toBe('web');
  serving.kill('SIGTERM');
  await serving.ended;
  const { bytes } = await snowflock(['disk', 'export', `${store}/web`, '-']);
  expect(bytes.equals(now)).toBe(true);
  expect((await list(store)).disks.map((disk) => disk.name)).toEqual(['web']);
});

test('generations are exported if they are asked for: one, those with a name, or all', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  await snowflock(['disk', 'snapshot', `${store}/web`, '--name', 'named']);
  const { id } = await snowflockJson<GenerationEntry>(['disk', 'snapshot', `${store}/web`]);
  const exportsOf = async (args: string[]) => {
    const serving = await serve(args, 1);
    const { stdout } = await execute('nbdinfo', [
      ...['--list', '--json'],
      `nbd+unix:///?socket=${join(store, 'nbd.sock')}`,
    ]);
    serving.kill('SIGTERM');
    expect((await serving.ended).status).toBe(0);
    const { exports } = JSON.parse(stdout) as { exports: { 'export-name': string }[] };
    return exports.map((one) => one['export-name']).sort();
  };
  expect(await exportsOf([store])).toEqual(['web']);
  expect(await exportsOf([`${store}/web@named`])).toEqual(['web@named']);
  expect(await exportsOf([store, `${store}/web@named`])).toEqual(['web', 'web@named']);
  expect(await exportsOf([store, '--generations'])).toEqual(['web', 'web@named']);
  expect(await exportsOf([store, '--all'])).toEqual(['web', `web@${id}`, 'web@named'].sort());
  expect((await snowflock(['disk', 'serve', `${store}/web`, '--all'])).status).toBe(2);
});

test('Ctrl-C of a flatten ends it also in the process that serves the store', async () => {
  const store = await newStore();
  const held = randomBytes(32 * MIB);
  await snowflock(['disk', 'import', '-', `${store}/web`, '--size', '32M'], { input: held });
  await snowflock(['disk', 'clone', `${store}/web`, 'copy']);
  const serving = await serve([store], 2);
  const remote = await RemoteStore.connect(store);
  cleanup(() => remote.close());
  const flattens = async () => (await remote.tasks()).filter((task) => task.kind === 'flatten');
  const child = start(['disk', 'flatten', `${store}/copy`, '--rate', '1M']);
  const ended = outcome(child);
  while ((await flattens()).every((task) => task.done_bytes === 0)) await pause(20);
  child.kill('SIGINT');
  expect((await ended).status).toBe(130);
  while ((await flattens()).length > 0) await pause(20);
  expect((await remote.list()).disks.find((disk) => disk.name === 'copy')?.parent).not.toBe(null);
  expect((await snowflock(['disk', 'flatten', `${store}/copy`])).status).toBe(0);
  serving.kill('SIGTERM');
  expect((await serving.ended).status).toBe(0);
  const { bytes } = await snowflock(['disk', 'export', `${store}/copy`, '-']);
  expect(bytes.equals(held)).toBe(true);
});

test('--max-open-files bounds the sealed slices that serve keeps open', async () => {
  const store = await newStore();
  const SLICES = 24;
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const making = await serve([store], 1);
  const uri = making.uris.get('web') ?? '';
  const remote = await RemoteStore.connect(store);
  cleanup(() => remote.close());
  for (let n = 0; n < SLICES; n++) {
    await execute('qemu-io', ['-f', 'raw', '-c', `write -P ${n + 1} ${4 * n}k 4k`, uri]);
    await remote.snapshot({ disk: 'web' });
  }
  making.kill('SIGTERM');
  expect((await making.ended).status).toBe(0);
  const openWith = async (args: string[]): Promise<number> => {
    const serving = await serve([store, ...args], 1);
    await execute('nbdcopy', [serving.uris.get('web') ?? '', 'null:']);
    const links = readdirSync(`/proc/${serving.pid}/fd`).map((fd) => {
      try {
        return readlinkSync(`/proc/${serving.pid}/fd/${fd}`);
      } catch {
        return '';
      }
    });
    serving.kill('SIGTERM');
    expect((await serving.ended).status).toBe(0);
    return new Set(links.filter((path) => path.endsWith('.data'))).size;
  };
  const OWN = 2; // of the top and its spare
  expect(await openWith([])).toBeGreaterThan(SLICES - 1);
  expect(await openWith(['--max-open-files', '4'])).toBeLessThanOrEqual(4 + OWN);
});

test('a generation is served read-only', async () => {
  const store = await newStore();
  await snowflock(['disk', 'create', `${store}/web`, '--size', '1M']);
  const made = await snowflockJson<GenerationEntry>(['disk', 'snapshot', `${store}/web`]);
  const serving = await serve([`${store}/web@${made.id}`], 1);
  const uri = serving.uris.get(`web@${made.id}`) ?? '';
  const { stdout } = await execute('nbdinfo', ['--json', uri]);
  expect(JSON.parse(stdout)).toMatchObject({ exports: [{ is_read_only: true }] });
});

test('a disk served read-only cannot be written, and leaves no generation', async () => {
  const store = await newStore();
  const held = Buffer.alloc(MIB, 'held');
  await snowflock(['disk', 'import', '-', `${store}/web`, '--size', '1M'], { input: held });
  const serving = await serve([store, '--read-only'], 1);
  const uri = serving.uris.get('web') ?? '';
  await expect(execute('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', uri])).rejects.toThrow(
    /Permission denied/,
  );
  const file = join(await temporary(), 'copy');
  await execute('nbdcopy', [uri, file]);
  expect((await readFile(file)).equals(held)).toBe(true);
  serving.kill('SIGTERM');
  expect((await serving.ended).status).toBe(0);
  const usage = await snowflockJson<StoreUsage>(['disk', 'du', store]);
  expect(usage.generations).toEqual([]);
});

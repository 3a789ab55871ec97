// A generation published by one host, and disks over it on another: the command line tool, each host
// in a network namespace of its own, real mcdist between them, real NBD clients.
import { randomBytes } from 'node:crypto';
import { chmod, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { RemoteStore } from '../../src/cow-disk/control.js';
import type { DiskEntry, StoreTask, StoreUsage } from '../../src/cow-disk/store-api.js';
import { cleanup, connectTo, execute, PAGE, temporary } from '../blktap/support.js';
import { Net } from '../mcdist/net.js';
import { outcome, type Serving, serve, snowflock, snowflockJson, start } from './snowflock.js';

const MIB = 2 ** 20;
const EIO = { errno: 5 };

interface Place {
  namespace: string;
  address: string;
}

async function served(at: Place, args: string[], exports = 1): Promise<Serving> {
  const serving = await serve(args, exports, {}, at.namespace);
  cleanup(async () => {
    serving.kill('SIGKILL'); // does nothing if it has ended
    await serving.ended;
  });
  return serving;
}

async function end(serving: Serving): Promise<void> {
  serving.kill('SIGTERM');
  const { status, stderr } = await serving.ended;
  expect(status, stderr).toBe(0);
}

/** Runs the tool where the network plays no part. */
async function run(...args: string[]): Promise<string> {
  const { status, stdout, stderr } = await snowflock(['disk', ...args]);
  expect(status, stderr).toBe(0);
  return stdout;
}

/** A publisher with `web@gold`, and another host. Pages from `size_bytes` / 2 on are zeros. */
async function lab(size_bytes = 8 * MIB) {
  const folder = await temporary();
  const net = await Net.make();
  cleanup(() => net.close());
  const [a, b] = [await net.namespace(), await net.namespace()];
  const [origin, store] = [join(folder, 'a'), join(folder, 'b')];
  const image = Buffer.alloc(size_bytes);
  randomBytes(size_bytes / 2).copy(image);
  const { status, stderr } = await snowflock(
    ['disk', 'import', '-', `${origin}/web`, '--size', `${size_bytes}B`],
    { input: image },
  );
  expect(status, stderr).toBe(0);
  await run('snapshot', `${origin}/web`, '--name', 'gold');
  const file = join(origin, 'web@gold.source');
  const publish = () => served(a, [`${origin}/web@gold`, '--publish', '--address', a.address]);
  const clone = async (name: string) => {
    await run('clone', '--from-source', file, `${store}/${name}`);
  };
  return { a, b, origin, store, image, file, publish, clone };
}

async function replica(store: string, name: string) {
  const { replica: found } = await snowflockJson<DiskEntry>(['disk', 'info', `${store}/${name}`]);
  return found;
}

/** Waits until the tasks of a served store are as wanted. */
async function untilTasks(store: string, fits: (tasks: StoreTask[]) => boolean): Promise<void> {
  const remote = await RemoteStore.connect(store);
  try {
    while (!fits(await remote.tasks())) await pause(20);
  } finally {
    await remote.close();
  }
}

/** Waits until all of a disk's replica is here. */
async function untilComplete(store: string, name: string): Promise<void> {
  const remote = await RemoteStore.connect(store);
  try {
    for (;;) {
      const { disks } = await remote.list();
      if (disks.find((disk) => disk.name === name)?.replica?.complete === true) return;
      await pause(20);
    }
  } finally {
    await remote.close();
  }
}

const socketOf = (store: string) => join(store, 'nbd.sock');

test('a clone of a published generation reads on demand, is filled, and outlives the publisher', async () => {
  const { b, store, image, file, publish, clone } = await lab();
  const publisher = await publish();
  expect((await stat(file)).mode & 0o777).toBe(0o600);
  await clone('copy');
  const { generation } = JSON.parse(await readFile(file, 'utf8')) as { generation: string };
  expect((await readdir(store)).filter((name) => name.includes('replica'))).toEqual([]);
  expect((await stat(join(store, `${generation}.source`))).mode & 0o777).toBe(0o600);

  let serving = await served(b, [store]);
  let client = await connectTo(socketOf(store), 'copy');
  const expected = Buffer.from(image);
  await client.write(100 * PAGE, Buffer.alloc(300 * PAGE, 1));
  expected.fill(1, 100 * PAGE, 400 * PAGE);
  expect((await replica(store, 'copy'))?.present_bytes).toBe(0);
  expect(
    (await client.read(7 * PAGE + 5, PAGE)).equals(image.subarray(7 * PAGE + 5, 8 * PAGE + 5)),
  ).toBe(true);
  expect((await replica(store, 'copy'))?.present_bytes).toBe(2 * PAGE);
  client.close();
  await end(serving);

  // Now in the background; a prefetch leaves out what the disk has of its own, if that is much.
  serving = await served(b, [store, '--prefetch', '0']);
  await untilTasks(store, (tasks) => tasks.every((task) => task.kind !== 'prefetch'));
  for (;;) {
    const now = await replica(store, 'copy');
    if ((now?.present_bytes ?? 0) >= image.length - 300 * PAGE) break;
  }
  expect(await replica(store, 'copy')).toMatchObject({
    present_bytes: image.length - 300 * PAGE,
    source: 'open',
  });
  // A second disk needs all of it.
  await clone('second');
  await untilComplete(store, 'second');
  publisher.kill('SIGKILL');
  await publisher.ended;
  client = await connectTo(socketOf(store), 'copy');
  expect((await client.read(0, image.length)).equals(expected)).toBe(true);
  await client.write(3 * PAGE + 1, Buffer.from('late'));
  expected.write('late', 3 * PAGE + 1);
  client.close();
  await end(serving);

  serving = await served(b, [store], 2);
  client = await connectTo(socketOf(store), 'copy');
  expect((await client.read(0, image.length)).equals(expected)).toBe(true);
  const second = await connectTo(socketOf(store), 'second');
  expect((await second.read(0, image.length)).equals(image)).toBe(true);
  expect(await replica(store, 'second')).toMatchObject({ complete: true, source: 'closed' });
  expect(serving.said()).not.toContain('does not answer');
  client.close();
  second.close();
  await end(serving);
  expect((await snowflock(['disk', 'check', store])).stdout).toBe('');
});

test('prefetches of several generations stay within the one rate together', async () => {
  const { a, b, origin, store, image } = await lab(4 * MIB);
  await run('snapshot', `${origin}/web`, '--name', 'silver');
  const names = ['gold', 'silver'];
  const places = names.map((name) => `${origin}/web@${name}`);
  await served(a, [...places, '--publish', '--address', a.address], 2);
  for (const name of names) {
    await run('clone', '--from-source', join(origin, `web@${name}.source`), `${store}/${name}`);
  }
  const rate = MIB / 2;
  const began = performance.now();
  await served(b, [store, '--prefetch', `${rate}B`], 2);
  for (const name of names) await untilComplete(store, name);
  const elapsed_s = (performance.now() - began) / 1000;
  // Half of each image is data. A tick of half a second may pass before the first learns that there is
  // a second, and a hundredth of a second's worth each may come at once.
  const data_bytes = names.length * (image.length / 2);
  expect(data_bytes).toBeLessThanOrEqual(rate * (elapsed_s + 0.5 + 0.02));
  for (const name of names) {
    const client = await connectTo(socketOf(store), name);
    expect((await client.read(0, image.length)).equals(image)).toBe(true);
    client.close();
  }
});

test('a publisher that is gone costs absent pages alone, and is used again when it is back', async () => {
  const { b, store, image, publish, clone } = await lab();
  let publisher = await publish();
  await clone('copy');
  const serving = await served(b, [store, '--source-timeout', '0.5']);
  const client = await connectTo(socketOf(store), 'copy');
  expect((await client.read(0, 16 * PAGE)).equals(image.subarray(0, 16 * PAGE))).toBe(true);
  publisher.kill('SIGKILL');
  await publisher.ended;
  await expect(client.read(500 * PAGE, PAGE)).rejects.toMatchObject(EIO);
  expect((await client.read(0, 16 * PAGE)).equals(image.subarray(0, 16 * PAGE))).toBe(true);
  await client.write(500 * PAGE, Buffer.alloc(PAGE, 5));
  expect((await client.read(500 * PAGE, PAGE)).equals(Buffer.alloc(PAGE, 5))).toBe(true);
  const entry = await snowflockJson<DiskEntry>(['disk', 'info', `${store}/copy`]);
  expect(entry.exports).toHaveLength(1);
  while (!serving.said().includes('does not answer')) await pause(20);
  // The same key, group and port: the source file given out is still good.
  publisher = await publish();
  for (;;) {
    const page = await client.read(501 * PAGE, PAGE).catch((error: unknown) => {
      expect(error).toMatchObject(EIO);
      return undefined;
    });
    if (page === undefined) continue;
    expect(page.equals(image.subarray(501 * PAGE, 502 * PAGE))).toBe(true);
    break;
  }
  client.close();
  await end(serving);
  await end(publisher);
});

test('a flatten fetches everything; then the replica is gone, and nothing else is', async () => {
  const { b, store, image, file, publish, clone } = await lab(4 * MIB);
  const publisher = await publish();
  await clone('one');
  await clone('two');
  const { generation } = JSON.parse(await readFile(file, 'utf8')) as { generation: string };
  const files = async () => (await readdir(store)).filter((name) => name.startsWith(generation));
  const serving = await served(b, [store], 2);
  await run('flatten', `${store}/one`);
  expect((await files()).sort()).toEqual([
    `${generation}.replica`,
    `${generation}.replica.map`,
    `${generation}.source`,
  ]);
  const usage = await snowflockJson<StoreUsage>(['disk', 'du', store]);
  expect(usage.replicas).toMatchObject([{ generation, virtual_bytes: image.length }]);
  expect(usage.replicas[0]?.own_bytes).toBeGreaterThanOrEqual(image.length / 2);
  await run('flatten', `${store}/two`);
  expect(await files()).toEqual([]);
  publisher.kill('SIGKILL');
  await publisher.ended;
  for (const name of ['one', 'two']) {
    const client = await connectTo(socketOf(store), name);
    expect((await client.read(0, image.length)).equals(image)).toBe(true);
    client.close();
  }
  await end(serving);
  expect((await snowflock(['disk', 'check', store])).stdout).toBe('');
});

test('an export of a clone fetches what is absent; without a source it says so', async () => {
  const { b, store, image, publish, clone } = await lab(4 * MIB);
  const publisher = await publish();
  await clone('copy');
  const within = { namespace: b.namespace };
  const { bytes, stderr } = await snowflock(['disk', 'export', `${store}/copy`, '-'], within);
  expect(bytes.equals(image), stderr).toBe(true);
  await end(publisher);
  // All of it is here: no publisher, and no network either.
  const again = await snowflock(['disk', 'export', `${store}/copy`, '-']);
  expect(again.bytes.equals(image), again.stderr).toBe(true);
});

test('what is published is not removed, and a file of another source is not replaced', async () => {
  const { a, origin, publish, file } = await lab(MIB);
  const publisher = await publish();
  const refused = await snowflock(['disk', 'rm', `${origin}/web@gold`, '--yes']);
  expect(refused.status).toBe(5);
  expect(refused.stderr).toContain('published');
  await end(publisher);
  await run('snapshot', `${origin}/web`, '--name', 'other');
  const args = [`${origin}/web@other`, '--publish', '--address', a.address, '--source-file', file];
  const { status, stderr } = await outcome(start(['disk', 'serve', ...args], {}, a.namespace));
  expect(status).toBe(5);
  expect(stderr).toContain('another generation');
});

test('check finds a replica that lost its map, its source or its contents', async () => {
  const { b, store, file, publish, clone } = await lab(MIB);
  const publisher = await publish();
  await clone('copy');
  const { generation } = JSON.parse(await readFile(file, 'utf8')) as { generation: string };
  const serving = await served(b, [store]);
  const client = await connectTo(socketOf(store), 'copy');
  await client.read(0, PAGE);
  client.close();
  await end(serving);
  await end(publisher);
  const check = async () => {
    const { status, stdout } = await snowflock(['disk', 'check', store]);
    return { status, stdout };
  };
  expect(await check()).toEqual({ status: 0, stdout: '' });
  const source = join(store, `${generation}.source`);
  await chmod(source, 0o644);
  expect(await check()).toMatchObject({ status: 18, stdout: expect.stringContaining('chmod 600') });
  await chmod(source, 0o600);
  await execute('mv', [source, `${store}/../kept`]);
  expect(await check()).toMatchObject({
    status: 18,
    stdout: expect.stringContaining('affects copy'),
  });
  await execute('mv', [`${store}/../kept`, source]);
  const map = join(store, `${generation}.replica.map`);
  const held = await readFile(map);
  const other = Buffer.from(held);
  other.write('0'.repeat(32), 24);
  await writeFile(map, other);
  expect(await check()).toMatchObject({
    status: 18,
    stdout: expect.stringContaining('is of generation 000'),
  });
  await writeFile(map, held);
  await execute('truncate', ['--size', '4096', join(store, `${generation}.replica`)]);
  expect(await check()).toMatchObject({
    status: 18,
    stdout: expect.stringContaining('4096 bytes instead'),
  });
});

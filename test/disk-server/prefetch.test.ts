// A generation published on one host, disks over it on others: real mcdist between network
// namespaces, real NBD.
import { join } from 'node:path';
import { expect, test } from 'vitest';
import type { McdistServerStats } from '../../src/mcdist/mcdist.js';
import { PAGE } from '../blktap/support.js';
import { Lab } from './lab.js';

/** Without a picture of the difference, which for megabytes takes longer than the test. */
function same(read: Buffer, expected: Buffer): void {
  expect(read.equals(expected)).toBe(true);
}

const EIO = { errno: 5 };
const UNLIMITED = 0;

test('a clone of a published generation fills on demand; whole-page writes never fetch', async () => {
  const lab = await Lab.make(1024);
  const host = await lab.net.host();
  await lab.remote(host);
  const client = await lab.clone(host);
  await client.write(100 * PAGE, Buffer.alloc(50 * PAGE, 1));
  await client.zero(200 * PAGE, 50 * PAGE);
  await client.trim(300 * PAGE, 50 * PAGE);
  expect((await lab.stats(host)).requested).toBe(0);
  same(
    await client.read(7 * PAGE + 100, 2 * PAGE),
    lab.image.subarray(7 * PAGE + 100, 9 * PAGE + 100),
  );
  await client.write(400 * PAGE + 1, Buffer.alloc(10, 9));
  const filled = Buffer.from(lab.page(400));
  filled.fill(9, 1, 11);
  same(await client.read(400 * PAGE, PAGE), filled);
  const stats = await lab.stats(host);
  expect(stats.present).toBe(4);
  expect(stats.requested - (stats.client?.retries ?? 0)).toBe(4);
  same(await client.read(100 * PAGE, PAGE), Buffer.alloc(PAGE, 1));
  same(await client.read(200 * PAGE, PAGE), Buffer.alloc(PAGE));
});

test('a prefetch stays within its rate, then the source may go, also for those who open it later', async () => {
  const lab = await Lab.make(3072, { zeros: 1024 });
  const host = await lab.net.host();
  const rate = 16 << 20;
  const before = performance.now();
  await lab.remote(host, { prefetch: rate });
  const client = await lab.clone(host);
  await host.call('until', { name: 'remote', present: 512 });
  const half = await lab.stats(host);
  const elapsedS = (performance.now() - before) / 1000;
  expect(half.prefetch?.burstBytes).toBe(Math.floor(rate / 100));
  expect(half.present * PAGE).toBeLessThanOrEqual(
    rate * elapsedS + (half.prefetch?.burstBytes ?? 0),
  );
  await host.call('until', { name: 'remote', complete: true });
  await host.call('until', { name: 'remote', state: 'done' });
  const stats = await lab.stats(host);
  const prefetch = stats.prefetch;
  expect([stats.present, stats.zero, stats.source]).toEqual([2048, 1024, 'closed']);
  expect(prefetch?.askedBytes).toBe(2048 * PAGE); // the zeros cost nothing
  expect(prefetch?.askedBytes).toBeLessThanOrEqual(
    (rate * (prefetch?.elapsedMs ?? 0)) / 1000 + (prefetch?.burstBytes ?? 0),
  );
  await lab.source.kill();
  same(await client.read(0, 3072 * PAGE), lab.image);
  await client.write(5 * PAGE, Buffer.alloc(PAGE, 5));
  const after = await lab.stats(host);
  expect([after.requested, after.troubles]).toEqual([stats.requested, []]);

  // Opened again, by the same process and by another one.
  await host.call('closeDisk', { name: 'clone' });
  await host.call('closeRemote', { name: 'remote' });
  await lab.remote(host);
  await host.call('closeRemote', { name: 'remote' });
  await host.kill();
  const next = await lab.net.restart(host.namespace, host.address);
  await lab.remote(next);
  expect(await lab.stats(next)).toMatchObject({ source: 'closed', complete: true, requested: 0 });
  const again = await lab.clone(next, 'clone', false);
  const expected = Buffer.from(lab.image);
  expected.fill(5, 5 * PAGE, 6 * PAGE);
  same(await again.read(0, 3072 * PAGE), expected);
});

test('a prefetch leaves out what every disk over the replica has overwritten', async () => {
  const lab = await Lab.make(1024);
  const host = await lab.net.host();
  await lab.remote(host);
  const one = await lab.clone(host, 'one');
  await one.write(100 * PAGE, Buffer.alloc(300 * PAGE, 1));
  await one.zero(500 * PAGE + 1, 100 * PAGE - 2); // 98 whole pages, two in part
  await host.call('prefetch', { name: 'remote', rate: UNLIMITED });
  await host.call('until', { name: 'remote', state: 'done' });
  const stats = await lab.stats(host);
  expect(stats.prefetch?.skipped).toBe(300 + 98); // not the two in part: they were fetched to be filled up
  expect(stats.present).toBe(1024 - 300 - 98);
  expect([stats.complete, stats.source]).toEqual([false, 'open']);
  // A second disk has overwritten nothing: what was left out is fetched for it.
  const two = await lab.clone(host, 'two');
  await host.call('until', { name: 'remote', complete: true });
  await lab.source.kill();
  same(await two.read(0, 1024 * PAGE), lab.image);
  same(await one.read(100 * PAGE, PAGE), Buffer.alloc(PAGE, 1));
});

test('a paused prefetch asks for nothing until it is resumed; demand goes on', async () => {
  const lab = await Lab.make(2048);
  const host = await lab.net.host();
  await lab.remote(host, { prefetch: 8 << 20 });
  const client = await lab.clone(host);
  await host.call('until', { name: 'remote', present: 100 });
  await host.call('pause', { name: 'remote' });
  await host.call('until', { name: 'remote', state: 'paused', underWay: 0 });
  const paused = await lab.stats(host);
  for (let page = 2000; page < 2040; page++)
    same(await client.read(page * PAGE, PAGE), lab.page(page));
  const after = await lab.stats(host);
  expect(after.present).toBe(paused.present + 40);
  expect(after.prefetch?.askedBytes).toBe(paused.prefetch?.askedBytes);
  await host.call('resume', { name: 'remote' });
  await host.call('prefetch', { name: 'remote', rate: 1 << 30 }); // the new rate of the same one
  await host.call('until', { name: 'remote', complete: true });
  await host.call('until', { name: 'remote', state: 'done' });
  // What was read meanwhile was not asked for again.
  expect((await lab.stats(host)).prefetch?.askedBytes).toBe((2048 - 40) * PAGE);
});

test('a source killed half way: absent pages are EIO in time, all others go on; then it comes back', async () => {
  const lab = await Lab.make(4096);
  const host = await lab.net.host();
  await lab.remote(host, { sourceTimeoutMs: 600 });
  const client = await lab.clone(host);
  await client.read(0, 10 * PAGE);
  await host.call('prefetch', { name: 'remote', rate: 4 << 20 });
  await host.call('until', { name: 'remote', present: 600 });
  await lab.source.kill();
  await host.call('until', { name: 'remote', state: 'failed' });
  const lost = await lab.stats(host);
  expect([lost.code, lost.source, lost.complete]).toEqual(['E_SOURCE_LOST', 'lost', false]);
  expect(lost.troubles).toEqual(['E_SOURCE_LOST']);
  expect(lost.present).toBeLessThan(4096);
  const last = 4095; // pages come in order
  await expect(client.read(last * PAGE, PAGE)).rejects.toMatchObject(EIO);
  await expect(client.write(last * PAGE + 1, Buffer.alloc(1))).rejects.toMatchObject(EIO);
  same(await client.read(0, 500 * PAGE), lab.page(0, 500));
  await client.write(last * PAGE, Buffer.alloc(PAGE, 3));
  same(await client.read(last * PAGE, PAGE), Buffer.alloc(PAGE, 3));

  // The operator brings it back with the source file given out: same key, group and port.
  const source = await lab.net.restart(lab.source.namespace, lab.source.address);
  await source.call('reopen', { name: 'parent', directory: join(lab.folder, 'parent') });
  const { generation, file } = lab;
  const again = { name: 'parent', generation, file, fork: false, previous: true };
  await source.call('publish', { ...again, address: source.address });
  await host.call('prefetch', { name: 'remote', rate: UNLIMITED });
  await host.call('until', { name: 'remote', state: 'done' });
  await source.kill();
  const expected = Buffer.from(lab.image);
  expected.fill(3, last * PAGE);
  same(await client.read(0, 4096 * PAGE), expected);
});

test('a reader waits for a lost source no longer than its time-out, whoever else reads', async () => {
  const lab = await Lab.make(256);
  const host = await lab.net.host();
  await lab.remote(host, { sourceTimeoutMs: 500 });
  const client = await lab.clone(host);
  same(await client.read(3 * PAGE, PAGE), lab.page(3));
  await lab.source.kill();
  const waiting = expect(client.read(200 * PAGE, PAGE)).rejects.toMatchObject(EIO);
  same(await client.read(3 * PAGE, PAGE), lab.page(3));
  await client.write(201 * PAGE, Buffer.alloc(PAGE, 1));
  await waiting;
});

test('a second clone on a host shares the replica: nothing is fetched twice', async () => {
  const lab = await Lab.make(512);
  const host = await lab.net.host();
  await lab.remote(host);
  const one = await lab.clone(host, 'one');
  same(await one.read(0, 256 * PAGE), lab.page(0, 256));
  const served = await lab.source.call<McdistServerStats>('serverStats', { name: 'parent' });
  await lab.remote(host, { name: 'again' });
  const two = await lab.clone(host, 'two', true, 'again');
  same(await two.read(0, 256 * PAGE), lab.page(0, 256));
  await one.write(0, Buffer.alloc(PAGE, 1));
  same(await two.read(0, PAGE), lab.page(0));
  const after = await lab.source.call<McdistServerStats>('serverStats', { name: 'parent' });
  expect(after.pagesServed).toBe(served.pagesServed);
  // It stays open until both have closed it.
  await host.call('closeDisk', { name: 'one' });
  await host.call('closeRemote', { name: 'remote' });
  same(await two.read(300 * PAGE, PAGE), lab.page(300));
});

test('a prefetch without a limit takes part in one push with other hosts; with one it asks', async () => {
  const lab = await Lab.make(2048);
  const hosts = [await lab.net.host(), await lab.net.host()];
  for (const host of hosts) await lab.remote(host);
  await Promise.all(
    hosts.map((host) => host.call('prefetch', { name: 'remote', rate: UNLIMITED })),
  );
  for (const host of hosts) {
    await host.call('until', { name: 'remote', complete: true });
    await host.call('until', { name: 'remote', state: 'done' });
    const { present, zero, prefetch } = await lab.stats(host);
    expect(present + zero).toBe(2048);
    expect([prefetch?.askedBytes, prefetch?.underWay]).toEqual([2048 * PAGE, 0]);
  }
  const pushed = await lab.source.call<McdistServerStats>('serverStats', { name: 'parent' });
  expect(pushed.pagesPushed).toBeGreaterThan(0.9 * 2048);
  expect(pushed.pagesServed).toBeLessThan(1.5 * 2048);

  const late = await lab.net.host();
  await lab.remote(late, { prefetch: 64 << 20 });
  await late.call('until', { name: 'remote', complete: true });
  const after = await lab.source.call<McdistServerStats>('serverStats', { name: 'parent' });
  expect(after.pagesPushed).toBe(pushed.pagesPushed);
});

test('what one host prefetches fills the replicas of others', async () => {
  const lab = await Lab.make(1024);
  const hosts = [await lab.net.host(), await lab.net.host()];
  const [one, two] = hosts;
  if (one === undefined || two === undefined) throw new Error('no hosts');
  await lab.remote(two);
  await lab.remote(one, { prefetch: UNLIMITED });
  for (const host of hosts) await host.call('until', { name: 'remote', complete: true });
  expect((await lab.stats(two)).requested).toBe(0);
  await lab.source.kill();
  same(await (await lab.clone(two)).read(0, 1024 * PAGE), lab.image);
});

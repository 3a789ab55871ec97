import { randomBytes } from 'node:crypto';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { LocalSource } from '../../src/memtap/memtap.js';
import { Bench, differingPages, PAGE } from './harness.js';

const PAGES = 512;

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(async () => {
  await bench.end();
});

/** A complete image: pages 400 on are zero. */
function master(): { image: Buffer; source: ReturnType<Bench['replica']> } {
  const image = Buffer.concat([randomBytes(400 * PAGE), Buffer.alloc((PAGES - 400) * PAGE)]);
  const source = bench.replica(PAGES, 'disk');
  for (let page = 0; page < 400; page++) {
    source.fill(page, image.subarray(page * PAGE, (page + 1) * PAGE));
  }
  source.fillZero(400, PAGES - 400);
  return { image, source };
}

test('a clone fetches exactly the pages it touches, once each', async () => {
  const server = bench.server();
  const { image, source } = master();
  const replica = bench.replica(PAGES);
  const local = new LocalSource(replica.handle, source.provider);
  bench.onEnd(() => local.close());
  const { id, guest } = await bench.vm(server, PAGES, replica);
  expect(replica.stats().present).toBe(0);
  await guest.say('touch 7 20 3');
  await guest.say('touch 7 20 3');
  expect(replica.stats().present).toBe(20);
  expect(server.stats(id)).toMatchObject({ missingFaults: 20, pagesFetched: 20, zeroPages: 0 });
  expect(differingPages(await guest.dump(0, PAGES), image)).toEqual([]);
  expect(local.served).toBe(PAGES);
});

test('pages present before the fault cost no fault, zero pages no transfer', async () => {
  const server = bench.server();
  const { image, source } = master();
  const replica = bench.replica(PAGES);
  for (let page = 0; page < 400; page++) {
    replica.fill(page, image.subarray(page * PAGE, (page + 1) * PAGE));
  }
  replica.fillZero(400, PAGES - 400);
  const local = new LocalSource(replica.handle, source.provider);
  bench.onEnd(() => local.close());
  const { id, guest } = await bench.vm(server, PAGES, replica);
  expect(differingPages(await guest.dump(0, PAGES), image)).toEqual([]);
  expect(server.stats(id)).toMatchObject({ missingFaults: PAGES - 400, pagesFetched: 0 });
  expect(local.served).toBe(0);
});

test('two clones of one replica share what was fetched and keep their writes apart', async () => {
  const server = bench.server();
  const { image, source } = master();
  const replica = bench.replica(PAGES);
  const local = new LocalSource(replica.handle, source.provider);
  bench.onEnd(() => local.close());
  const a = await bench.vm(server, PAGES, replica);
  const b = await bench.vm(server, PAGES, replica);
  await a.guest.say('touch 0 100');
  await a.guest.say('fill 0 50 1');
  await b.guest.say('fill 25 50 2');
  expect(server.stats(b.id).pagesFetched).toBe(0);
  expect((await b.guest.dump(0, 25)).equals(image.subarray(0, 25 * PAGE))).toBe(true);
  expect((await a.guest.dump(50, 50)).equals(image.subarray(50 * PAGE, 100 * PAGE))).toBe(true);
  expect(replica.stats().present).toBe(100);
});

test('a lost source is reported and its fault never answered', async () => {
  const server = bench.server();
  const replica = bench.replica(PAGES);
  const { id, guest } = await bench.vm(server, PAGES, replica);
  const lost = new Promise((resolve) => server.once('lost', resolve));
  const touched = guest.say('touch 3 1').catch((error: Error) => error.message);
  replica.fail('E_SOURCE_LOST', 'the parent is gone');
  expect(await lost).toEqual({ vm: id, code: 'E_SOURCE_LOST', message: 'the parent is gone' });
  await guest.kill();
  expect(await touched).toMatch(/exited/);
});

test('a VM that ends with faults outstanding hurts nobody', async () => {
  const server = bench.server();
  const { image, source } = master();
  const replica = bench.replica(PAGES);
  const waiting = await bench.vm(server, PAGES, replica);
  const other = await bench.vm(server, PAGES, replica);
  const touched = waiting.guest.say('touch 3 1').catch(() => undefined);
  const answer = other.guest.dump(0, PAGES);
  const detached = new Promise((resolve) => server.once('detached', resolve));
  await waiting.guest.kill();
  await touched;
  await detached;
  const local = new LocalSource(replica.handle, source.provider);
  bench.onEnd(() => local.close());
  expect(differingPages(await answer, image)).toEqual([]);
});

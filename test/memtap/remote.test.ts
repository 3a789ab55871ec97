// VMs whose pages come by mcdist: the pager that waits for them receives them.
import { randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { randomGroup } from '../../src/mcdist/groups.js';
import { McdistClient, McdistServer } from '../../src/mcdist/mcdist.js';
import { Bench, differingPages, PAGE } from './harness.js';

const PAGES = 256;
const LOOPBACK = '127.0.0.1';
const GENERATION = '0'.repeat(32);

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(async () => {
  await bench.end();
});

/** A replica with a client whose source serves it as soon as `serve` is called. */
function remote() {
  const image = randomBytes(PAGES * PAGE);
  const source = bench.replica(PAGES, 'disk');
  for (let page = 0; page < PAGES; page++) {
    source.fill(page, image.subarray(page * PAGE, (page + 1) * PAGE));
  }
  const replica = bench.replica(PAGES);
  const key = randomBytes(32);
  const { group, port: groupPort } = randomGroup();
  const server = new McdistServer({ bindAddress: LOOPBACK, interfaceAddress: LOOPBACK });
  bench.onEnd(() => server.close());
  const of = { generation: GENERATION, key, group, groupPort };
  const client = new McdistClient({
    ...{ ...of, replica: replica.handle, interfaceAddress: LOOPBACK },
    server: { address: LOOPBACK, port: server.port },
  });
  bench.onEnd(() => client.close());
  return {
    image,
    replica,
    client,
    serve: () => server.serve({ ...of, provider: source.provider }),
  };
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await delay(5);
}

test('the pages a guest touches come, no others, and are the right ones', async () => {
  const server = bench.server();
  const { image, replica, serve } = remote();
  serve();
  const { id, guest } = await bench.vm(server, PAGES, replica);
  await guest.say('touch 7 20 3');
  expect(server.stats(id)).toMatchObject({ missingFaults: 20, pagesFetched: 20 });
  expect(replica.stats()).toMatchObject({ present: 20, waiting: 0 });
  expect(differingPages(await guest.dump(0, PAGES), image)).toEqual([]);
});

test('a VM with a page under way has its other faults taken, and all end with the source', async () => {
  const server = bench.server();
  const { replica, client, serve } = remote();
  const { id, guest } = await bench.vm(server, PAGES, replica);
  await guest.say('write-on 1');
  await until(() => server.stats(id).missingFaults === 1);
  const touched = guest.say('touch 3 1');
  await until(() => server.stats(id).missingFaults === 2);
  expect(server.stats(id).pagesFetched).toBe(0);
  serve();
  await touched;
  await guest.say('pause');
  expect(client.stats().lost).toBe(false);
});

test('two VMs of one client wait at once, and each gets its page', async () => {
  const server = bench.server();
  const { replica, serve } = remote();
  const a = await bench.vm(server, PAGES, replica);
  const b = await bench.vm(server, PAGES, replica);
  const touched = [a.guest.say('touch 3 1'), b.guest.say('touch 4 1')];
  await until(() => replica.stats().waiting === 2);
  serve();
  await Promise.all(touched);
  expect(replica.stats()).toMatchObject({ present: 2, waiting: 0 });
});

test('a VM that dies while its pager waits for a page is noticed, and others go on', async () => {
  const server = bench.server();
  const { replica, serve } = remote();
  const dying = await bench.vm(server, PAGES, replica);
  const other = await bench.vm(server, PAGES, replica);
  const never = dying.guest.say('touch 3 1').catch(() => undefined);
  await until(() => replica.stats().waiting === 1);
  const detached = new Promise((resolve) => server.once('detached', resolve));
  await dying.guest.kill();
  await Promise.all([never, detached]);
  const touched = other.guest.say('touch 4 1');
  serve();
  await touched;
});

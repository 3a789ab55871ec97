import { existsSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { LocalSource } from '../../src/memtap/memtap.js';
import { Bench, differingPages, until } from './harness.js';

const PAGES = 2048;

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(async () => {
  await bench.end();
});

describe.each([
  { name: 'protecting unpopulated memory by markers', populate: false },
  { name: 'protecting unpopulated memory by populating it', populate: true },
])('$name', ({ populate }) => {
  test('a generation keeps the instant while its parent keeps writing', async () => {
    const server = bench.server({ populate });
    const { id, guest } = await bench.vm(server, PAGES);
    await guest.say('fill 0 600 1');
    await guest.say('write-on 11');
    const generation = bench.generation();
    await server.forkBegin(id, { generation, directory: bench.path(generation) });
    await until(() => server.stats(id).dirtiedPages > 0);
    await guest.say('pause');
    const { dirtyPages, zeroRuns } = await server.forkCommit(id, generation);
    const instant = await guest.dump(0, PAGES);
    expect(dirtyPages).toBeGreaterThan(0);
    for (let i = 0; i < zeroRuns.length; i += 2) {
      const first = zeroRuns[i] ?? 0;
      const run = instant.subarray(first * 4096, (first + (zeroRuns[i + 1] ?? 0)) * 4096);
      expect(run.every((byte) => byte === 0)).toBe(true);
    }
    await guest.say('write-on 12');
    const whileWriting = await bench.image(server, id, generation, PAGES);
    await guest.say(`fill 0 ${PAGES} 5`);
    await guest.say('pause');
    expect(differingPages(whileWriting, instant)).toEqual([]);
    expect(differingPages(await bench.image(server, id, generation, PAGES), instant)).toEqual([]);
    expect(server.stats(id).savedPages).toBe(PAGES);
  });

  test('pages never touched are known to be zero, and stay so for the generation', async () => {
    const server = bench.server({ populate });
    const { id, guest } = await bench.vm(server, PAGES);
    await guest.say('fill 100 50 1');
    await guest.say('touch 1000 10');
    const first = bench.generation();
    await server.forkBegin(id, { generation: first, directory: bench.path(first) });
    await guest.say('fill 300 5 2');
    const commit = await server.forkCommit(id, first);
    expect([...commit.zeroRuns]).toEqual([0, 100, 150, 150, 305, PAGES - 305]);
    expect(commit.dirtyPages).toBe(5);
    await guest.say('fill 0 20 3');
    const image = await bench.image(server, id, first, PAGES);
    expect(image.subarray(0, 100 * 4096).every((byte) => byte === 0)).toBe(true);
    const second = bench.generation();
    await server.forkBegin(id, { generation: second, directory: bench.path(second) });
    const again = await server.forkCommit(id, second);
    expect([...again.zeroRuns]).toEqual([20, 80, 150, 150, 305, PAGES - 305]);
  });

  test('twenty forks in a row keep their instants, also when middle ones are dropped', async () => {
    const server = bench.server({ populate });
    const { id, guest } = await bench.vm(server, PAGES);
    await guest.say(`fill 0 ${PAGES / 2} 1`);
    const kept = new Map<string, Buffer>();
    const all: string[] = [];
    for (let i = 0; i < 20; i++) {
      await guest.say(`write-on ${i}`);
      const generation = bench.generation();
      await server.forkBegin(id, { generation, directory: bench.path(generation) });
      await guest.say('pause');
      await server.forkCommit(id, generation);
      kept.set(generation, await guest.dump(0, PAGES));
      all.push(generation);
      await guest.say(`fill ${(i * 97) % PAGES} 1 ${i}`);
      if (i % 3 === 2) {
        await guest.say(`write-on ${100 + i}`);
        const victim = all[i - 1] ?? '';
        const [, image] = await Promise.all([
          server.dropGeneration(id, victim),
          bench.image(server, id, all[0] ?? '', PAGES),
        ]);
        expect(differingPages(image, kept.get(all[0] ?? '') ?? Buffer.of())).toEqual([]);
        expect(existsSync(bench.path(victim))).toBe(false);
        kept.delete(victim);
        await guest.say('pause');
      }
    }
    expect(server.stats(id).movedPages).toBeGreaterThan(0);
    // Newest first: each drop hands its pages on to the next older one.
    for (const generation of [...kept.keys()].reverse()) {
      for (const [name, instant] of kept) {
        const image = await bench.image(server, id, name, PAGES);
        expect(differingPages(image, instant), `${name} before dropping ${generation}`).toEqual([]);
      }
      await server.dropGeneration(id, generation);
      kept.delete(generation);
    }
    const before = server.stats(id).wpFaults;
    await guest.say(`fill 0 ${PAGES} 9`);
    expect(server.stats(id).wpFaults).toBe(before);
  });
});

test('an aborted fork leaves nothing and slows nobody down', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const generation = bench.generation();
  await server.forkBegin(id, { generation, directory: bench.path(generation) });
  await expect(
    server.forkBegin(id, { generation: bench.generation(), directory: bench.path('x') }),
  ).rejects.toMatchObject({ code: 'E_STATE' });
  await server.forkAbort(id, generation);
  expect(existsSync(bench.path(generation))).toBe(false);
  await guest.say(`fill 0 ${PAGES} 2`);
  expect(server.stats(id).wpFaults).toBe(0);
  await expect(server.forkCommit(id, generation)).rejects.toMatchObject({ code: 'E_STATE' });
  expect(() => server.provider(id, generation)).toThrow(/no generation/);
});

test('an aborted fork does not hurt an older generation', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const instant = await guest.dump(0, PAGES);
  const older = await bench.fork(server, id);
  const aborted = bench.generation();
  await guest.say('fill 0 100 2');
  await server.forkBegin(id, { generation: aborted, directory: bench.path(aborted) });
  await guest.say('fill 50 100 3');
  await server.forkAbort(id, aborted);
  await guest.say('fill 100 100 4');
  expect(differingPages(await bench.image(server, id, older, PAGES), instant)).toEqual([]);
});

test('writes by system calls into the RAM are seen like any other', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say('fill 0 64 1');
  await guest.dump(0, 64);
  const path = `${bench.open}/data`;
  await guest.say(`dump 0 32 ${path}`);
  const instant = await guest.dump(0, PAGES);
  const generation = await bench.fork(server, id);
  await guest.say(`load 32 32 ${path}`);
  expect(await guest.dump(32, 1)).toEqual(instant.subarray(0, 4096));
  expect(differingPages(await bench.image(server, id, generation, PAGES), instant)).toEqual([]);
});

test('reading a generation of a VM that died is an error, never zeros', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say('fill 0 10 1');
  const generation = await bench.fork(server, id);
  const detached = new Promise((resolve) => server.once('detached', resolve));
  await guest.kill();
  expect(await detached).toMatchObject({ vm: id });
  await expect(bench.image(server, id, generation, PAGES)).rejects.toMatchObject({
    code: 'E_SOURCE_LOST',
  });
  server.remove(id);
  expect(existsSync(bench.path(generation))).toBe(false);
  expect(() => server.stats(id)).toThrow(/not known/);
});

test('a clone forks again: its clones see its instant, and its parent its own', async () => {
  const server = bench.server();
  const parent = await bench.vm(server, PAGES);
  await parent.guest.say('fill 0 1000 1');
  const first = await bench.fork(server, parent.id);
  const parentInstant = await parent.guest.dump(0, PAGES);
  const replica = bench.replica(PAGES);
  replica.fillZero(1000, 500);
  const source = new LocalSource(replica.handle, server.provider(parent.id, first));
  bench.onEnd(() => source.close());
  const child = await bench.vm(server, PAGES, replica);
  await child.guest.say('touch 0 50');
  await child.guest.say('touch 1000 20');
  await child.guest.say('fill 40 100 7');
  await child.guest.say('fill 1010 20 7');
  const second = bench.generation();
  await server.forkBegin(child.id, { generation: second, directory: bench.path(second) });
  await child.guest.say('fill 200 10 8');
  await child.guest.say('fill 1490 5 8');
  const commit = await server.forkCommit(child.id, second);
  expect([...commit.zeroRuns]).toEqual([1000, 10, 1030, 460, 1495, 5]);
  const childInstant = Buffer.from(parentInstant);
  (await child.guest.dump(40, 100)).copy(childInstant, 40 * 4096);
  (await child.guest.dump(200, 10)).copy(childInstant, 200 * 4096);
  (await child.guest.dump(1010, 20)).copy(childInstant, 1010 * 4096);
  (await child.guest.dump(1490, 5)).copy(childInstant, 1490 * 4096);
  // Both go on: over pages touched, never touched, and known to be zero.
  await child.guest.say('poke 0 1600');
  await parent.guest.say('fill 0 1200 9');
  const nested = bench.replica(PAGES);
  const nestedSource = new LocalSource(nested.handle, server.provider(child.id, second));
  bench.onEnd(() => nestedSource.close());
  const grandchild = await bench.vm(server, PAGES, nested);
  expect(differingPages(await grandchild.guest.dump(0, PAGES), childInstant)).toEqual([]);
  const parentImage = await bench.image(server, parent.id, first, PAGES);
  expect(differingPages(parentImage, parentInstant)).toEqual([]);
});

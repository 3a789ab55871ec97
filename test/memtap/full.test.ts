import { execFileSync } from 'node:child_process';
import { rmSync, statfsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Bench, differingPages, until } from './harness.js';

const PAGES = 1024;

let bench: Bench;
let small: string;
beforeEach(() => {
  bench = new Bench();
  small = bench.folder('small');
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'small', small]);
  bench.onEnd(() => {
    // Lazily: the server's threads may not be done closing its files.
    execFileSync('umount', ['-l', small]);
  });
});
afterEach(async () => {
  await bench.end();
});

/** Leaves `free` bytes on the small file system; the path of what fills it. */
function fillUp(free: number): string {
  const { bavail, bsize } = statfsSync(small);
  const path = join(small, 'ballast');
  writeFileSync(path, Buffer.alloc(bavail * bsize - free));
  return path;
}

test('no space for the old page: the generation fails, the guest runs on', async () => {
  const server = bench.server({ saveWaitMs: 30 });
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const elsewhere = await bench.fork(server, id);
  const instant = await guest.dump(0, PAGES);
  await guest.say('fill 0 20 2');
  const generation = bench.generation();
  await server.forkBegin(id, { generation, directory: join(small, generation) });
  await server.forkCommit(id, generation);
  fillUp(64 * 4096);
  const failed: string[] = [];
  server.on('generation-failed', (event) => failed.push(`${event.generation} ${event.code}`));
  await guest.say(`fill 0 ${PAGES} 3`);
  // The older generation counted on the full one for the page that was lost.
  expect(failed.sort()).toEqual([`${elsewhere} E_NO_SPACE`, `${generation} E_NO_SPACE`].sort());
  for (const name of [elsewhere, generation]) {
    await expect(bench.image(server, id, name, PAGES)).rejects.toMatchObject({
      code: 'E_SOURCE_LOST',
    });
    await server.dropGeneration(id, name);
  }
  const next = await bench.fork(server, id);
  const nextInstant = await guest.dump(0, PAGES);
  expect(nextInstant.equals(instant)).toBe(false);
  await guest.say('fill 0 100 4');
  expect(differingPages(await bench.image(server, id, next, PAGES), nextInstant)).toEqual([]);
});

test('space that comes in time saves the generation', async () => {
  const server = bench.server({ saveWaitMs: 60_000 });
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const instant = await guest.dump(0, PAGES);
  const generation = bench.generation();
  await server.forkBegin(id, { generation, directory: join(small, generation) });
  await server.forkCommit(id, generation);
  const ballast = fillUp(4 * 4096);
  const written = guest.say('fill 0 100 2');
  await until(() => statfsSync(small).bavail === 0);
  rmSync(ballast);
  await written;
  expect(differingPages(await bench.image(server, id, generation, PAGES), instant)).toEqual([]);
});

test('no space when handing pages on: the older generation fails, the newer one does not', async () => {
  const server = bench.server({ saveWaitMs: 30 });
  const { id, guest } = await bench.vm(server, PAGES);
  await guest.say(`fill 0 ${PAGES} 1`);
  const oldest = bench.generation();
  await server.forkBegin(id, { generation: oldest, directory: join(small, oldest) });
  await server.forkCommit(id, oldest);
  const middle = await bench.fork(server, id);
  await guest.say('fill 0 100 2');
  const newest = await bench.fork(server, id);
  const instant = await guest.dump(0, PAGES);
  fillUp(10 * 4096);
  const failed = new Promise((resolve) => server.once('generation-failed', resolve));
  await server.dropGeneration(id, middle);
  expect(await failed).toMatchObject({ generation: oldest, code: 'E_NO_SPACE' });
  await guest.say('fill 50 100 3');
  expect(differingPages(await bench.image(server, id, newest, PAGES), instant)).toEqual([]);
});

test('no space for a generation’s bitmaps is an error of forkBegin and leaves nothing', async () => {
  const server = bench.server();
  const { id, guest } = await bench.vm(server, PAGES);
  fillUp(4096);
  const generation = bench.generation();
  await expect(
    server.forkBegin(id, { generation, directory: join(small, generation) }),
  ).rejects.toMatchObject({ code: 'E_NO_SPACE' });
  await guest.say(`fill 0 ${PAGES} 1`);
  expect(server.stats(id).generations).toBe(0);
  await bench.fork(server, id);
});

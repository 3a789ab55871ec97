// Small writes that reach a connection together are done together (native/blktap/disk_batch.cc).
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import type { NbdClient } from '../blktap/nbd-client.js';
import {
  connectTo,
  execute,
  newDisk,
  newGeneration,
  newSeed,
  PAGE,
  random,
  serveInChild,
  strace,
  temporary,
} from '../blktap/support.js';

const MIB = 2 ** 20;
const ENOSPC = 28;

/** Runs `send` so that all its requests leave in one piece. */
function atOnce<T>(client: NbdClient, send: () => T): T {
  client.socket.cork();
  try {
    return send();
  } finally {
    client.socket.uncork();
  }
}

test('first writes that arrive together are marked together, before any is answered', async () => {
  const folder = await temporary();
  const [directory, socketPath, log] = ['disk', 'nbd', 'trace'].map((name) => join(folder, name));
  await Disk.create(directory as string, { sizeBytes: MIB });
  const child = await serveInChild(directory as string, socketPath as string);
  const client = await connectTo(socketPath as string);
  const calls = 'trace=pwritev,sendmsg';
  await strace(child.pid, ['-y', '-e', calls, '-o', log as string]);
  const pages = Array.from({ length: 32 }, (_, i) => 5 * i);
  await Promise.all(
    atOnce(client, () => pages.map((page) => client.write(page * PAGE, Buffer.alloc(PAGE, page)))),
  );
  await child.kill();
  const lines = (await readFile(log as string, 'utf8')).split('\n');
  const kinds = lines.flatMap((line) => /\.data>|\.live>|sendmsg\(/.exec(line)?.[0] ?? []);
  expect(kinds.filter((kind) => kind === '.data>')).toHaveLength(32);
  expect(kinds.filter((kind) => kind === '.live>').length).toBeLessThan(16);
  expect(kinds.indexOf('.live>')).toBeLessThan(kinds.indexOf('sendmsg('));
  expect(kinds.lastIndexOf('.data>')).toBeLessThan(kinds.lastIndexOf('.live>'));
});

test('of a page written whole and in part at once nothing older shows', async () => {
  const { disk, socketPath } = await newDisk(MIB);
  const [one, other] = await Promise.all([connectTo(socketPath), connectTo(socketPath)]);
  const rand = random(newSeed('parts'));
  for (let round = 1; round <= 60; round++) {
    const older = 3 * round - 3;
    const [whole, part] = [older + 1, older + 2];
    const pages = Array.from({ length: 32 }, () => Math.floor(rand() * 256));
    const wholes = atOnce(one, () =>
      pages.map((page) => one.write(page * PAGE, Buffer.alloc(PAGE, whole))),
    );
    const parts = pages.map((page) => other.write(page * PAGE + 512, Buffer.alloc(512, part)));
    await Promise.all([...wholes, ...parts]);
    const all = await one.read(0, MIB);
    for (const page of pages) {
      const is = all.subarray(page * PAGE, (page + 1) * PAGE);
      const rest = Buffer.concat([is.subarray(0, 512), is.subarray(1024)]);
      expect(rest.equals(Buffer.alloc(PAGE - 512, whole)), `round ${round}, page ${page}`).toBe(
        true,
      );
      expect([whole, part]).toContain(is[512]);
    }
    await disk.fork(newGeneration()); // so that all pages are written for the first time again
    await disk.prepareFork();
  }
});

test('when space ends amid writes done together, those that were acknowledged are kept', async () => {
  const folder = await temporary();
  await execute('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder]);
  let disk: Disk | undefined;
  try {
    const directory = join(folder, 'disk');
    await Disk.create(directory, { sizeBytes: 2 * MIB });
    disk = await Disk.open(directory);
    const socketPath = join(folder, 'nbd');
    await disk.serve({ socketPath });
    const client = await connectTo(socketPath);
    const rand = random(newSeed('space'));
    // Of each page the writes in order: the number of each, and whether it was acknowledged.
    const history = Array.from({ length: 512 }, () => [] as { id: number; kept: boolean }[]);
    let id = 0;
    let failed = 0;
    for (let round = 0; round < 30; round++) {
      const results = atOnce(client, () =>
        Array.from({ length: 40 }, async () => {
          id = (id % 255) + 1;
          const mine = { id, kept: false };
          // Some pages of its own for each round, each of them several times.
          const first = 16 * round + Math.floor(rand() * 12);
          const count = 1 + Math.floor(rand() * 4);
          for (let page = first; page < first + count; page++) history[page]?.push(mine);
          try {
            await client.write(first * PAGE, Buffer.alloc(count * PAGE, mine.id));
            mine.kept = true;
          } catch (error) {
            expect(error).toMatchObject({ errno: ENOSPC });
            failed++;
          }
        }),
      );
      await Promise.all(results);
    }
    expect(failed).toBeGreaterThan(20);
    const all = await client.read(0, 2 * MIB);
    for (const [page, writes] of history.entries()) {
      const last = writes.findLastIndex(({ kept }) => kept);
      // A write that failed may have reached a page that the slice had; never one that it had not.
      const may = last < 0 ? [0] : writes.slice(last).map((write) => write.id);
      const is = all.subarray(page * PAGE, (page + 1) * PAGE);
      expect(may, `page ${page}`).toContain(is[0]);
      expect(is.equals(Buffer.alloc(PAGE, is[0])), `page ${page} is mixed`).toBe(true);
    }
    await client.close();
  } finally {
    await disk?.close().catch((error: unknown) => {
      expect(error).toMatchObject({ code: 'E_NO_SPACE' });
    });
    await execute('umount', [folder]);
  }
});

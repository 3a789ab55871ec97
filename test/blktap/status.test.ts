import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { addon } from '../../src/cow-disk/native.js';
import {
  chunk,
  contextData,
  FLAGS,
  infoData,
  NONE,
  OPT,
  type RawNbd,
  rawNbd,
  request,
} from './raw-nbd.js';
import {
  connectTo,
  execute,
  newDisk,
  newGeneration,
  newReplica,
  newServer,
  openDisk,
  PAGE,
  temporary,
  uri,
} from './support.js';

const MIB = 2 ** 20;
const DEPTH = 'qemu:allocation-depth';
const ALLOCATION = 'base:allocation';

interface Extent {
  offset: number;
  length: number;
  type: number;
}

/** As nbdinfo sees it. */
async function map(socketPath: string, context: string, name = 'disk'): Promise<number[][]> {
  const { stdout } = await execute(
    'nbdinfo',
    [`--map=${context}`, '--json', uri(socketPath, name)],
    { maxBuffer: 64 * MIB },
  );
  return (JSON.parse(stdout) as Extent[]).map((e) => [e.offset / PAGE, e.length / PAGE, e.type]);
}

/**
 * Pages 0-9 of a base image hold data, the rest of its 20 is a hole; three generations:
 * page 1, 2, 3 were written in the first, 2 and 3 in the second, 3 in the third, 4 in the top, page 9
 * was trimmed in the second.
 */
async function layered() {
  const image = join(await temporary(), 'image');
  await writeFile(image, Buffer.alloc(10 * PAGE, 1));
  await execute('truncate', ['-s', String(20 * PAGE), image]);
  const made = await newDisk(64 * PAGE, { base: { kind: 'image', path: image } });
  const client = await connectTo(made.socketPath);
  const generations = [newGeneration(), newGeneration(), newGeneration()] as const;
  await client.write(PAGE, Buffer.alloc(3 * PAGE, 2));
  await made.disk.fork(generations[0]);
  await client.write(2 * PAGE, Buffer.alloc(2 * PAGE, 3));
  await client.trim(9 * PAGE, PAGE);
  await made.disk.fork(generations[1]);
  await client.write(3 * PAGE, Buffer.alloc(PAGE, 4));
  await made.disk.fork(generations[2]);
  await client.write(4 * PAGE, Buffer.alloc(PAGE, 5));
  return { ...made, client, generations };
}

test('nbdinfo shows which slice holds what: depth 1 the top, last the base, 0 nothing', async () => {
  const { socketPath, disk, folder, generations } = await layered();
  expect(await map(socketPath, DEPTH)).toEqual([
    [0, 1, 5],
    [1, 1, 4],
    [2, 1, 3],
    [3, 1, 2],
    [4, 1, 1],
    [5, 4, 5],
    [9, 1, 1], // trimmed, in whichever slice
    [10, 54, 0],
  ]);
  const shared = join(folder, 'shared');
  const server = await newServer(shared);
  for (const generation of generations) {
    await disk.serveGeneration(generation, { server, exportName: generation });
  }
  // From a generation's own slice on downwards.
  expect(await map(shared, DEPTH, generations[1])).toEqual([
    [0, 1, 3],
    [1, 1, 2],
    [2, 2, 1],
    [4, 5, 3],
    [9, 1, 1],
    [10, 54, 0],
  ]);
  expect(await map(shared, DEPTH, generations[0])).toEqual([
    [0, 1, 2],
    [1, 3, 1],
    [4, 6, 2],
    [10, 54, 0],
  ]);
});

test('nbdinfo and qemu-img see data and holes, whichever slices they are of', async () => {
  const { socketPath } = await layered();
  expect(await map(socketPath, ALLOCATION)).toEqual([
    [0, 9, 0],
    [9, 55, 3],
  ]);
  const { stdout } = await execute('qemu-img', [
    'map',
    '--output=json',
    '-f',
    'raw',
    uri(socketPath),
  ]);
  const extents = JSON.parse(stdout) as {
    start: number;
    length: number;
    data: boolean;
    zero: boolean;
  }[];
  expect(extents.map((e) => [e.start / PAGE, e.length / PAGE, e.data, e.zero])).toEqual([
    [0, 9, true, false],
    [9, 55, false, true],
  ]);
});

test('depths are the same after the disk was closed and opened', async () => {
  const { socketPath, disk, directory, client } = await layered();
  const before = await map(socketPath, DEPTH);
  await client.close();
  await disk.close();
  const again = await openDisk(directory);
  await again.serve({ socketPath, exportName: 'disk' });
  expect(await map(socketPath, DEPTH)).toEqual(before);
});

async function withBoth(socketPath: string, queries = [ALLOCATION, DEPTH]): Promise<RawNbd> {
  const raw = await rawNbd(socketPath);
  raw.socket.write(FLAGS);
  await raw.ask(OPT.structured, NONE);
  await raw.ask(OPT.setContexts, contextData('disk', queries));
  await raw.ask(OPT.go, infoData('disk'));
  return raw;
}

/** The extents of one reply, by context id: [bytes, state]. */
async function status(raw: RawNbd, offset: number, length: number, flags = 0) {
  raw.socket.write(request(7, offset, length, { flags }));
  const found: Record<number, number[][]> = {};
  for (;;) {
    const { done, type, data } = await chunk(raw.reader);
    expect(type).toBe(5);
    const extents: number[][] = [];
    for (let at = 4; at < data.length; at += 8) {
      extents.push([data.readUInt32BE(at), data.readUInt32BE(at + 4)]);
    }
    found[data.readUInt32BE(0)] = extents;
    if (done) return found;
  }
}

test('one chunk a context, each with extents of its own; no extent beyond the request', async () => {
  const { socketPath } = await layered();
  const raw = await withBoth(socketPath);
  expect(await status(raw, 3 * PAGE, 8 * PAGE)).toEqual({
    1: [
      [6 * PAGE, 0],
      [2 * PAGE, 3],
    ],
    2: [
      [PAGE, 2],
      [PAGE, 1],
      [4 * PAGE, 5],
      [PAGE, 1],
      [PAGE, 0],
    ],
  });
  // Of any alignment: an extent ends where the request does.
  expect(await status(raw, 4 * PAGE - 5, 20)).toEqual({
    1: [[20, 0]],
    2: [
      [5, 2],
      [15, 1],
    ],
  });
  expect(await status(raw, 4 * PAGE - 5, 20 * PAGE, 8)).toEqual({
    1: [[5 * PAGE + 5, 0]],
    2: [[5, 2]],
  });
  expect(await status(raw, 64 * PAGE - 1, 1)).toEqual({ 1: [[1, 3]], 2: [[1, 0]] });
});

test('an answer is bounded, whatever is asked, and the next question goes on from there', async () => {
  const pages = 8192;
  const { socketPath } = await newDisk(pages * PAGE);
  const client = await connectTo(socketPath);
  // Every other page, a few more than one answer has room for; then nothing.
  const written = Array.from({ length: 2100 }, (_, i) => 2 * i);
  await Promise.all(written.map((page) => client.write(page * PAGE, Buffer.alloc(PAGE, 1))));
  const raw = await withBoth(socketPath);
  const { 1: extents = [] } = await status(raw, 0, pages * PAGE);
  expect(extents.length).toBe(4096);
  expect(extents.every(([bytes]) => bytes === PAGE)).toBe(true);
  const expected = written.flatMap((page) => [
    [page, 1, 0],
    [page + 1, 1, 3],
  ]);
  const last = expected.at(-1) as number[];
  last[1] = pages - 4199;
  // As text: comparing thousands of arrays takes seconds.
  expect(JSON.stringify(await map(socketPath, ALLOCATION))).toBe(JSON.stringify(expected));
});

test('a large empty disk is told in few answers', async () => {
  const { socketPath } = await newDisk(2 ** 42);
  const client = await connectTo(socketPath);
  await client.write(2 ** 41, Buffer.alloc(PAGE, 1));
  const raw = await withBoth(socketPath);
  expect(await status(raw, 0, 2 ** 32 - 1)).toEqual({ 1: [[2 ** 30, 3]], 2: [[2 ** 30, 0]] });
  expect(await status(raw, 2 ** 41 - PAGE, 3 * PAGE)).toEqual({
    1: [
      [PAGE, 3],
      [PAGE, 0],
      [PAGE, 3],
    ],
    2: [
      [PAGE, 0],
      [PAGE, 1],
      [PAGE, 0],
    ],
  });
});

test('a page that is not here yet is data of the base, no hole, and asking fetches nothing', async () => {
  const generation = newGeneration();
  const replica = newReplica(join(await temporary(), 'replica'), generation, 8);
  const made = await newDisk(8 * PAGE, {
    base: { kind: 'replica', generation },
    replica: replica.handle,
  });
  replica.fillZero(0, 2);
  replica.fill(2, Buffer.alloc(PAGE, 1));
  const client = await connectTo(made.socketPath);
  await client.write(4 * PAGE, Buffer.alloc(PAGE, 2));
  const raw = await withBoth(made.socketPath);
  expect(await status(raw, 0, 8 * PAGE)).toEqual({
    1: [
      [2 * PAGE, 3],
      [6 * PAGE, 0],
    ],
    2: [
      [2 * PAGE, 0],
      [2 * PAGE, 2],
      [PAGE, 1],
      [3 * PAGE, 2],
    ],
  });
  expect(replica.stats().waiting).toBe(0);
  const provider = replica.provider;
  expect(addon().readPage(provider, 7)).toBe(null);
});

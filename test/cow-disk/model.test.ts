import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import type { DiskBase } from '../../src/cow-disk/disk.js';
import { addon } from '../../src/cow-disk/native.js';
import type { NbdClient } from '../blktap/nbd-client.js';
import {
  cleanup,
  connectTo,
  contents,
  hash,
  newDisk,
  newGeneration,
  newReplica,
  newSeed,
  openDisk,
  PAGE,
  random,
  temporary,
  until,
  uri,
} from '../blktap/support.js';

const PAGES = 300; // not a whole number of index leaves
const BYTES = PAGES * PAGE;
const STEPS = 600;

interface Below {
  base: DiskBase;
  image: Buffer;
  replica?: ReturnType<typeof newReplica>;
}

async function below(kind: DiskBase['kind'], rand: () => number): Promise<Below> {
  const image = Buffer.alloc(BYTES);
  if (kind === 'none') return { base: { kind }, image };
  for (let page = 0; page < PAGES; page++) {
    if (rand() < 0.7) image.fill(1 + Math.floor(rand() * 255), page * PAGE, (page + 1) * PAGE);
  }
  const folder = await temporary();
  if (kind === 'image') {
    const bytes = BYTES - 5 * PAGE - 1234; // the disk is larger than its image
    image.fill(0, bytes);
    const path = join(folder, 'image');
    await writeFile(path, image.subarray(0, bytes));
    return { base: { kind, path }, image };
  }
  const generation = newGeneration();
  const replica = newReplica(join(folder, 'replica'), generation, PAGES);
  for (let page = 0; page < PAGES; page++) {
    if (rand() < 0.3) fill(replica, image, page);
  }
  return { base: { kind, generation }, image, replica };
}

function fill(replica: ReturnType<typeof newReplica>, image: Buffer, page: number): void {
  const data = image.subarray(page * PAGE, (page + 1) * PAGE);
  if (data.every((byte) => byte === 0)) replica.fillZero(page, 1);
  else replica.fill(page, Buffer.from(data));
}

for (const kind of ['none', 'image', 'replica'] as const) {
  test(`random operations over forks match a plain model (base: ${kind})`, async () => {
    const rand = random(newSeed(`model ${kind}`));
    const pick = (n: number) => Math.floor(rand() * n);
    const { base, image, replica } = await below(kind, rand);
    const model = Buffer.from(image);
    const made = await newDisk(BYTES, {
      base,
      ...(replica === undefined ? {} : { replica: replica.handle }),
    });
    let { disk } = made;
    let clients: NbdClient[] = [];
    const connectAll = async () => {
      clients = [await connectTo(made.socketPath), await connectTo(made.socketPath)];
    };
    await connectAll();
    const client = () => clients[pick(clients.length)] as NbdClient;
    // Whatever waits for an absent page gets it, in no special order.
    const done = async <T>(work: Promise<T>): Promise<T> => {
      if (replica === undefined) return work;
      let over = false;
      const settled = work.finally(() => {
        over = true;
      });
      settled.catch(() => undefined);
      await until(() => over || replica.stats().waiting > 0);
      while (!over) {
        for (let page = PAGES - 1; page >= 0 && replica.stats().waiting > 0; page--) {
          fill(replica, image, page);
        }
        await until(() => over || replica.stats().waiting > 0);
      }
      return settled;
    };
    const range = (): [number, number] => {
      const from = pick(BYTES);
      const longest = [1, 512, PAGE, 10 * PAGE, 120 * PAGE][pick(5)] as number;
      let [start, length] = [from, 1 + pick(Math.min(longest, BYTES - from))];
      if (rand() < 0.5) {
        start -= start % PAGE;
        length = Math.min(Math.ceil(length / PAGE) * PAGE, BYTES - start);
      }
      return [start, length];
    };
    const generations = new Map<string, string>();
    for (let step = 0; step < STEPS; step++) {
      const [start, length] = range();
      const action = rand();
      if (action < 0.35) {
        const data = Buffer.alloc(length, pick(256));
        await done(client().write(start, data, rand() < 0.05 ? 1 : 0));
        data.copy(model, start);
      } else if (action < 0.65) {
        const read = await done(client().read(start, length));
        expect(read.equals(model.subarray(start, start + length)), `step ${step}`).toBe(true);
      } else if (action < 0.75) {
        await done(client().zero(start, length));
        model.fill(0, start, start + length);
      } else if (action < 0.83) {
        await done(client().trim(start, length));
        const from = Math.ceil(start / PAGE) * PAGE;
        const to = Math.floor((start + length) / PAGE) * PAGE;
        if (from < to) model.fill(0, from, to); // pages trimmed in part stay as they are
      } else if (action < 0.88) {
        await client().flush();
      } else if (action < 0.95) {
        const generation = newGeneration();
        await disk.fork(generation);
        generations.set(generation, hash(model));
      } else if (action < 0.97) {
        const [first] = generations.keys();
        if (first === undefined || generations.size < 5) continue;
        await disk.dropGeneration(first);
        generations.delete(first);
      } else {
        for (const each of clients) await each.close();
        await disk.close();
        disk = await openDisk(made.directory, replica && { replica: replica.handle });
        await disk.serve({ socketPath: made.socketPath });
        await connectAll();
      }
    }
    for (let page = 0; page < PAGES && replica !== undefined; page++) fill(replica, image, page);
    expect((await client().read(0, BYTES)).equals(model)).toBe(true);
    expect(disk.info().generations).toEqual([...generations.keys()]);
    for (const [generation, expected] of generations) {
      expect(hash(contents(await disk.provider(generation), PAGES))).toBe(expected);
    }
  });
}

test('depth 100 reads right, at the top and in every generation', async () => {
  const { disk, socketPath, directory } = await newDisk(BYTES);
  const client = await connectTo(socketPath);
  const model = Buffer.alloc(BYTES);
  const generations: [string, string][] = [];
  const rand = random(newSeed('depth'));
  for (let depth = 0; depth < 100; depth++) {
    for (let i = 0; i < 5; i++) {
      const page = Math.floor(rand() * PAGES);
      const data = Buffer.alloc(PAGE, 1 + depth);
      await client.write(page * PAGE, data);
      data.copy(model, page * PAGE);
    }
    const generation = newGeneration();
    await disk.fork(generation);
    generations.push([generation, hash(model)]);
  }
  expect((await client.read(0, BYTES)).equals(model)).toBe(true);
  await client.close();
  await disk.close();
  const again = await openDisk(directory);
  for (const [generation, expected] of generations) {
    expect(hash(contents(await again.provider(generation), PAGES))).toBe(expected);
  }
});

test('a generation does not change while clients keep writing and forks go on', async () => {
  const { disk, socketPath } = await newDisk(BYTES);
  const clients = await Promise.all([connectTo(socketPath), connectTo(socketPath)]);
  const rand = random(newSeed('writing'));
  let writing = true;
  let stamp = 0;
  const writers = clients.map(async (client) => {
    while (writing) {
      const page = Math.floor(rand() * PAGES);
      const count = Math.min(1 + Math.floor(rand() * 20), PAGES - page);
      stamp++;
      await client.write(page * PAGE, Buffer.alloc(count * PAGE, stamp % 255));
    }
  });
  const seen: [string, string][] = [];
  for (let i = 0; i < 20; i++) {
    const before = stamp;
    await until(() => stamp > before + 10);
    const generation = newGeneration();
    await disk.fork(generation);
    seen.push([generation, hash(contents(await disk.provider(generation), PAGES))]);
  }
  for (const [generation, first] of seen) {
    const provider = await disk.provider(generation);
    expect(hash(contents(provider, PAGES))).toBe(first);
    // No page is mixed of two writes: each was written whole.
    for (let page = 0; page < PAGES; page++) {
      const data = addon().readPage(provider, page);
      expect(data?.equals(Buffer.alloc(PAGE, data[0]))).toBe(true);
    }
  }
  writing = false;
  await Promise.all(writers);
});

test('another process writes and verifies large areas while forks go on', async () => {
  const { disk, socketPath, folder } = await newDisk(64 * 2 ** 20);
  const fio = spawn(
    'fio',
    [
      ...['--name=load', '--ioengine=nbd', `--uri=${uri(socketPath)}`, '--rw=randwrite'],
      ...['--bsrange=4k-256k', '--iodepth=16', '--size=64m', '--loops=15', '--verify=crc32c'],
      ...['--verify_backlog=64', '--verify_fatal=1', '--output=fio.log'],
    ],
    { cwd: folder, stdio: 'ignore' },
  );
  let code: number | null | undefined;
  const exited = once(fio, 'exit').then(([status]: (number | null)[]) => {
    code = status ?? null;
  });
  cleanup(async () => {
    if (code === undefined) fio.kill('SIGKILL');
    await exited;
  });
  const seen: [string, string][] = [];
  while (code === undefined) {
    await disk.prepareFork();
    const generation = newGeneration();
    await disk.fork(generation);
    if (seen.length < 10)
      seen.push([generation, hash(contents(await disk.provider(generation), PAGES))]);
    else await disk.dropGeneration(generation);
  }
  expect(code).toBe(0);
  expect(disk.info().slices.length).toBeGreaterThan(10);
  for (const [generation, first] of seen) {
    expect(hash(contents(await disk.provider(generation), PAGES))).toBe(first);
  }
});

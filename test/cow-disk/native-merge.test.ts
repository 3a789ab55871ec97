import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { addon, type SliceRef } from '../../src/cow-disk/native.js';
import {
  cleanup,
  codeOf,
  contents,
  execute,
  hash,
  newSeed,
  PAGE,
  random,
} from '../blktap/support.js';
import { Bare, type BareDisk, finish } from './native-support.js';

const PAGES = 512;
const BYTES = PAGES * PAGE - 1000;

interface Grown {
  bare: Bare;
  disk: BareDisk;
  /** Hash of the image at each slice of the chain. */
  images: string[];
}

/** A disk with `depth` sealed slices of random writes, `most(i)` pages each. */
async function grow(
  depth: number,
  rand: () => number,
  most: (i: number) => number,
): Promise<Grown> {
  const bare = await Bare.make(BYTES);
  const disk = await bare.disk();
  const client = await disk.client();
  const images: string[] = [];
  for (let i = 0; i < depth; i++) {
    for (let left = most(i); left > 0; ) {
      const count = Math.min(left, 1 + Math.floor(rand() * 8));
      const page = Math.floor(rand() * (PAGES - count - 1));
      if (rand() < 0.2) await client.zero(page * PAGE, count * PAGE);
      else await disk.write(page, 1 + Math.floor(rand() * 255), count);
      left -= count;
    }
    const { chain } = await disk.fork();
    images.push(hash(await bare.image(chain)));
  }
  return { bare, disk, images };
}

async function expectImages(bare: Bare, chain: SliceRef[], images: string[]): Promise<void> {
  for (let i = 0; i < images.length; i++) {
    expect(hash(await bare.image(chain.slice(0, i + 1))), `generation ${i}`).toBe(images[i]);
  }
}

const names = async (bare: Bare) =>
  (await readdir(bare.directory)).filter((name) => /\.(data|map)$/.test(name)).sort();

for (const [direction, most] of [
  ['upwards', [10, 200]],
  ['downwards', [200, 10]],
] as const) {
  test(`two slices become one, the smaller copied ${direction}`, async () => {
    const rand = random(newSeed('two'));
    const { bare, disk, images } = await grow(2, rand, (i) => most[i] ?? 0);
    const [lower, upper] = disk.below;
    const before = hash(await (await disk.client()).read(0, BYTES));
    const chain = await bare.merge(disk.chain, 0, 2);
    expect(chain[0]).toEqual({ id: (direction === 'upwards' ? upper : lower)?.id, map: 1 });
    expect(hash(await bare.image(chain.slice(0, 1)))).toBe(images[1]);
    expect(hash(await (await disk.client()).read(0, BYTES))).toBe(before);
    expect(disk.native.info().depth).toBe(2);
    const top = disk.chain.at(-1)?.id;
    expect(await names(bare)).toEqual(
      [`${chain[0]?.id}.1.map`, `${chain[0]?.id}.data`, `${top}.0.map`, `${top}.data`].sort(),
    );
    await disk.close();
    await bare.reopen();
    expect(hash(await bare.image(chain.slice(0, 1)))).toBe(images[1]);
    const found = await addon().checkSlice({
      directory: bare.directory,
      ...(chain[0] as SliceRef),
      sizeBytes: BYTES,
    });
    expect(found).toMatchObject({ state: 'sealed', leakedBytes: 0, holes: 0, errors: [] });
  });
}

test('no page changes while runs are merged under readers, writers and forks', async () => {
  const rand = random(newSeed('merge'));
  const { bare, disk, images } = await grow(24, rand, () => 1 + Math.floor(rand() * 60));
  // Of these generations only every sixth is kept, and read all the time.
  const kept = [5, 11, 17, 23];
  const views = await Promise.all(kept.map((i) => bare.view(disk.below.slice(0, i + 1))));
  const clone = await bare.disk(disk.below.slice(0, 12));
  await clone.write(3, 77, 5);
  const cloned = hash(await (await clone.client()).read(0, BYTES));
  let running = true;
  let rounds = 0;
  const read = async () => {
    while (running) {
      for (const [i, view] of views.entries()) {
        expect(hash(contents(view.provider(), PAGES).subarray(0, BYTES))).toBe(
          images[kept[i] ?? 0],
        );
        await new Promise((resolve) => setImmediate(resolve));
      }
      expect(hash(await (await clone.client()).read(0, BYTES))).toBe(cloned);
      rounds++;
    }
  };
  const top = await (await disk.client()).read(0, BYTES);
  const write = async () => {
    const client = await disk.client();
    while (running) {
      const at = Math.floor(rand() * (BYTES - 5000));
      const data = Buffer.alloc(1 + Math.floor(rand() * 5000), Math.floor(rand() * 256));
      await client.write(at, data);
      data.copy(top, at);
      const look = Math.floor(rand() * (BYTES - 9000));
      expect(await client.read(look, 9000)).toEqual(top.subarray(look, look + 9000));
    }
  };
  let failed = false;
  const stop = (error: unknown) => {
    failed = true;
    running = false;
    throw error;
  };
  const busy = Promise.all([read().catch(stop), write().catch(stop)]);
  busy.catch(() => undefined); // looked at below
  let chain = disk.chain;
  for (let from = 0; from < 4; from++) {
    chain = await bare.merge(chain, from, from + 6);
    disk.chain = chain;
    await disk.fork();
    chain = disk.chain;
  }
  const rounds_then = rounds;
  while (rounds < rounds_then + 2 && !failed) await new Promise((resolve) => setImmediate(resolve));
  running = false;
  await busy;
  await expectImages(
    bare,
    chain,
    kept.map((i) => images[i] ?? ''),
  );
  expect(disk.native.info().depth).toBe(chain.length);
  for (const view of views) view.close();
  await clone.close();
  await disk.close();
  await bare.reopen();
  await expectImages(
    bare,
    chain,
    kept.map((i) => images[i] ?? ''),
  );
});

test('views of the chain open while the journal names the merge and it is not applied yet', async () => {
  const { bare, disk, images } = await grow(3, random(newSeed('pending')), (i) => 200 - 60 * i);
  const slices = disk.below.slice(0, 2);
  const merge = await bare.store.mergeBegin({ slices, sizeBytes: BYTES });
  expect(await codeOf(bare.view(disk.below.slice(0, 1)))).toBe('E_IN_USE');
  await finish(merge);
  expect(await codeOf(merge.apply())).toBe('E_STATE');
  const { keep, map } = await merge.prepare();
  const chain = [{ id: keep, map }, ...disk.chain.slice(2)];
  expect(hash(await bare.image(chain.slice(0, 2)))).toBe(images[2]);
  expect(hash(await bare.image(chain.slice(0, 1)))).toBe(images[1]);
  await merge.apply();
  expect(hash(await bare.image(chain.slice(0, 1)))).toBe(images[1]);
  expect(hash(await bare.image(chain.slice(0, 2)))).toBe(images[2]);
  expect(await codeOf((async () => bare.view([{ id: keep, map: 0 }]))())).toBe('E_STATE');
});

test('a generation that is read is not merged away, nor what another merge has', async () => {
  const { bare, disk } = await grow(3, random(newSeed('refused')), () => 20);
  const begin = (slices: SliceRef[]) => bare.store.mergeBegin({ slices, sizeBytes: BYTES });
  const [first, second, third] = disk.below as [SliceRef, SliceRef, SliceRef];
  const view = await bare.view([first]);
  expect(await codeOf(begin([first, second]))).toBe('E_IN_USE');
  view.close();
  expect(await codeOf(begin([second, first]))).toBe('E_STATE');
  expect(await codeOf(begin([third, disk.chain.at(-1) as SliceRef]))).toBe('E_IN_USE');
  const merge = await begin([first, second]);
  expect(await codeOf(begin([second, third]))).toBe('E_IN_USE');
  await merge.abort();
  const clone = await bare.disk([first]);
  expect(await codeOf(begin([first, second]))).toBe('E_STATE');
  await clone.close();
});

test('an aborted merge leaves everything as it was, and its space free', async () => {
  const { bare, disk, images } = await grow(2, random(newSeed('abort')), (i) => [200, 100][i] ?? 0);
  const before = await names(bare);
  const allocated = async () => Promise.all(disk.below.map((slice) => bare.allocated(slice)));
  const space = await allocated();
  for (const prepared of [false, true]) {
    const merge = await bare.store.mergeBegin({ slices: disk.below, sizeBytes: BYTES });
    if (prepared) {
      await finish(merge);
      await merge.prepare();
    } else {
      expect((await merge.step(PAGE * 8)).bytes).toBeGreaterThan(0);
    }
    await merge.abort();
    expect(await names(bare)).toEqual(before);
    expect(await allocated()).toEqual(space);
    expect(hash(await bare.image(disk.below))).toBe(images[1]);
    expect(await codeOf((async () => merge.step(1))())).toBe('E_STATE');
  }
});

for (const until of ['step', 'prepare', 'apply'] as const) {
  test(`killed after ${until}: the chain that the journal names reads as before`, async () => {
    const { bare, disk, images } = await grow(4, random(newSeed('killed')), (i) => 150 - 30 * i);
    await disk.close();
    await bare.store.close();
    const slices = disk.below.slice(0, 3);
    const here = fileURLToPath(new URL('.', import.meta.url));
    const child = spawn(process.execPath, [
      '--import',
      join(here, '../blktap/ts-loader.mjs'),
      join(here, 'native-merge-child.ts'),
      JSON.stringify({ directory: bare.directory, sizeBytes: BYTES, slices, until }),
    ]);
    const ended = once(child, 'exit');
    cleanup(async () => {
      child.kill('SIGKILL');
      await ended;
    });
    const [line] = (await once(child.stdout, 'data')) as [Buffer];
    child.kill('SIGKILL');
    await ended;
    const { keep, map } = JSON.parse(line.toString()) as { keep: string; map: number };
    bare.store = await addon().openStore(bare.directory);
    // Of the slices in the run only the last may have a generation.
    const kept = async (chain: SliceRef[]) => {
      expect(hash(await bare.image(chain.slice(0, -1)))).toBe(images[2]);
      expect(hash(await bare.image(chain))).toBe(images[3]);
    };
    if (until !== 'apply') await kept(disk.below);
    if (until !== 'step') {
      await kept([{ id: keep, map }, ...disk.below.slice(3)]);
    }
    if (until === 'apply') return;
    // What the killed one left does not stand in the way.
    await kept(await bare.merge(disk.below, 0, 3));
  });
}

test('a merge on a full file system fails, can be aborted, and no page is lost', async () => {
  const folder = (await Bare.make(1)).directory;
  const mount = join(folder, 'small');
  await execute('mkdir', [mount]);
  await execute('mount', ['-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', mount]);
  cleanup(() => execute('umount', [mount]));
  const bare = await Bare.open(mount, BYTES);
  const disk = await bare.disk();
  await disk.write(0, 1, 100);
  await disk.fork();
  await disk.write(200, 2, 120);
  await disk.fork();
  const before = hash(await bare.image(disk.below));
  await writeFile(join(mount, 'ballast'), Buffer.alloc(2 ** 21)).catch(() => undefined);
  const merge = await bare.store.mergeBegin({ slices: disk.below, sizeBytes: BYTES });
  expect(await codeOf(finish(merge))).toBe('E_NO_SPACE');
  expect(hash(await bare.image(disk.below))).toBe(before);
  await execute('rm', [join(mount, 'ballast')]);
  await finish(merge); // goes on where it failed
  await merge.abort();
  const chain = await bare.merge(disk.chain, 0, 2);
  expect(hash(await bare.image(chain.slice(0, 1)))).toBe(before);
  await disk.close();
  await bare.store.close();
});

test('pages that all slices on one cover are punched out of it, and only those', async () => {
  const bare = await Bare.make(BYTES);
  const root = await bare.disk();
  await root.write(0, 1, 200);
  const { chain } = await root.fork();
  const [slice] = chain as [SliceRef];
  const clone = await bare.disk(chain);
  await root.write(0, 2, 100);
  await clone.write(50, 3, 100);
  const children = [root, clone].map((disk) => disk.chain.at(-1) as SliceRef);
  const punch = async (of: SliceRef[]) => {
    const begun = await bare.store.punchBegin({ slice, children: of, sizeBytes: BYTES });
    return finish(begun);
  };
  const reads = async () =>
    hash(
      Buffer.concat([
        await (await root.client()).read(0, BYTES),
        await (await clone.client()).read(0, BYTES),
      ]),
    );
  const before = await reads();
  expect(await codeOf(punch([children[0] as SliceRef]))).toBe('E_STATE');
  // What the tops have is not durable: nothing may go.
  expect(await punch(children)).toBe(0);
  await root.native.settle();
  expect(await punch(children)).toBe(0);
  await clone.native.settle();
  const allocatedBytes = await bare.allocated(slice);
  expect(await punch(children)).toBe(50 * PAGE);
  expect(await bare.allocated(slice)).toBe(allocatedBytes - 50 * PAGE);
  expect(await punch(children)).toBe(0);
  expect(await reads()).toBe(before);
});

test('a chain of 1,000 slices: opened, forked, and merged in one go', async () => {
  const depth = 1000;
  const bare = await Bare.make(8 * 2 ** 30);
  const disk = await bare.disk();
  const client = await disk.client();
  const rand = random(newSeed('deep'));
  const pages = bare.sizeBytes / PAGE;
  const last = new Map<number, number>();
  const forks: number[] = [];
  for (let i = 0; i < depth; i++) {
    for (let j = 0; j < 4; j++) {
      const page = rand() < 0.5 ? Math.floor(rand() * 500) : Math.floor(rand() * pages);
      last.set(page, 1 + (i % 255));
      await client.write(page * PAGE, Buffer.alloc(PAGE, 1 + (i % 255)));
    }
    forks.push((await disk.fork(i % 10 === 9)).durationUs);
  }
  const check = async (of: BareDisk) => {
    const read = await of.client();
    for (const [page, value] of last) expect((await read.read(page * PAGE, 1))[0]).toBe(value);
  };
  await check(disk);
  await disk.close();
  await bare.reopen();
  const started = performance.now();
  const again = await bare.openDisk(disk.chain);
  const open_ms = performance.now() - started;
  expect(again.native.info().depth).toBe(depth + 1);
  await check(again);
  const { indexBytes } = again.native.info();
  const merging = performance.now();
  again.chain = await bare.merge(again.chain, 0, depth);
  const merge_ms = performance.now() - merging;
  expect(again.native.info().depth).toBe(2);
  await check(again);
  forks.sort((a, b) => a - b);
  console.log(
    `depth ${depth}: fork p50 ${forks[depth / 2]?.toFixed(1)} us, p99 ${forks[depth * 0.99]?.toFixed(1)} us; ` +
      `open ${open_ms.toFixed(0)} ms; index ${indexBytes} bytes for ${last.size} pages; merge ${merge_ms.toFixed(0)} ms`,
  );
}, 120_000);

import { cp, readdir, readFile, unlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import {
  connectTo,
  contents,
  newDisk,
  newGeneration,
  newSeed,
  openDisk,
  PAGE,
  random,
  serveInChild,
  strace,
  temporary,
} from '../blktap/support.js';

const PAGES = 256;
const BYTES = PAGES * PAGE;

async function newFolder(): Promise<{ directory: string; socketPath: string }> {
  const folder = await temporary();
  const directory = join(folder, 'disk');
  await Disk.create(directory, { sizeBytes: BYTES });
  return { directory, socketPath: join(folder, 'nbd') };
}

test('what was acknowledged is there after SIGKILL under load, flushed or not', async () => {
  const rand = random(newSeed('kill'));
  const { directory, socketPath } = await newFolder();
  const acknowledged = new Map<number, Set<number>>(); // page -> values it may have
  const generations: string[] = [];
  for (let round = 0; round < 3; round++) {
    const child = await serveInChild(directory, socketPath);
    expect(child.generations.slice(0, generations.length)).toEqual(generations);
    const client = await connectTo(socketPath);
    for (let page = 0; page < PAGES; page++) {
      const value = (await client.read(page * PAGE, PAGE))[0] as number;
      const allowed = acknowledged.get(page) ?? new Set([0]);
      expect(allowed, `round ${round}, page ${page}`).toContain(value);
      acknowledged.set(page, new Set([value]));
    }
    let acks = 0;
    const writer = async (first: number) => {
      for (let i = 0; ; i++) {
        const page = first + 4 * Math.floor(rand() * (PAGES / 4));
        const value = Math.floor(rand() * 256);
        const old = acknowledged.get(page) ?? new Set([0]);
        acknowledged.set(page, new Set([...old, value])); // under way: either
        if (rand() < 0.2) await client.zero(page * PAGE, PAGE).then(() => undefined);
        await client.write(page * PAGE, Buffer.alloc(PAGE, value));
        acknowledged.set(page, new Set([value]));
        acks++;
        if (i % 20 === 0) await client.flush();
      }
    };
    const zeroAllowed = () => {
      for (const allowed of acknowledged.values()) if (allowed.size > 1) allowed.add(0);
    };
    const writers = [0, 1, 2, 3].map((first) => writer(first).catch(() => undefined));
    while (acks < 200) await Promise.race([client.flush(), ...writers]);
    const generation = newGeneration();
    await child.fork(generation);
    generations.push(generation);
    const target = acks + 100;
    while (acks < target) await client.flush();
    if (round % 2 === 0) child.forkWithoutWaiting(newGeneration());
    await child.kill();
    await Promise.all(writers);
    zeroAllowed();
    if (round % 2 === 0) {
      // The last fork happened or not; either way the disk opens.
      const disk = await openDisk(directory);
      const found = disk.info().generations;
      expect(found.slice(0, generations.length)).toEqual(generations);
      generations.splice(0, generations.length, ...found);
      await disk.close();
    }
  }
});

test('a fork just made survives SIGKILL, with all its pages', async () => {
  const { directory, socketPath } = await newFolder();
  const child = await serveInChild(directory, socketPath);
  const client = await connectTo(socketPath);
  const generation = newGeneration();
  await client.write(0, Buffer.alloc(3 * PAGE, 1));
  await child.fork(generation);
  await client.write(PAGE, Buffer.alloc(PAGE, 2));
  await child.kill();
  const disk = await openDisk(directory);
  expect(disk.info().generations).toEqual([generation]);
  const image = contents(await disk.provider(generation), PAGES);
  expect(image.subarray(0, 3 * PAGE)).toEqual(Buffer.alloc(3 * PAGE, 1));
  await disk.fork(newGeneration());
  const after = contents(await disk.provider(disk.info().generations[1] ?? ''), PAGES);
  expect(after[PAGE]).toBe(2);
  expect(after[2 * PAGE]).toBe(1);
});

/** The folder as another boot would find it: live maps gone, unsynced pages old or new. */
async function powerCut(now: string, flushed: string, rand: () => number): Promise<string> {
  const cut = join(await temporary(), 'cut');
  await cp(now, cut, { recursive: true });
  for (const name of await readdir(cut)) {
    if (name.endsWith('.live')) {
      await unlink(join(cut, name));
    } else if (name.endsWith('.data')) {
      const data = await readFile(join(cut, name));
      const old = await readFile(join(flushed, name)).catch(() => Buffer.alloc(BYTES));
      for (let at = 0; at < BYTES; at += PAGE) {
        if (rand() < 0.5) old.copy(data, at, at, at + PAGE);
      }
      await writeFile(join(cut, name), data);
    }
  }
  return cut;
}

test('after a power cut each page is what was flushed or what was written since', async () => {
  const rand = random(newSeed('power cut'));
  for (let round = 0; round < 6; round++) {
    const { directory, socketPath, disk } = await newDisk(BYTES);
    const client = await connectTo(socketPath);
    const may = Array.from({ length: PAGES }, () => [0]);
    const generations = new Map<string, number[]>();
    const work = async (steps: number) => {
      for (let i = 0; i < steps; i++) {
        const page = Math.floor(rand() * PAGES);
        const value = Math.floor(rand() * 256);
        if (rand() < 0.25) {
          await client.trim(page * PAGE, PAGE);
          may[page]?.push(0);
        } else {
          await client.write(page * PAGE, Buffer.alloc(PAGE, value));
          may[page]?.push(value);
        }
      }
    };
    for (let forks = 0; forks < round % 3; forks++) {
      await work(100);
      const generation = newGeneration();
      generations.set(
        generation,
        may.map((values) => values.at(-1) as number),
      );
      await disk.fork(generation);
    }
    await work(200);
    await client.flush();
    await disk.prepareFork();
    for (const values of may) values.splice(0, values.length - 1);
    const flushed = join(await temporary(), 'flushed');
    await cp(directory, flushed, { recursive: true });
    await work(300);
    const cut = await powerCut(directory, flushed, rand);
    const after = await openDisk(cut);
    expect(after.info().generations).toEqual([...generations.keys()]);
    const view = newGeneration();
    await after.fork(view);
    const image = contents(await after.provider(view), PAGES);
    for (let page = 0; page < PAGES; page++) {
      const data = image.subarray(page * PAGE, (page + 1) * PAGE);
      expect(may[page], `round ${round}, page ${page}`).toContain(data[0]);
      expect(data.equals(Buffer.alloc(PAGE, data[0]))).toBe(true);
    }
    for (const [generation, values] of generations) {
      const of = contents(await after.provider(generation), PAGES);
      expect(values.map((_, page) => of[page * PAGE])).toEqual(values);
    }
    await after.close();
    await disk.close();
  }
});

test('power cut right after a fork: the generation is whole or was never made', async () => {
  const rand = random(newSeed('fork cut'));
  for (const flushAfter of [false, true]) {
    const { directory, socketPath } = await newFolder();
    const child = await serveInChild(directory, socketPath);
    const client = await connectTo(socketPath);
    await client.write(0, Buffer.alloc(10 * PAGE, 1));
    await client.flush();
    const flushed = join(await temporary(), 'flushed');
    await cp(directory, flushed, { recursive: true });
    await client.write(5 * PAGE, Buffer.alloc(10 * PAGE, 2));
    const generation = newGeneration();
    child.forkWithoutWaiting(generation);
    if (flushAfter) {
      await client.write(0, Buffer.alloc(PAGE, 3));
      await client.flush();
    }
    await child.kill();
    // Everything is on the device here; a cut before that is the other tests' matter.
    const cut = await powerCut(directory, flushAfter ? directory : flushed, rand);
    const disk = await openDisk(cut);
    const found = disk.info().generations;
    if (found.length > 0) {
      expect(found).toEqual([generation]);
      const image = contents(await disk.provider(generation), PAGES);
      expect(image.subarray(PAGE, 5 * PAGE)).toEqual(Buffer.alloc(4 * PAGE, 1));
      // Durable as a generation: its own unflushed pages were synced first.
      if (flushAfter) {
        expect(image.subarray(5 * PAGE, 15 * PAGE)).toEqual(Buffer.alloc(10 * PAGE, 2));
      }
    }
    const view = newGeneration();
    await disk.fork(view);
    const top = contents(await disk.provider(view), PAGES);
    if (flushAfter) expect(top[0]).toBe(3);
    expect(top.subarray(PAGE, 5 * PAGE)).toEqual(Buffer.alloc(4 * PAGE, 1));
  }
});

test('killed at each sync of a fork, then a power cut: the disk opens, the generation is whole', async () => {
  const never = () => 1; // everything written is on the device
  const outcomes = new Set<number>();
  let kills = 0;
  for (let sync = 1; sync <= 5; sync++) {
    const { directory, socketPath, disk } = await newDisk(BYTES);
    const first = await connectTo(socketPath);
    await first.write(0, Buffer.alloc(10 * PAGE, 1));
    await first.close();
    await disk.close();
    const kill = `inject=fdatasync:signal=KILL:when=${sync}`;
    const child = await serveInChild(directory, socketPath);
    await strace(child.pid, ['-e', 'trace=fdatasync', '-e', kill, '-o', '/dev/null']);
    const client = await connectTo(socketPath);
    await client.write(5 * PAGE, Buffer.alloc(10 * PAGE, 2));
    const generation = newGeneration();
    child.forkWithoutWaiting(generation);
    if ((await child.end()) === 'SIGKILL') kills++;
    const after = await openDisk(await powerCut(directory, directory, never));
    const found = after.info().generations;
    outcomes.add(found.length);
    const view = newGeneration();
    await after.fork(view);
    for (const each of [...found, view]) {
      const image = contents(await after.provider(each), PAGES);
      expect(image.subarray(0, 5 * PAGE)).toEqual(Buffer.alloc(5 * PAGE, 1));
      if (each !== generation) continue;
      expect(image.subarray(5 * PAGE, 15 * PAGE)).toEqual(Buffer.alloc(10 * PAGE, 2));
    }
    expect(found.filter((each) => each !== generation)).toEqual([]);
  }
  expect(kills).toBe(5); // data and map of both slices, and the sealed header
  expect(outcomes).toEqual(new Set([0, 1])); // both sides of the instant were seen
});

test('a bit reaches the map only after its page is synced, and before the reply', async () => {
  const { directory, socketPath } = await newFolder();
  const log = join(await temporary(), 'trace');
  const calls = 'trace=pwrite64,pwritev,fdatasync,fsync';
  const child = await serveInChild(directory, socketPath);
  const tracer = await strace(child.pid, ['-y', '-e', calls, '-o', log]);
  const client = await connectTo(socketPath);
  for (let i = 0; i < 10; i++) {
    await client.write(i * 20 * PAGE, Buffer.alloc(PAGE, 1));
    if (i % 2 === 0) await client.flush();
    else await client.write(i * 20 * PAGE, Buffer.alloc(512, 2), 1); // FUA
    if (i === 5) await child.fork(newGeneration());
  }
  await client.close();
  await child.end();
  await tracer.ended;
  const unsynced = new Map<string, boolean>(); // slice -> data written since its last sync
  const mapDirty = new Map<string, boolean>();
  let maps = 0;
  for (const line of (await readFile(log, 'utf8')).split('\n')) {
    const call = /(pwrite64|pwritev|fdatasync|fsync)\(\d+<.*\/([0-9a-f]{32})\.(?:\d+\.)?(\w+)/.exec(
      line,
    );
    if (call === null) continue;
    const [, name, slice = '', kind] = call;
    if (line.includes('resumed')) continue;
    if (kind === 'data') unsynced.set(slice, name?.startsWith('pwrite') === true);
    if (kind === 'map' && name === 'pwrite64') throw new Error('pwritev expected');
    if (kind === 'map' && name === 'pwritev') {
      maps++;
      // At offset 0 is the header, which holds no bits: after a fork that of the new slice becomes
      // durable while the first pages are written.
      const header = /\], \d+, 0(?:\)| <)/.test(line);
      if (!header) expect(unsynced.get(slice) ?? false, line).toBe(false);
    }
    if (kind === 'map') mapDirty.set(slice, name === 'pwritev');
  }
  expect(maps).toBeGreaterThan(10);
  expect([...mapDirty.values()]).not.toContain(true);
});

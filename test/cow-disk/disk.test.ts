import { readdir, readFile, stat, truncate, unlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { asSnowflockError } from '../../src/common/errors.js';
import { Disk } from '../../src/cow-disk/disk.js';
import { addon } from '../../src/cow-disk/native.js';
import { Store } from '../../src/cow-disk/store.js';
import {
  codeOf,
  connectTo,
  contents,
  execute,
  newDisk,
  newGeneration,
  openDisk,
  PAGE,
  temporary,
} from '../blktap/support.js';

const MIB = 2 ** 20;

test('a new disk reads as zeros and takes no space', async () => {
  const { directory, disk } = await newDisk(8 * 2 ** 30);
  const generation = newGeneration();
  await disk.fork(generation);
  expect(addon().readPage(await disk.provider(generation), 2 ** 21 - 1)).toEqual(
    Buffer.alloc(PAGE),
  );
  await disk.close();
  const { stdout } = await execute('du', ['-sk', directory]);
  expect(Number.parseInt(stdout, 10)).toBeLessThan(1024);
});

test('a generation keeps its pages while the disk goes on, and after reopening', async () => {
  const { directory, socketPath, disk } = await newDisk(MIB);
  const client = await connectTo(socketPath);
  const [first, second] = [newGeneration(), newGeneration()];
  await client.write(0, Buffer.alloc(2 * PAGE, 1));
  const fork = await disk.fork(first);
  expect(fork.generation).toBe(first);
  await client.write(PAGE, Buffer.alloc(2 * PAGE, 2));
  await client.zero(0, PAGE);
  await disk.fork(second);
  await client.write(0, Buffer.alloc(MIB, 3));
  const expected = (one: number, two: number, three: number) =>
    Buffer.concat([
      Buffer.alloc(PAGE, one),
      Buffer.alloc(PAGE, two),
      Buffer.alloc(PAGE, three),
      Buffer.alloc(MIB - 3 * PAGE),
    ]);
  const check = async (of: Disk) => {
    expect(contents(await of.provider(first), 256).equals(expected(1, 1, 0))).toBe(true);
    expect(contents(await of.provider(second), 256).equals(expected(0, 2, 2))).toBe(true);
  };
  await check(disk);
  const held = await disk.provider(first);
  await disk.close();
  expect(contents(held, 256).equals(expected(1, 1, 0))).toBe(true);
  const again = await openDisk(directory);
  await check(again);
  expect(again.info().generations).toEqual([first, second]);
  expect(again.info().slices.map((slice) => slice.state)).toEqual(['sealed', 'sealed', 'open']);
});

test('a dropped generation is gone and its slice remembered as unreferenced', async () => {
  const { directory, disk: made } = await newDisk(MIB);
  await made.close();
  // Without clean-up in the background, which may have removed the slice already.
  const open = async () =>
    (await Store.open(directory, { gc_bytes_per_s: 0, closeWithDisk: true })).openDisk('disk');
  const disk = await open();
  const [first, second] = [newGeneration(), newGeneration()];
  await disk.fork(first);
  await disk.fork(second);
  await disk.dropGeneration(first);
  expect(await codeOf(disk.dropGeneration(first))).toBe('E_NOT_FOUND');
  expect(await codeOf(disk.provider(first))).toBe('E_NOT_FOUND');
  await disk.close();
  const again = await open();
  expect(again.info().generations).toEqual([second]);
  expect(again.info().slices.map((slice) => slice.referenced)).toEqual([false, true, true]);
  await again.close();
});

test('bad arguments are refused and leave nothing behind', async () => {
  const folder = await temporary();
  const directory = join(folder, 'disk');
  expect(await codeOf(Disk.create(directory, { sizeBytes: 0 }))).toBe('E_ARGUMENT');
  expect(await codeOf(Disk.create(directory, { sizeBytes: 2 ** 47 }))).toBe('E_ARGUMENT');
  const image = { kind: 'image', path: join(folder, 'none') } as const;
  expect(await codeOf(Disk.create(directory, { sizeBytes: MIB, base: image }))).toBe(
    'E_IMAGE_UNKNOWN',
  );
  expect(await readdir(folder)).toEqual([]);
  expect(await codeOf(Disk.open(directory))).toBe('E_NOT_FOUND');
  await Disk.create(directory, { sizeBytes: MIB });
  expect(await codeOf(Disk.create(directory, { sizeBytes: MIB }))).toBe('E_EXISTS');
  const disk = await openDisk(directory);
  expect(await codeOf(disk.fork('../../etc'))).toBe('E_ARGUMENT');
  expect(await codeOf(disk.serve({ socketPath: join(folder, 'x'.repeat(200)) }))).toBe(
    'E_ARGUMENT',
  );
  await disk.close();
  expect(await codeOf((async () => disk.flush())())).toBe('E_CLOSED');
});

test('a disk has one owner', async () => {
  const { directory, socketPath, disk } = await newDisk(MIB);
  expect(await codeOf(Disk.open(directory))).toBe('E_IN_USE');
  const other = join(await temporary(), 'other');
  await Disk.create(other, { sizeBytes: MIB });
  const second = await openDisk(other);
  expect(await codeOf(second.serve({ socketPath }))).toBe('E_IN_USE');
  await disk.close();
  await openDisk(directory);
});

test('the socket gets its owner and mode', async () => {
  const { folder, disk } = await newDisk(MIB);
  const socketPath = join(folder, 'owned');
  await disk.serve({ socketPath, uid: 65534, gid: 65534, mode: 0o660 });
  const found = await stat(socketPath);
  expect([found.uid, found.gid, found.mode & 0o777]).toEqual([65534, 65534, 0o660]);
});

/** A disk with two slices and some pages, closed; its slice ids, oldest first. */
async function closedDisk(): Promise<{ directory: string; slices: string[] }> {
  const { directory, socketPath, disk } = await newDisk(MIB);
  const client = await connectTo(socketPath);
  await client.write(0, Buffer.alloc(PAGE, 7));
  await disk.fork(newGeneration());
  await client.write(PAGE, Buffer.alloc(PAGE, 8));
  await client.close();
  const slices = disk.info().slices.map((slice) => slice.id);
  await disk.close();
  return { directory, slices };
}

async function alter(path: string, offset: number, value?: number): Promise<void> {
  const data = await readFile(path);
  data[offset] = value ?? (data[offset] ?? 0) ^ 0x10;
  await writeFile(path, data);
}

const damages: [string, (directory: string, slices: string[]) => Promise<unknown>][] = [
  ['journal cut short', (d) => truncate(join(d, 'store.journal'), 50)],
  ['journal altered', (d) => alter(join(d, 'store.journal'), 60)],
  ['journal empty', (d) => writeFile(join(d, 'store.journal'), '')],
  [
    'journal of another kind',
    (d) => writeFile(join(d, 'store.journal'), '12345678 {"format":"x"}\n'),
  ],
  ['sealed header altered', (d, s) => alter(join(d, `${s[0]}.0.map`), 20)],
  ['sealed header wiped', (d, s) => truncate(join(d, `${s[0]}.0.map`), 0)],
  ['sealed map altered', (d, s) => alter(join(d, `${s[0]}.0.map`), 4096, 2)],
  ['sealed data cut short', (d, s) => truncate(join(d, `${s[0]}.data`), MIB - 1)],
  ['data missing', (d, s) => unlink(join(d, `${s[0]}.data`))],
  ['map missing', (d, s) => unlink(join(d, `${s[1]}.0.map`))],
  ['open header altered', (d, s) => alter(join(d, `${s[1]}.0.map`), 100)],
  [
    'impossible page state',
    async (d, s) => {
      const live = (await readdir(d)).find((n) => n.startsWith(`${s[1]}.`) && n.endsWith('.live'));
      await alter(join(d, live ?? ''), 4096, 3);
    },
  ],
];

for (const [name, damage] of damages) {
  test(`damage is noticed when the disk is opened: ${name}`, async () => {
    const { directory, slices } = await closedDisk();
    await damage(directory, slices);
    expect(await codeOf(Disk.open(directory))).toBe('E_CORRUPT');
  });
}

test('a base image is read, never written, and may end inside a page', async () => {
  const folder = await temporary();
  const path = join(folder, 'image');
  const image = Buffer.alloc(5 * PAGE + 100, 0x5a);
  image.fill(0, PAGE, 2 * PAGE);
  await writeFile(path, image);
  const base = { kind: 'image', path } as const;
  const { directory, socketPath, disk } = await newDisk(MIB, { base });
  const client = await connectTo(socketPath);
  expect((await client.read(0, MIB)).subarray(0, image.length).equals(image)).toBe(true);
  expect(await client.read(image.length, PAGE)).toEqual(Buffer.alloc(PAGE));
  await client.write(5 * PAGE + 90, Buffer.alloc(20, 1));
  const page = (await client.read(5 * PAGE, PAGE)).subarray(0, 120);
  expect(page).toEqual(
    Buffer.concat([Buffer.alloc(90, 0x5a), Buffer.alloc(20, 1), Buffer.alloc(10)]),
  );
  expect((await readFile(path)).equals(image)).toBe(true);
  await disk.close();
  await truncate(path, 100);
  expect(await codeOf(Disk.open(directory))).toBe('E_CORRUPT');
});

test('a full file system is ENOSPC to the client, and the disk goes on', async () => {
  const folder = await temporary();
  await execute('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder]);
  try {
    const directory = join(folder, 'disk');
    await Disk.create(directory, { sizeBytes: 64 * MIB });
    const disk = await Disk.open(directory);
    try {
      const socketPath = join(folder, 'nbd');
      await disk.serve({ socketPath });
      const client = await connectTo(socketPath);
      await client.write(0, Buffer.alloc(64 * 1024, 1));
      const write = client.write(MIB, Buffer.alloc(4 * MIB, 2));
      await expect(write).rejects.toMatchObject({ errno: 28 });
      expect(disk.stats().noSpaceErrors).toBeGreaterThan(0);
      expect(await client.read(0, 64 * 1024)).toEqual(Buffer.alloc(64 * 1024, 1));
      await client.write(PAGE, Buffer.alloc(PAGE, 3));
      await client.flush();
      await client.close();
    } finally {
      await disk.close().catch((error: unknown) => {
        expect(asSnowflockError(error).code).toBe('E_NO_SPACE');
      });
    }
  } finally {
    await execute('umount', [folder]);
  }
});

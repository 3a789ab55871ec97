import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import {
  chmod,
  chown,
  link,
  mkdir,
  open,
  readdir,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { exportDisk } from '../../src/cow-disk/export.js';
import { type ImportRequest, importDisk } from '../../src/cow-disk/import.js';
import { Store } from '../../src/cow-disk/store.js';
import { StoreServer } from '../../src/disk-server/store-server.js';
import { cleanup, codeOf, execute, temporary } from '../blktap/support.js';

const MIB = 2 ** 20;

async function newStore(): Promise<{ folder: string; store: StoreServer }> {
  const folder = await temporary();
  await Store.create(join(folder, 's'));
  const store = await StoreServer.open(join(folder, 's'));
  cleanup(() => store.close());
  return { folder, store };
}

/** 32 MiB and a byte, with three patches of data: the rest is a hole. */
async function sparseFile(path: string): Promise<void> {
  const file = await open(path, 'w');
  await file.truncate(32 * MIB + 1);
  await file.write(Buffer.alloc(64 * 1024, 'first'), 0, null, 0);
  await file.write(Buffer.from('in the middle'), 0, null, 5_000_001);
  await file.write(Buffer.from('!'), 0, null, 32 * MIB);
  await file.close();
}

async function allocated(path: string): Promise<number> {
  const found = await stat(path);
  if (found.isFile()) return found.blocks * 512;
  const names = await readdir(path);
  const bytes = await Promise.all(names.map((name) => allocated(join(path, name))));
  return bytes.reduce((sum, one) => sum + one, 0);
}

/** What a store takes once nothing is cleaned up any more. */
async function taken(store: StoreServer): Promise<number> {
  await store.settled();
  return allocated(store.directory);
}

const out = (store: StoreServer, file: string, more: object = {}) =>
  exportDisk(store, { disk: 'web', generation: null, file, format: 'raw', ...more });

test('a raw file of any length comes back as it was, holes as holes', async () => {
  const { folder, store } = await newStore();
  const [source, back] = [join(folder, 'source'), join(folder, 'back')];
  await sparseFile(source);
  const made = await importDisk(store, { source, name: 'web' });
  expect(made).toMatchObject({ name: 'web', size_bytes: 32 * MIB + 1, depth: 1 });
  expect(await taken(store)).toBeLessThan(2 * MIB);
  expect(await out(store, back)).toEqual({ size_bytes: 32 * MIB + 1 });
  await execute('cmp', [source, back]);
  expect(await allocated(back)).toBeLessThan(2 * (await allocated(source)));
  // The passing generation of the export is gone.
  expect((await store.list()).generations).toEqual([]);
});

test.each(['qcow2', 'vmdk', 'vhdx'] as const)(
  '%s in and out, judged by qemu-img',
  async (format) => {
    const { folder, store } = await newStore();
    const [source, back] = [join(folder, `source.${format}`), join(folder, `back.${format}`)];
    await execute('qemu-img', ['create', '-q', '-f', format, source, '64M']);
    const patterns = ['write -P 17 1M 300k', 'write -P 18 63M 1M', 'write -z 2M 1M'];
    const commands = patterns.flatMap((command) => ['-c', command]);
    await execute('qemu-io', ['-f', format, ...commands, source]);
    await importDisk(store, { source, name: 'web' });
    expect(await taken(store)).toBeLessThan(4 * MIB);
    await out(store, back, { format });
    await execute('qemu-img', ['compare', '-f', format, '-F', format, source, back]);
    if (format !== 'vmdk') await execute('qemu-img', ['check', '-f', format, back]);
  },
);

test('imports and exports, by nbdcopy and by qemu-img, tell how far they are', async () => {
  const { folder, store } = await newStore();
  const source = join(folder, 'source');
  await writeFile(source, randomBytes(32 * MIB));
  const told = async (work: (progress: (share: number) => void) => Promise<unknown>) => {
    const shares: number[] = [];
    await work((share) => shares.push(share));
    expect(shares).toEqual([...shares].sort((a, b) => a - b));
    expect(shares.at(-1)).toBe(1);
    return shares.length;
  };
  const image = join(folder, 'image.qcow2');
  await told((progress) => importDisk(store, { source, name: 'web', progress }));
  await told((progress) => out(store, join(folder, 'back'), { progress }));
  // nbdcopy tells after every 128 MiB and at the end, qemu-img more often.
  const often = await told((progress) => out(store, image, { format: 'qcow2', progress }));
  expect(often).toBeGreaterThan(2);
  await told((progress) => importDisk(store, { source: image, name: 'again', progress }));
});

test('a generation is exported, not what was written since', async () => {
  const { folder, store } = await newStore();
  const source = join(folder, 'source');
  await sparseFile(source);
  await importDisk(store, { source, name: 'web' });
  await store.snapshot({ disk: 'web', name: 'then' });
  await store.clone({ disk: 'web', generation: 'then', name: 'other' });
  await out(store, join(folder, 'back'), { generation: 'then' });
  await execute('cmp', [source, join(folder, 'back')]);
  expect(await codeOf(out(store, join(folder, 'none'), { generation: 'never' }))).toBe(
    'E_NOT_FOUND',
  );
  expect(existsSync(join(folder, 'none'))).toBe(false);
});

test('an existing file is replaced only if that is said', async () => {
  const { folder, store } = await newStore();
  const [source, back] = [join(folder, 'source'), join(folder, 'back')];
  await sparseFile(source);
  await importDisk(store, { source, name: 'web' });
  await writeFile(back, 'mine');
  expect(await codeOf(out(store, back))).toBe('E_EXISTS');
  expect((await stat(back)).size).toBe(4);
  await out(store, back, { force: true });
  await execute('cmp', [source, back]);
  expect(readdirSync(folder).sort()).toEqual(['back', 's', 'source']);
});

/** A tree with what a root file system has: owners, modes, links, a device. */
async function rootTree(tree: string): Promise<void> {
  await mkdir(join(tree, 'etc'), { recursive: true });
  await writeFile(join(tree, 'etc/motd'), 'hello\n');
  await chown(join(tree, 'etc/motd'), 12, 34);
  await chmod(join(tree, 'etc/motd'), 0o4751);
  await link(join(tree, 'etc/motd'), join(tree, 'etc/hard'));
  await symlink('motd', join(tree, 'etc/soft'));
  await execute('mknod', [join(tree, 'null'), 'c', '1', '3']);
  await chown(tree, 5, 6);
  await chmod(tree, 0o711);
}

/** What e2fsck and debugfs say of an exported file system. */
async function judge(file: string): Promise<{ root: string; etc: string[]; motd: string }> {
  await execute('e2fsck', ['-f', '-n', file]);
  const debugfs = async (command: string) =>
    (await execute('debugfs', ['-R', command, file])).stdout;
  return {
    root: await debugfs('stat /'),
    etc: (await debugfs('ls -p /etc')).split('\n').filter((line) => /motd|hard|soft/.test(line)),
    motd: await debugfs('cat /etc/motd'),
  };
}

test.each(['folder', 'tar', 'tar.gz', 'tar.zst'])(
  'a root file system from a %s keeps owners, modes and links',
  async (kind) => {
    const { folder, store } = await newStore();
    const tree = join(folder, 'tree');
    await rootTree(tree);
    const source = kind === 'folder' ? tree : join(folder, `root.${kind}`);
    if (kind !== 'folder') {
      await execute('tar', ['--create', '--auto-compress', '--file', source, '-C', tree, '.']);
    }
    await importDisk(store, { source, name: 'web' });
    await out(store, join(folder, 'back'));
    const { root, etc, motd } = await judge(join(folder, 'back'));
    expect(motd).toBe('hello\n');
    expect(root).toMatch(/Mode:\s+0711/);
    expect(root).toMatch(/User:\s+5\s+Group:\s+6/);
    const fields = new Map(
      etc.map((line) => {
        const [inode, mode, uid, gid, name] = line.split('/').slice(1);
        return [name, { inode, mode, uid, gid }];
      }),
    );
    expect(fields.get('motd')).toMatchObject({ mode: '104751', uid: '12', gid: '34' });
    expect(fields.get('hard')?.inode).toBe(fields.get('motd')?.inode);
    expect(fields.get('soft')?.mode).toBe('120777');
    expect(await taken(store)).toBeLessThan(8 * MIB);
  },
);

test.each([32, 2, 1])(
  'a root file system that does not fit into %i MiB leaves nothing',
  async (mib) => {
    const { folder, store } = await newStore();
    const tree = join(folder, 'tree');
    await mkdir(tree);
    await writeFile(join(tree, 'large'), Buffer.alloc(40 * MIB, 1));
    const request = { source: tree, name: 'web', sizeBytes: mib * MIB };
    expect(await codeOf(importDisk(store, request))).toBe('E_NO_SPACE');
    expect((await store.list()).disks).toEqual([]);
  },
);

test('an image that reads other files of the host is refused unless it is trusted', async () => {
  const { folder, store } = await newStore();
  const secret = join(folder, 'secret');
  await writeFile(secret, Buffer.alloc(MIB, 'secret'));
  const outside = await temporary();
  const source = join(outside, 'innocent.qcow2');
  await execute('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', secret, source]);
  expect(await codeOf(importDisk(store, { source, name: 'web' }))).toBe('E_ARGUMENT');
  expect((await store.list()).disks).toEqual([]);
  await importDisk(store, { source, name: 'web', allowBacking: true });
  await out(store, join(folder, 'back'));
  await execute('cmp', [secret, join(folder, 'back')]);
});

test.each<[string, Partial<ImportRequest>, string]>([
  ['missing', { source: '/nonexistent/image' }, 'E_NOT_FOUND'],
  ['smaller than its --size', { sizeBytes: MIB }, 'E_ARGUMENT'],
  ['of another format than said', { format: 'vhdx' }, 'E_ARGUMENT'],
  ['imported under a name that exists', { name: 'there' }, 'E_EXISTS'],
])('a source that is %s: %s', async (_what, change, code) => {
  const { folder, store } = await newStore();
  await store.createDisk({ name: 'there', size_bytes: MIB });
  const source = join(folder, 'source');
  await sparseFile(source);
  expect(await codeOf(importDisk(store, { source, name: 'web', ...change }))).toBe(code);
  expect((await store.list()).disks.map((disk) => disk.name)).toEqual(['there']);
});

test('an export that is interrupted leaves no file and no generation', async () => {
  const { folder, store } = await newStore();
  const source = join(folder, 'source');
  await sparseFile(source);
  await importDisk(store, { source, name: 'web' });
  const controller = new AbortController();
  const work = out(store, join(folder, 'back'), {
    format: 'qcow2',
    signal: controller.signal,
    progress: () => controller.abort(),
  });
  expect(await codeOf(work)).toBe('E_INTERRUPTED');
  expect(readdirSync(folder).sort()).toEqual(['s', 'source']);
  expect((await store.list()).generations).toEqual([]);
});

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { exportGeneration, serveGeneration } from '../../src/disk-server/disk-server.js';
import {
  allocatedBytes,
  cleanup,
  connectTo,
  contents,
  execute,
  newDisk,
  newGeneration,
  newSeed,
  serveInChild,
  temporary,
  uri,
} from './support.js';

const MIB = 2 ** 20;

test('nbdinfo lists the export and its capabilities', async () => {
  const { socketPath } = await newDisk(64 * MIB);
  const { stdout } = await execute('nbdinfo', ['--json', '--list', uri(socketPath, '')]);
  const [found] = (JSON.parse(stdout) as { exports: Record<string, unknown>[] }).exports;
  expect(found).toMatchObject({
    'export-name': 'disk',
    'export-size': 64 * MIB,
    contexts: ['base:allocation', 'qemu:allocation-depth'],
    can_cache: true,
    can_fast_zero: true,
    is_read_only: false,
    can_df: true,
    can_flush: true,
    can_fua: true,
    can_multi_conn: true,
    can_trim: true,
    can_zero: true,
    block_size_minimum: 1,
    block_size_maximum: 32 * MIB,
  });
  await expect(execute('nbdinfo', [uri(socketPath, 'other')])).rejects.toThrow();
});

test('qemu-io patterns of any alignment read back', async () => {
  const { socketPath } = await newDisk(64 * MIB);
  const commands = [
    'write -P 0xab 0 1M',
    'write -P 0xcd 513 2000',
    'read -P 0xab 0 513',
    'read -P 0xcd 513 2000',
    'read -P 0xab 2513 8192',
    'write -P 0x11 1048575 33554432',
    'read -P 0x11 1048575 33554432',
    'write -z 5000 20000',
    'read -P 0 5000 20000',
    'write -f -P 0x22 12288 4096',
    'discard 1M 4M',
    'read -P 0 1M 4M',
    'read -P 0x22 12288 4096',
    'flush',
  ];
  const { stdout } = await execute('qemu-io', [
    '-f',
    'raw',
    ...commands.flatMap((command) => ['-c', command]),
    uri(socketPath),
  ]);
  expect(stdout).not.toMatch(/fail|error/i);
  expect(stdout.match(/^(wrote|read|discard) /gm)?.length).toBe(commands.length - 1);
});

test('nbdcopy in and out of four connections gives the same bytes', async () => {
  const { folder, directory, socketPath } = await newDisk(128 * MIB);
  const seed = newSeed('nbdcopy');
  // nbdkit makes up the data, and verifies what is written back to it.
  const plugin = `[ nbdkit sparse-random size=${128 * MIB} percent=20 seed=${seed} ]`.split(' ');
  await execute('nbdcopy', ['--connections=4', ...plugin, uri(socketPath)]);
  await execute('nbdcopy', ['--connections=4', uri(socketPath), ...plugin]);
  const raw = join(folder, 'raw');
  await execute('nbdcopy', [uri(socketPath), raw]);
  await execute('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', raw, uri(socketPath)]);
  expect(await allocatedBytes(directory)).toBeLessThan(112 * MIB); // holes stay holes; how many differs by the seed
});

test('an ext4 image copied in checks clean, and so does a generation of it after it was replaced', async () => {
  const { folder, socketPath, disk } = await newDisk(64 * MIB);
  const tree = join(folder, 'tree');
  await mkdir(tree);
  for (let i = 0; i < 50; i++)
    await writeFile(join(tree, `file${i}`), `content ${i}\n`.repeat(999));
  const image = join(folder, 'ext4');
  await execute('truncate', ['-s', '64M', image]);
  await execute('mke2fs', ['-q', '-t', 'ext4', '-d', tree, image]);
  const copy = (from: string, to: string) =>
    execute('qemu-img', ['convert', '-n', '-f', 'raw', '-O', 'raw', from, to]);
  await copy(image, uri(socketPath));
  const generation = newGeneration();
  await disk.fork(generation);
  // The same file system with other contents on top.
  await writeFile(join(tree, 'more'), 'x'.repeat(MIB));
  await execute('mke2fs', ['-q', '-F', '-t', 'ext4', '-d', tree, image]);
  await copy(image, uri(socketPath));
  const readOnly = join(folder, 'generation');
  const served = await serveGeneration(disk, generation, { socketPath: readOnly });
  const check = async (from: string, more: boolean) => {
    const out = join(folder, 'out');
    await execute('truncate', ['-s', '64M', out]);
    await execute('nbdcopy', [from, out]);
    await execute('e2fsck', ['-f', '-n', out]);
    const { stdout } = await execute('debugfs', ['-R', 'cat /file49', out]);
    expect(stdout).toBe('content 49\n'.repeat(999));
    const listing = await execute('debugfs', ['-R', 'ls -l /', out]);
    expect(listing.stdout.includes('more')).toBe(more);
  };
  await check(uri(socketPath), true);
  await check(uri(readOnly, generation), false);
  const info = await execute('nbdinfo', ['--json', uri(readOnly, generation)]);
  expect(JSON.parse(info.stdout).exports[0]).toMatchObject({ is_read_only: true });
  await expect(
    execute('qemu-io', ['-f', 'raw', '-c', 'write 0 4096', uri(readOnly, generation)]),
  ).rejects.toThrow();
  await served.close();
  await expect(stat(readOnly)).rejects.toThrow();
});

test('a generation is handed to a page server with its options', async () => {
  const { disk, socketPath } = await newDisk(MIB);
  const client = await connectTo(socketPath);
  await client.write(4096, Buffer.alloc(4096, 9));
  const generation = newGeneration();
  await disk.fork(generation);
  const server = {
    serve: (options: { generation: string; provider: unknown; key: Buffer }) => options,
  };
  const key = Buffer.alloc(32, 1);
  const given = await exportGeneration(server, disk, generation, { key });
  expect(given).toMatchObject({ generation, key });
  expect(contents(given.provider, 256)[4096]).toBe(9);
});

test('fio verifies what four jobs wrote', async () => {
  const { folder, socketPath } = await newDisk(64 * MIB);
  const job = [
    '--ioengine=nbd',
    `--uri=${uri(socketPath)}`,
    '--rw=randwrite',
    '--bsrange=512-16k',
    '--blockalign=512',
    '--iodepth=8',
    '--verify=crc32c',
    '--verify_fatal=1',
    '--size=8m',
  ];
  const jobs = [0, 1, 2, 3].flatMap((i) => [`--name=job${i}`, ...job, `--offset=${i * 16}m`]);
  await execute('fio', ['--thread', ...jobs], { cwd: folder });
});

test('QEMU reconnects after SIGKILL of the server, and its request is carried out', async () => {
  const folder = await temporary();
  const [directory, socketPath] = [join(folder, 'disk'), join(folder, 'nbd')];
  await Disk.create(directory, { sizeBytes: 64 * MIB });
  const first = await serveInChild(directory, socketPath);
  const options = `driver=nbd,server.type=unix,server.path=${socketPath},export=disk,reconnect-delay=60`;
  const io = spawn('qemu-io', ['--image-opts', options], { stdio: ['pipe', 'pipe', 'inherit'] });
  const exited = once(io, 'exit');
  cleanup(() => {
    if (io.exitCode === null) io.kill('SIGKILL');
  });
  const lines = createInterface({ input: io.stdout })[Symbol.asyncIterator]();
  const command = async (text: string) => {
    io.stdin.write(`${text}\n`);
    for (;;) {
      const line = await lines.next();
      if (line.done === true) throw new Error('qemu-io ended');
      // The prompt stands before it, as nothing is a terminal.
      if (/(wrote|read) \d+\/\d+ bytes|ailed|rror/.test(line.value)) return line.value;
    }
  };
  expect(await command('write -P 0x31 0 1M')).toContain('wrote 1048576/1048576');
  await first.kill();
  const write = command('write -P 0x32 64k 64k'); // nobody is there now
  await serveInChild(directory, socketPath);
  expect(await write).toContain('wrote 65536/65536');
  expect(await command('read -P 0x31 0 64k')).toContain('read 65536/65536');
  expect(await command('read -P 0x32 64k 64k')).toContain('read 65536/65536');
  expect(await command('read -P 0x31 128k 128k')).toContain('read 131072/131072');
  io.stdin.end('quit\n');
  await exited;
});

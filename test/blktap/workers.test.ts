// Threads of a server with many exports, some of whose devices hang: where the kernel refuses
// io_uring, as with a ring the reads of a device hold none of them.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Disk } from '../../src/cow-disk/disk.js';
import { mountExport } from './nbdfuse.js';
import { FLAGS, NONE, OPT, rawNbd } from './raw-nbd.js';
import { cleanup, connectTo, exists, newServer, openDisk, PAGE, temporary } from './support.js';

const MIB = 2 ** 20;
process.env.SNOWFLOCK_IO_URING = '0'; // read when a connection is made

async function workers(): Promise<number> {
  const names = (await readdir('/proc/self/task')).map((id) =>
    readFile(`/proc/self/task/${id}/comm`, 'utf8').catch(() => ''),
  );
  return (await Promise.all(names)).filter((name) => name === 'nbd-worker\n').length;
}

/** The count that `count` comes to and keeps, while `other` is answered. */
async function settled(count: () => Promise<number>, other: () => Promise<unknown>) {
  let last = -1;
  for (let still = 0; still < 5; still++) {
    for (let i = 0; i < 20; i++) await other();
    const now = await count();
    if (now !== last) still = 0;
    last = now;
  }
  return last;
}

async function newServedServer() {
  const folder = await temporary();
  const socketPath = join(folder, 'nbd');
  return { folder, socketPath, server: await newServer(socketPath) };
}

async function diskOn(folder: string, name: string, image?: string): Promise<Disk> {
  const directory = join(folder, name);
  const base = image === undefined ? {} : { base: { kind: 'image', path: image } as const };
  await Disk.create(directory, { sizeBytes: 64 * MIB, ...base });
  return openDisk(directory);
}

/** An image whose reads can be made to hang, and to go on. */
async function hangingImage(): Promise<{ path: string; hang(): void; resume(): void }> {
  const socket = join(await temporary(), 'nbdkit');
  const child = spawn('nbdkit', ['-f', '-U', socket, 'pattern', '64M'], { stdio: 'inherit' });
  const ended = once(child, 'exit');
  cleanup(async () => {
    child.kill('SIGKILL');
    await ended;
  });
  while (!(await exists(socket))) await new Promise((resolve) => setTimeout(resolve, 5));
  const { file } = await mountExport(`nbd+unix:///?socket=${socket}`);
  const resume = () => child.kill('SIGCONT');
  const hang = () => {
    child.kill('SIGSTOP');
    cleanup(resume); // before the disks are closed, which wait for their reads
  };
  return { path: file, hang, resume };
}

test('a thousand exports that nobody uses cost no thread', async () => {
  const { folder, socketPath, server } = await newServedServer();
  const disk = await diskOn(folder, 'disk');
  for (let i = 0; i < 1000; i++) await disk.serve({ server, exportName: `export ${i}` });
  const raw = await rawNbd(socketPath);
  raw.socket.write(FLAGS);
  expect((await raw.ask(OPT.list, NONE)).length).toBe(1000 + 1);
  expect(await workers()).toBe(0);
  await (await connectTo(socketPath, 'export 500')).flush();
  expect(await workers()).toBe(1);
  await server.close();
  expect(await workers()).toBe(0);
});

test('a device that hangs holds a few threads, and the others are served', async () => {
  const { folder, socketPath, server } = await newServedServer();
  const image = await hangingImage();
  await (await diskOn(folder, 'hangs', image.path)).serve({ server, exportName: 'hangs' });
  await (await diskOn(folder, 'works')).serve({ server, exportName: 'works' });
  const [hangs, works] = [
    await connectTo(socketPath, 'hangs'),
    await connectTo(socketPath, 'works'),
  ];
  image.hang();
  const reads = Array.from({ length: 20 }, (_, i) => hangs.read((i + 20) * MIB, PAGE));
  // A flush is never done on the connection's thread.
  expect(await settled(workers, () => works.flush())).toBe(4 + 1);
  expect(hangs.pending).toBe(20);
  image.resume();
  for (const [i, read] of reads.entries()) {
    // The pattern plugin's bytes are their own offsets, big-endian.
    expect((await read).readBigUInt64BE(8)).toBe(BigInt((i + 20) * MIB + 8));
  }
});

test('devices that all hang hold a bounded number of threads, and are served when they go on', async () => {
  const { folder, socketPath, server } = await newServedServer();
  const image = await hangingImage();
  const clients = [];
  for (let i = 0; i < 20; i++) {
    const disk = await diskOn(folder, `disk ${i}`, image.path);
    await disk.serve({ server, exportName: `disk ${i}` });
    clients.push(await connectTo(socketPath, `disk ${i}`));
  }
  image.hang();
  const offset = (disk: number, read: number) => (20 + disk) * MIB + read * 128 * 1024;
  const reads = clients.map((client, disk) =>
    Array.from({ length: 6 }, (_, i) => client.read(offset(disk, i), PAGE)),
  );
  const memory = clients[0];
  await memory?.write(0, Buffer.alloc(PAGE, 1)); // pages of the top need no worker
  expect(await settled(workers, async () => memory?.read(0, PAGE))).toBe(64);
  image.resume();
  for (const [disk, all] of reads.entries()) {
    for (const [i, read] of all.entries()) {
      expect((await read).readBigUInt64BE(0)).toBe(BigInt(offset(disk, i)));
    }
  }
});

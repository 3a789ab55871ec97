// A file system made, filled, changed and checked through the server: nbdfuse shows the export as a
// file, and what works on that file are e2fsprogs, with no kernel support for NBD.
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { mountExport } from './nbdfuse.js';
import { execute, newDisk, newGeneration, newServer, temporary, uri } from './support.js';

const MIB = 2 ** 20;

async function debugfs(file: string, lines: string[]): Promise<string> {
  const script = join(await temporary(), 'script');
  await writeFile(script, `${lines.join('\n')}\n`);
  const { stdout, stderr } = await execute('debugfs', ['-w', '-f', script, file]);
  // It exits with 0 whatever its commands did.
  expect(stderr).not.toMatch(/not found|error|No space|failed/i);
  return stdout;
}

const check = (file: string) => execute('e2fsck', ['-f', '-n', file]);

test('ext4 is made, filled, changed and checked on the export, and on generations of it', async () => {
  const { folder, socketPath, disk } = await newDisk(128 * MIB);
  const top = await mountExport(uri(socketPath));
  await execute('mkfs.ext4', ['-q', '-E', 'lazy_itable_init=0', top.file]);
  await check(top.file);

  const content = (i: number) => `content of file ${i}\n`.repeat(200 * i);
  const sources = join(folder, 'sources');
  await mkdir(sources);
  for (let i = 1; i <= 30; i++) await writeFile(join(sources, `${i}`), content(i));
  const writeAll = (into: string) =>
    Array.from({ length: 30 }, (_, i) => `write ${join(sources, `${i + 1}`)} ${into}/file${i + 1}`);
  await debugfs(top.file, ['mkdir first', ...writeAll('first')]);
  await check(top.file);
  const generation = newGeneration();
  await top.unmount(); // its writes arrive before it ends
  await disk.fork(generation);

  const again = await mountExport(uri(socketPath));
  const removed = Array.from({ length: 15 }, (_, i) => `rm first/file${2 * (i + 1)}`);
  await debugfs(again.file, ['mkdir second', ...removed, ...writeAll('second')]);
  await check(again.file);
  await again.unmount();

  const shared = join(folder, 'shared');
  const server = await newServer(shared);
  await disk.serve({ server, exportName: 'top' });
  await disk.serveGeneration(generation, { server, exportName: 'generation' });
  for (const [name, second] of [
    ['top', true],
    ['generation', false],
  ] as const) {
    const seen = await mountExport(uri(shared, name));
    await check(seen.file);
    const read = async (path: string) =>
      (await execute('debugfs', ['-R', `cat ${path}`, seen.file])).stdout;
    expect(await read('first/file29')).toBe(content(29));
    expect(await read('first/file30')).toBe(second ? '' : content(30));
    expect(await read('second/file30')).toBe(second ? content(30) : '');
    await seen.unmount();
  }
  expect(server.stats().exports.map((entry) => entry.connections)).toEqual([0, 0]);
});

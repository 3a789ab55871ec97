import { chmod, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { readSourceFile, type Source, writeSourceFile } from '../../src/disk-server/source-file.js';
import { codeOf, temporary } from '../blktap/support.js';

const source: Source = {
  format: 'snowflock-source',
  version: 1,
  generation: '0123456789abcdef0123456789abcdef',
  size_bytes: 8 << 20,
  address: '10.9.0.1',
  port: 7448,
  group: '239.195.1.2',
  group_port: 20000,
  key: 'ab'.repeat(32),
};

test('a source file comes back as it was written, for its owner alone', async () => {
  const path = join(await temporary(), 'source.json');
  await writeSourceFile(path, source);
  expect((await stat(path)).mode & 0o777).toBe(0o600);
  expect(await readSourceFile(path)).toEqual(source);
  await chmod(path, 0o640);
  await expect(readSourceFile(path)).rejects.toMatchObject({
    code: 'E_CONFIG',
    message: expect.stringContaining('chmod 600'),
  });
});

test('what is no source is refused, and the error names the field', async () => {
  const path = join(await temporary(), 'source.json');
  expect(await codeOf(readSourceFile(path))).toBe('E_NOT_FOUND');
  await writeFile(path, '{', { mode: 0o600 });
  expect(await codeOf(readSourceFile(path))).toBe('E_CONFIG');
  const faults: [Record<string, unknown>, string][] = [
    [{ version: 2 }, '/version'],
    [{ size_bytes: 0 }, '/size_bytes'],
    [{ address: 'example.org' }, '/address'],
    [{ group: '10.9.0.2' }, '/group'],
    [{ port: 0 }, '/port'],
    [{ key: 'ab' }, '/key'],
    [{ generation: '../../etc' }, '/generation'],
  ];
  for (const [fault, field] of faults) {
    await writeFile(path, JSON.stringify({ ...source, ...fault }));
    await expect(readSourceFile(path)).rejects.toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringContaining(field),
    });
  }
});

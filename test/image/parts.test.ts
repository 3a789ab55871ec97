import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { chmod, mkdir, mkdtemp, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { cpioArchive } from '../../src/image/cpio.js';
import { makeExt4 } from '../../src/image/ext4.js';
import { extractVmlinux } from '../../src/image/kernel.js';
import { withLock } from '../../src/image/lock.js';
import { lz4Block, unpackLz4Legacy } from '../../src/image/lz4.js';
import { moduleDependencies } from '../../src/image/modules.js';

const execute = promisify(execFile);
const seed = Number(process.env.SEED ?? Date.now() % 1_000_000_000);
console.log(`image parts: SEED=${seed}`);

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'sf-image-'));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

async function hashOf(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const data of createReadStream(path)) hash.update(data as Buffer);
  return hash.digest('hex');
}

/** A length in LZ4's nibble and continuation bytes. */
const extra = (length: number) =>
  length < 15
    ? []
    : [...Array<number>(Math.floor((length - 15) / 255)).fill(255), (length - 15) % 255];

/** Encodes literals and matches as given; the expected output is worked out beside it. */
function encode(parts: { literals: Uint8Array; back: number; match: number }[], tail: Uint8Array) {
  const packed: number[] = [];
  const plain: number[] = [];
  for (const { literals, back, match } of parts) {
    plain.push(...literals);
    const offset = 1 + (back % Math.max(1, Math.min(plain.length, 65_535)));
    if (offset > plain.length) continue;
    const size = match + 4;
    packed.push((Math.min(literals.length, 15) << 4) | Math.min(match, 15));
    packed.push(...extra(literals.length), ...literals, offset & 255, offset >> 8, ...extra(match));
    for (let i = 0; i < size; i++) plain.push(plain[plain.length - offset] ?? 0);
  }
  packed.push(Math.min(tail.length, 15) << 4, ...extra(tail.length), ...tail);
  plain.push(...tail);
  return { packed: Uint8Array.from(packed), plain: Uint8Array.from(plain) };
}

describe('LZ4', () => {
  const part = fc.record({
    literals: fc.uint8Array({ minLength: 1, maxLength: 300 }),
    back: fc.nat(70_000),
    match: fc.nat(600),
  });

  it('unpacks any sequence of literals and matches, overlapping or not', () => {
    fc.assert(
      fc.property(
        fc.array(part, { maxLength: 20 }),
        fc.uint8Array({ maxLength: 40 }),
        (parts, tail) => {
          const { packed, plain } = encode(parts, tail);
          const out = new Uint8Array(plain.length);
          expect(lz4Block(packed, 0, packed.length, out, 0)).toBe(plain.length);
          expect(Buffer.compare(out, plain)).toBe(0);
        },
      ),
      { seed, numRuns: 200 },
    );
  });

  it('refuses damaged blocks and never writes outside its output', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (noise) => {
        try {
          expect(lz4Block(noise, 0, noise.length, new Uint8Array(100), 0)).toBeLessThanOrEqual(100);
        } catch (error) {
          expect(error).toMatchObject({ code: 'E_CORRUPT' });
        }
      }),
      { seed, numRuns: 500 },
    );
  });

  it('refuses what is no LZ4 stream and no kernel', () => {
    expect(() => unpackLz4Legacy(Buffer.from('nonsense'))).toThrowError(/LZ4/);
    expect(() => extractVmlinux(Buffer.alloc(4096))).toThrowError(/bzImage/);
  });
});

describe('initramfs', () => {
  it('is an archive that cpio reads back', async () => {
    const data = Buffer.from('hello\n');
    const archive = cpioArchive([
      { path: 'bin', mode: 0o040755 },
      { path: 'bin/a', mode: 0o100755, data },
      { path: 'b', mode: 0o100644, data: Buffer.alloc(3) },
    ]);
    await writeFile(join(folder, 'x.cpio'), archive);
    await execute('busybox', ['cpio', '-i', '-F', 'x.cpio'], { cwd: folder });
    expect(await readFile(join(folder, 'bin/a'))).toEqual(data);
    expect((await stat(join(folder, 'bin/a'))).mode & 0o777).toBe(0o755);
    expect((await readFile(join(folder, 'b'))).length).toBe(3);
  });

  it('knows what a module depends on', () => {
    expect(moduleDependencies(Buffer.from('x\0depends=virtio,virtio_ring\0y=1\0'))).toEqual([
      'virtio',
      'virtio_ring',
    ]);
    expect(moduleDependencies(Buffer.from('x\0depends=\0'))).toEqual([]);
  });
});

describe('root disk', () => {
  const build = (disk: string, tree: string) =>
    makeExt4({
      disk,
      diskBytes: 1 << 26,
      tree,
      owner: (path) => (path === '/etc/shadow' ? { uid: 0, gid: 42, mode: 0o640 } : undefined),
      timeS: 1_700_000_000,
      label: 'test',
      uuid: '11111111-2222-4333-8444-555555555555',
    });

  async function tree(name: string, order: readonly string[]): Promise<string> {
    const root = join(folder, name);
    await mkdir(join(root, 'etc'), { recursive: true });
    for (const file of order) await writeFile(join(root, 'etc', file), `${file}\n`);
    await writeFile(join(root, 'a\\x2db c'), 'odd name');
    await symlink('etc/shadow', join(root, 'link'));
    await mkdir(join(root, 'tmp'));
    await chmod(join(root, 'tmp'), 0o1777);
    return root;
  }

  it('is the same, byte for byte, from equal trees made in another order at another time', async () => {
    await build(join(folder, '1.raw'), await tree('1', ['shadow', 'passwd', 'zzz']));
    await build(join(folder, '2.raw'), await tree('2', ['zzz', 'shadow', 'passwd']));
    expect(await hashOf(join(folder, '2.raw'))).toBe(await hashOf(join(folder, '1.raw')));
  });

  it('holds names, contents, modes and owners, and is sparse', async () => {
    const disk = join(folder, 'd.raw');
    await build(disk, await tree('t', ['shadow']));
    const debugfs = async (command: string) =>
      (await execute('debugfs', ['-R', command, disk])).stdout;
    expect(await debugfs('cat "/a\\x2db c"')).toBe('odd name');
    const shadow = await debugfs('stat /etc/shadow');
    expect(shadow).toMatch(/Mode: {2}0640/);
    expect(shadow).toMatch(/Group: +42/);
    expect(await debugfs('stat /tmp')).toMatch(/Mode: {2}01777/);
    expect(await debugfs('stat /link')).toContain('etc/shadow');
    const { size, blocks } = await stat(disk);
    expect(size).toBe(1 << 26);
    expect(blocks * 512).toBeLessThan(4 << 20);
  });

  it('says what it cannot write', async () => {
    const root = join(folder, 't');
    await mkdir(root);
    await writeFile(join(root, 'quote"name'), '');
    await expect(build(join(folder, 'd.raw'), root)).rejects.toMatchObject({ code: 'E_ARGUMENT' });
  });
});

describe('build lock', () => {
  it('lets one builder in at a time', async () => {
    const lock = join(folder, 'lock');
    let inside = 0;
    let waited = 0;
    const work = async () => {
      expect(++inside).toBe(1);
      await new Promise((resolve) => setImmediate(resolve));
      inside--;
    };
    const wait = () => {
      waited++;
    };
    await Promise.all([1, 2, 3].map(() => withLock(lock, 60_000, wait, work)));
    expect(waited).toBeGreaterThan(0);
  });

  it('takes over from a builder that was killed', async () => {
    const lock = join(folder, 'lock');
    await writeFile(lock, `${process.pid} 1\n`); // this pid, but another start
    expect(
      await withLock(
        lock,
        0,
        () => {},
        async () => 'done',
      ),
    ).toBe('done');
  });

  it('gives up after its limit, and when interrupted', async () => {
    const lock = join(folder, 'lock');
    await withLock(
      lock,
      0,
      () => {},
      async () => {
        const busy = withLock(
          lock,
          0,
          () => {},
          async () => {},
        );
        await expect(busy).rejects.toMatchObject({ code: 'E_IN_USE' });
        const stop = withLock(
          lock,
          60_000,
          () => {},
          async () => {},
          AbortSignal.abort(),
        );
        await expect(stop).rejects.toMatchObject({ code: 'E_INTERRUPTED' });
      },
    );
  });
});

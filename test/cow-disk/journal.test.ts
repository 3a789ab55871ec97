import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { crc32c } from '../../src/common/crc32c.js';
import type { Transaction } from '../../src/cow-disk/entries.js';
import { JOURNAL, Journal } from '../../src/cow-disk/journal.js';
import { Ledger } from '../../src/cow-disk/ledger.js';
import { codeOf, execute, newSeed, random, temporary } from '../blktap/support.js';

const id = (n: number) => n.toString(16).padStart(32, '0');
const disk = (top: number): Transaction => ({
  slices: { [id(top)]: { parent: null, base: { kind: 'none' }, size_bytes: 8192, map: 0 } },
  disks: { [`disk${top}`]: { top: id(top), spare: null, created_ms: 1 } },
});

async function newJournal(transactions: Transaction[]): Promise<{ folder: string; text: Buffer }> {
  const folder = await temporary();
  await Journal.create(folder);
  const journal = await Journal.open(folder, () => expect.unreachable('it is empty'));
  for (const transaction of transactions) await journal.append(transaction);
  await journal.close();
  return { folder, text: await readFile(join(folder, JOURNAL)) };
}

async function replay(folder: string): Promise<Transaction[]> {
  const seen: Transaction[] = [];
  await (await Journal.open(folder, (transaction) => seen.push(transaction))).close();
  return seen;
}

test('the checksum is CRC-32C', () => {
  expect(crc32c(Buffer.from('123456789'))).toBe(0xe3069283);
  expect(crc32c(Buffer.from('6789'), crc32c(Buffer.from('12345')))).toBe(0xe3069283);
});

test('what was appended is replayed, in order', async () => {
  const made = [
    disk(1),
    disk(2),
    { disks: { disk1: null } },
    { removed: { [id(7)]: true as const } },
  ];
  const { folder, text } = await newJournal(made);
  expect(await replay(folder)).toEqual(made);
  expect(text.toString().split('\n')).toHaveLength(6);
  expect(await codeOf(Journal.create(folder))).toBe('E_EXISTS');
  expect(await readFile(join(folder, JOURNAL))).toEqual(text);
  expect(await readdir(folder)).toEqual([JOURNAL]);
});

test('a last line torn at any byte is cut off, and the next one takes its place', async () => {
  const { folder, text } = await newJournal([disk(1), disk(2)]);
  const path = join(folder, JOURNAL);
  const begin = text.lastIndexOf('\n', text.length - 2) + 1;
  for (let cut = begin; cut < text.length; cut++) {
    for (const tail of [Buffer.alloc(0), Buffer.alloc(text.length - cut)]) {
      await writeFile(path, Buffer.concat([text.subarray(0, cut), tail]));
      expect(await replay(folder), `cut at ${cut}`).toEqual([disk(1)]);
      expect((await stat(path)).size).toBe(begin);
    }
  }
  const journal = await Journal.open(folder, () => undefined);
  await journal.append(disk(3));
  await journal.close();
  expect(await replay(folder)).toEqual([disk(1), disk(3)]);
});

test('the last line may be there in part only: 512-byte sectors of it missing', async () => {
  const many = Object.fromEntries(
    Array.from({ length: 60 }, (_, i) => [id(100 + i), true as const]),
  );
  const { folder, text } = await newJournal([disk(1), { removed: many }]);
  const begin = text.lastIndexOf('\n', text.length - 2) + 1;
  let sectors = 0;
  for (let at = Math.ceil(begin / 512) * 512; at < text.length; at += 512) {
    const torn = Buffer.from(text).fill(0, at, Math.min(at + 512, text.length));
    await writeFile(join(folder, JOURNAL), torn);
    expect(await replay(folder)).toEqual([disk(1)]);
    sectors++;
  }
  expect(sectors).toBeGreaterThan(3);
});

test('a flipped bit anywhere is found, or cuts the last line and nothing else', async () => {
  const { folder, text } = await newJournal([disk(1), { disks: { disk1: null } }]);
  const path = join(folder, JOURNAL);
  const begin = text.lastIndexOf('\n', text.length - 2) + 1;
  const outcomes = { found: 0, cut: 0 };
  for (let bit = 0; bit < text.length * 8; bit++) {
    const byte = bit >> 3;
    const bad = Buffer.from(text);
    bad[byte] = (bad[byte] ?? 0) ^ (1 << (bit & 7));
    await writeFile(path, bad);
    const seen: Transaction[] = [];
    const outcome = await Journal.open(folder, (each) => seen.push(each)).then(
      async (journal) => {
        await journal.close();
        return 'cut' as const;
      },
      (error: { code: string; message: string }) => {
        expect(error.code).toBe('E_CORRUPT');
        expect(error.message).toContain(`${path} line `);
        return 'found' as const;
      },
    );
    outcomes[outcome]++;
    if (outcome === 'found') {
      expect(await readFile(path)).toEqual(bad); // nothing was changed
    } else {
      expect(byte, `bit ${bit}`).toBeGreaterThanOrEqual(begin);
      expect(seen).toEqual([disk(1)]);
    }
  }
  expect(outcomes.cut).toBeGreaterThan(0);
  expect(outcomes.found).toBeGreaterThan(begin * 8 - 1);
});

test('what is no journal is refused', async () => {
  const folder = await temporary();
  const path = join(folder, JOURNAL);
  expect(await codeOf(Journal.open(folder, () => undefined))).toBe('E_NOT_FOUND');
  const line = (value: unknown, after?: string) => {
    const text = `${after === undefined ? '' : `${after.slice(0, 8)} `}${JSON.stringify(value)}`;
    return `${crc32c(Buffer.from(text)).toString(16).padStart(8, '0')} ${text}\n`;
  };
  const named = (version: number) =>
    line({ format: 'snowflock-store', version, page_bytes: 4096, id: id(1) });
  const header = named(3);
  for (const text of [
    '',
    '\n',
    header.slice(0, 50),
    named(2),
    named(4),
    header + line({ disks: { '../etc': null } }, header),
    header + line({ slices: { [id(1)]: { parent: null, size_bytes: 0, map: 0 } } }, header),
    header + line({ unknown: {} }, header),
    header + line([], header),
    header + line({}), // names none before it
    header + line({}, '00000000'),
    `${header}\n${line({}, header)}`,
  ]) {
    await writeFile(path, text);
    expect(await codeOf(Journal.open(folder, () => undefined)), text).toBe('E_CORRUPT');
  }
  await writeFile(path, named(2));
  await expect(Journal.open(folder, () => undefined)).rejects.toThrow(/version 2.*version 3/);
  await writeFile(path, header + line({}, header));
  expect(await replay(folder)).toEqual([{}]);
});

test('a whole line missing, moved, twice or of another store is found, wherever it is', async () => {
  const made = [disk(1), disk(2), disk(3), { disks: { disk1: null } }];
  const { folder, text } = await newJournal(made);
  const other = await newJournal(made);
  const lines = text.toString().split(/(?<=\n)/);
  const foreign = other.text.toString().split(/(?<=\n)/);
  const path = join(folder, JOURNAL);
  const refused = async (what: string, bad: string[]) => {
    await writeFile(path, bad.join(''));
    const error = await Journal.open(folder, () => undefined).catch((each: Error) => each);
    expect(error, what).toMatchObject({ code: 'E_CORRUPT' });
    expect((error as Error).message, what).toMatch(/line \d does not follow the one before it/);
    expect(await readFile(path, 'utf8'), what).toBe(bad.join(''));
  };
  for (let n = 1; n < lines.length; n++) {
    const line = lines[n] as string;
    // The last one missing is as if it had never been written; moved behind itself it is there twice.
    if (n < lines.length - 1) {
      await refused(`${n} missing`, lines.toSpliced(n, 1));
      await refused(`${n} later`, lines.toSpliced(n, 1).toSpliced(n + 1, 0, line));
    }
    await refused(`${n} twice`, lines.toSpliced(n, 0, line));
    await refused(`${n} of another store`, lines.toSpliced(n, 1, foreign[n] as string));
  }
});

test('an append that fails never happened', async () => {
  const folder = await temporary();
  await execute('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', folder]);
  try {
    await Journal.create(folder);
    const journal = await Journal.open(folder, () => undefined);
    try {
      const big: Transaction = { removed: {} };
      for (let i = 0; i < 300; i++) Object.assign(big.removed ?? {}, { [id(i)]: true });
      let appended = 0;
      let code = '';
      while (code === '') {
        code = await journal.append(big).then(
          () => {
            appended++;
            return '';
          },
          (error: { code: string }) => error.code,
        );
      }
      expect(code).toBe('E_NO_SPACE');
      expect(appended).toBeGreaterThan(1);
      await journal.append(disk(1)); // a small one still fits
      expect(await replay(folder)).toEqual([...Array(appended).fill(big), disk(1)]);
    } finally {
      await journal.close();
    }
  } finally {
    await execute('umount', [folder]);
  }
});

test('after a failed append that cannot be taken back nothing is appended any more', async () => {
  const { folder } = await newJournal([disk(1)]);
  const journal = await Journal.open(folder, () => undefined);
  const { write, truncate } = fileOf(journal);
  const handle = fileOf(journal);
  handle.write = () => Promise.reject(Object.assign(new Error('write'), { code: 'EIO' }));
  expect(await codeOf(journal.append(disk(2)))).toBe('E_IO');
  handle.truncate = () => Promise.reject(Object.assign(new Error('truncate'), { code: 'EIO' }));
  expect(await codeOf(journal.append(disk(2)))).toBe('E_IO');
  Object.assign(handle, { write, truncate });
  expect(await codeOf(journal.append(disk(3)))).toBe('E_IO');
  await journal.close();
  expect(await replay(folder)).toEqual([disk(1)]);
});

/** The file that a journal writes: every file handle has the same prototype's methods. */
function fileOf(journal: Journal): Record<'write' | 'truncate', unknown> {
  return journal.fileForTests as unknown as Record<'write' | 'truncate', unknown>;
}

test('a journal much larger than its entries is rewritten while appends go on', async () => {
  const folder = await temporary();
  await mkdir(folder, { recursive: true });
  await Journal.create(folder);
  const ledger = await Ledger.open(folder);
  const rand = random(newSeed('rewrite'));
  const path = join(folder, JOURNAL);
  let largest = 0;
  let shrunk = 0;
  for (let i = 0; i < 3000; i++) {
    const n = 1 + Math.floor(rand() * 40);
    const has = ledger.tree.disks.has(`disk${n}`);
    await ledger.commit(() =>
      has ? { slices: { [id(n)]: null }, disks: { [`disk${n}`]: null } } : disk(n),
    );
    const { lengthBytes } = ledger.journal;
    if (lengthBytes < largest / 2) {
      shrunk++;
      largest = 0;
    }
    largest = Math.max(largest, lengthBytes);
    expect(lengthBytes).toBeLessThan(256 * 1024);
  }
  expect(shrunk).toBeGreaterThan(2);
  await ledger.close();
  expect((await replay(folder)).length).toBeGreaterThan(0); // lines were moved, and follow each other
  const again = await Ledger.open(folder);
  expect(new Map(again.tree.slices)).toEqual(new Map(ledger.tree.slices));
  expect(again.tree.bytes()).toBe(ledger.tree.bytes());
  await again.close();
  expect((await readdir(folder)).sort()).toEqual([JOURNAL]);
  expect((await stat(path)).mode & 0o777).toBe(0o600);
});

test('a rewrite that fails leaves the journal as it was', async () => {
  const folder = await temporary();
  await Journal.create(folder);
  await mkdir(join(folder, `${JOURNAL}.new`)); // in the way
  const ledger = await Ledger.open(folder);
  const warned = new Promise<string>((resolve) => {
    process.once('warning', (warning) => resolve(warning.message));
  });
  let done = 0;
  while (ledger.journal.lengthBytes < 80 * 1024) {
    await ledger.commit(() => disk(1));
    done++;
  }
  expect(await warned).toContain('could not be rewritten');
  await ledger.close();
  expect(await replay(folder)).toHaveLength(done);
});

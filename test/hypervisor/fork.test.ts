import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { type Bed, counts, fileSays, makeBed } from './harness.js';

let bed: Bed;
beforeEach(() => {
  bed = makeBed();
});
afterEach(() => bed.end());

const running = (text: string) => counts(text).length >= 3;

test('a clone goes on from the very instant of the capture', async () => {
  const parent = await bed.boot('parent');
  await fileSays(parent.record.console_log, running);

  await parent.pause();
  const state = await parent.captureState();
  bed.copyRam('parent', 'clone');
  const before = counts(readFileSync(parent.record.console_log, 'utf8'));
  await parent.resume();

  const clone = bed.own(await bed.driver.prepareClone(bed.spec('clone'), parent.shape));
  expect(await clone.status()).toBe('prepared');
  await clone.loadState(state);
  expect(await clone.status()).toBe('paused');
  expect(readFileSync(clone.record.console_log, 'utf8')).toBe('');
  const { atMs } = await clone.run();
  expect(Math.abs(atMs - Date.now())).toBeLessThan(60_000);

  const text = await fileSays(clone.record.console_log, running);
  const last = before.at(-1) ?? 0;
  const seen = counts(text);
  expect(seen[0] === last || seen[0] === last + 1).toBe(true);
  expect(text).not.toContain('guest up');
  expect(text).not.toContain('BAD');
  await fileSays(parent.record.console_log, (t) => counts(t).length > before.length + 2);
  expect(readFileSync(parent.record.console_log, 'utf8')).not.toContain('BAD');
});

test('a clone forks again', async () => {
  const parent = await bed.boot('gen0');
  await fileSays(parent.record.console_log, running);
  let from = parent;
  for (const id of ['gen1', 'gen2']) {
    await from.pause();
    const state = await from.captureState();
    bed.copyRam(from.id, id);
    await from.resume();
    const clone = bed.own(await bed.driver.prepareClone(bed.spec(id), from.shape));
    await clone.loadState(state);
    await clone.run();
    const text = await fileSays(clone.record.console_log, running);
    expect(text).not.toContain('BAD');
    from = clone;
  }
});

test('twenty captures in a row give states of one size, and the guest counts on', async () => {
  const parent = await bed.boot('parent');
  await fileSays(parent.record.console_log, running);
  const sizes = new Set<number>();
  for (let i = 0; i < 20; i++) {
    await parent.pause();
    sizes.add((await parent.captureState()).length);
    await parent.resume();
  }
  expect(sizes.size).toBeLessThanOrEqual(2);
  const now = counts(readFileSync(parent.record.console_log, 'utf8')).length;
  const text = await fileSays(parent.record.console_log, (t) => counts(t).length > now + 2);
  expect(text).not.toContain('BAD');
});

test('a pause gives its state once; after a resume it is given again', async () => {
  const parent = await bed.boot('parent');
  for (let i = 0; i < 2; i++) {
    await parent.pause();
    await parent.captureState();
    await expect(parent.captureState()).rejects.toMatchObject({ code: 'E_STATE' });
    await parent.resume();
  }
  expect(await parent.status()).toBe('running');
});

test('a running VM is not captured', async () => {
  const parent = await bed.boot('parent');
  await expect(parent.captureState()).rejects.toMatchObject({ code: 'E_STATE' });
});

test('a state larger than the bound is refused, and the parent resumes', async () => {
  const small = makeBed({ maxStateBytes: 10_000 });
  try {
    const parent = await small.boot('parent');
    await fileSays(parent.record.console_log, running);
    for (let i = 0; i < 3; i++) {
      await parent.pause();
      await expect(parent.captureState()).rejects.toMatchObject({ code: 'E_QEMU' });
      expect(await parent.status()).toBe('paused');
      await parent.resume();
    }
    const now = counts(readFileSync(parent.record.console_log, 'utf8')).length;
    await fileSays(parent.record.console_log, (t) => counts(t).length > now + 2);
  } finally {
    await small.end();
  }
});

test('a damaged state is refused, and the clone is gone', async () => {
  const parent = await bed.boot('parent');
  await parent.pause();
  const state = await parent.captureState();
  for (const [id, bad] of [
    ['cut', state.subarray(0, state.length / 2)],
    ['empty', Buffer.alloc(0)],
    ['noise', Buffer.alloc(40_000, 0xa5)],
  ] as const) {
    bed.copyRam('parent', id);
    const clone = bed.own(await bed.driver.prepareClone(bed.spec(id), parent.shape));
    await expect(clone.loadState(bad)).rejects.toMatchObject({ code: 'E_QEMU' });
    expect(await clone.status()).toBe('exited');
  }
});

test('a clone of another shape is refused before anything starts', async () => {
  const parent = await bed.boot('parent');
  const other = bed.spec('clone', { ramBytes: 32 << 20 });
  const started = bed.driver.prepareClone(other, parent.shape);
  await expect(started).rejects.toMatchObject({ code: 'E_SHAPE' });
  await expect(started).rejects.toThrow(/ram_bytes is 16777216 there and 33554432 here/);
});

test('a prepared clone whose state never comes is ended by destroy', async () => {
  const parent = await bed.boot('parent');
  const clone = await bed.driver.prepareClone(bed.spec('clone'), parent.shape);
  await clone.destroy();
  expect(await clone.status()).toBe('exited');
});

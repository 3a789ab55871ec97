import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import type { Disk } from '../../src/cow-disk/disk.js';
import type { Store } from '../../src/cow-disk/store.js';
import type { NbdClient } from '../blktap/nbd-client.js';
import { contents, newSeed, PAGE, random } from '../blktap/support.js';
import { newStore, openStore, PAGES, serving } from './store-support.js';

const STEPS = 2500;
const MOST_DISKS = 6;

interface Model {
  pages: number[];
  generations: Map<string, number[]>;
  open?: { disk: Disk; client: NbdClient };
}

test('random operations on a tree of clones match a plain model, with clean-up beside them', async () => {
  const rand = random(newSeed('store model'));
  const pick = <T>(from: readonly T[]): T => from[Math.floor(rand() * from.length)] as T;
  const made = await newStore({ gc_bytes_per_s: 2 ** 28 });
  const { folder, directory } = made;
  let store: Store = made.store;
  const disks = new Map<string, Model>();
  disks.set('web', { pages: Array(PAGES).fill(0), generations: new Map() });
  let named = 0;
  const counts = new Map<string, number>();

  const opened = async (name: string, model: Model) => {
    model.open ??= await serving(store, name, folder);
    return model.open;
  };
  const closed = async (model: Model) => {
    await model.open?.client.close();
    await model.open?.disk.close();
    delete model.open;
  };
  const read = async (name: string, generation: string) => {
    const view = await store.openGeneration(name, generation);
    try {
      const image = contents(view.provider(), PAGES);
      return Array.from({ length: PAGES }, (_, page) => image[page * PAGE] as number);
    } finally {
      view.close();
    }
  };
  const operations: [string, number, (name: string, model: Model) => Promise<unknown>][] = [
    [
      'write',
      40,
      async (name, model) => {
        const { client } = await opened(name, model);
        const first = Math.floor(rand() * PAGES);
        const count = 1 + Math.floor(rand() * Math.min(8, PAGES - first));
        const value = Math.floor(rand() * 256);
        if (value < 40) await client.zero(first * PAGE, count * PAGE);
        else await client.write(first * PAGE, Buffer.alloc(count * PAGE, value));
        model.pages.fill(value < 40 ? 0 : value, first, first + count);
      },
    ],
    [
      'read',
      15,
      async (name, model) => {
        const { client } = await opened(name, model);
        const image = await client.read(0, PAGES * PAGE);
        expect(model.pages.map((_, page) => image[page * PAGE])).toEqual(model.pages);
      },
    ],
    [
      'snapshot',
      14,
      async (name, model) => {
        const generation = `g${named++}`;
        await store.snapshot({ disk: name, name: generation });
        model.generations.set(generation, [...model.pages]);
      },
    ],
    [
      'read generation',
      10,
      async (name, model) => {
        if (model.generations.size === 0) return;
        const [generation, pages] = pick([...model.generations]);
        expect(await read(name, generation)).toEqual(pages);
      },
    ],
    [
      'drop',
      12,
      async (name, model) => {
        if (model.generations.size === 0) return;
        const generation = pick([...model.generations.keys()]);
        await store.removeGeneration({ disk: name, generation });
        model.generations.delete(generation);
      },
    ],
    [
      'clone',
      4,
      async (name, model) => {
        if (model.generations.size === 0 || disks.size >= MOST_DISKS) return;
        const [generation, pages] = pick([...model.generations]);
        const clone = `d${named++}`;
        await store.clone({ disk: name, generation, name: clone });
        disks.set(clone, { pages: [...pages], generations: new Map() });
      },
    ],
    [
      'rollback',
      3,
      async (name, model) => {
        if (model.generations.size === 0) return;
        await closed(model);
        const [generation, pages] = pick([...model.generations]);
        await store.rollback({ disk: name, generation });
        model.pages = [...pages];
      },
    ],
    ['flatten', 1, async (name) => store.flatten({ disk: name })],
    ['close', 4, async (_, model) => closed(model)],
    [
      'commit',
      2,
      async (name, model) => {
        await closed(model);
        for (const other of disks.values()) await closed(other);
        const result = await store.commit({ disk: name, discard: true }).catch((error) => {
          expect(error.code).toBe('E_STATE'); // not a clone, or of something gone
          return undefined;
        });
        if (result === undefined) return;
        disks.delete(name);
        (disks.get(result.origin) as Model).pages = model.pages;
      },
    ],
    [
      'remove',
      1,
      async (name, model) => {
        if (disks.size < 3) return;
        await closed(model);
        await store.removeDisk({ disk: name });
        disks.delete(name);
      },
    ],
    [
      'reopen',
      1,
      async () => {
        if (rand() < 0.5) await store.settled();
        for (const model of disks.values()) await closed(model);
        await store.close();
        const found = await checkStore(directory);
        expect(found.filter((each) => each.severity === 'error')).toEqual([]);
        store = await openStore(directory, { gc_bytes_per_s: 2 ** 28 });
      },
    ],
  ];
  const weighted = operations.flatMap((each) => Array<typeof each>(each[1]).fill(each));
  for (let step = 0; step < STEPS; step++) {
    const [what, , work] = pick(weighted);
    const [name, model] = pick([...disks]);
    counts.set(what, (counts.get(what) ?? 0) + 1);
    // Some at the same time, on other disks.
    const beside = [...disks].filter(([other]) => other !== name);
    const write = operations[0]?.[2];
    const both =
      beside.length > 0 && rand() < 0.3 && !['commit', 'reopen', 'remove'].includes(what);
    try {
      await Promise.all([work(name, model), both ? write?.(...pick(beside)) : undefined]);
    } catch (error) {
      throw new Error(`step ${step}: ${what} ${name}: ${(error as Error).message}`, {
        cause: error,
      });
    }
    const failed = (await store.tasks()).filter((task) => task.error !== null);
    expect(failed, `step ${step}: ${what} ${name}`).toEqual([]);
  }
  console.log([...counts].map(([what, count]) => `${what} ${count}`).join(', '));
  await store.settled();
  for (const [name, model] of disks) {
    for (const [generation, pages] of model.generations) {
      expect(await read(name, generation)).toEqual(pages);
    }
    const { client } = await opened(name, model);
    const image = await client.read(0, PAGES * PAGE);
    expect(model.pages.map((_, page) => image[page * PAGE])).toEqual(model.pages);
    await closed(model);
  }
  await store.settled();
  await store.close();
  expect((await checkStore(directory)).filter((each) => each.severity === 'error')).toEqual([]);
}, 600_000);

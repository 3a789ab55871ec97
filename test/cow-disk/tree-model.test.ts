// Thousands of random operations against a plain model. SEED repeats a run, STEPS makes it longer.
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { newSeed, PAGE, random } from '../blktap/support.js';
import { memoryFolder } from './power/server.js';
import { TreeModel } from './tree/model.js';
import { StoreDriver } from './tree/store-driver.js';

const STEPS = Number(process.env.STEPS ?? 3000);
const BYTES = 130 * PAGE - 1000; // no whole number of index leaves, nor of pages

test('a tree of clones under random operations holds what it must, with clean-up and kills', async () => {
  const rand = random(newSeed('tree'));
  const folder = await memoryFolder();
  const driver = await StoreDriver.create(BYTES, join(folder, 'store'), join(folder, 'nbd'));
  const model = new TreeModel(driver, rand);
  for (let step = 0; step < STEPS; step++) {
    await model.step();
    if (step % 500 === 499) await model.check();
  }
  await model.check();
  await driver.reopen();
  console.log([...model.counts].map(([name, count]) => `${name}: ${count}`).join(', '));
  for (const name of ['snapshot', 'clone', 'kill', 'commit done']) {
    expect(model.counts.get(name) ?? 0, name).toBeGreaterThan(0);
  }
}, 600_000);

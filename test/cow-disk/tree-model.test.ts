// Thousands of random operations against a plain model. SEED repeats a run, STEPS makes it longer.
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { newSeed, PAGE, random } from '../blktap/support.js';
import { memoryFolder } from './power/server.js';
import { DiskDriver } from './tree/disk-driver.js';
import { TreeModel } from './tree/model.js';

const STEPS = Number(process.env.STEPS ?? 2000);

test('random operations, reopenings and kills: each disk and generation holds what it must', async () => {
  const rand = random(newSeed('tree'));
  const folder = await memoryFolder();
  const directory = join(folder, 'disk');
  const driver = await DiskDriver.create(300 * PAGE, directory, join(folder, 'nbd'));
  const model = new TreeModel(driver, rand);
  for (let step = 0; step < STEPS; step++) {
    await model.step();
    if (step % 500 === 499) await model.check();
  }
  await model.check();
  expect(model.counts.get('snapshot')).toBeGreaterThan(0);
  console.log([...model.counts].map(([name, count]) => `${name}: ${count}`).join(', '));
}, 600_000);

// Power cuts at any instant of a random workload: see power/file-system.ts for what a disk may lose
// and power/ledger.ts for what must be there. SEED repeats the choices, not how threads interleave;
// CUTS and ROUNDS make it longer; KEEP names a folder that gets the log and the state that failed.
import { expect, test } from 'vitest';
import { newSeed, random } from '../blktap/support.js';
import { Kind } from './power/log.js';
import { Recording, type Survivor } from './power/recording.js';
import { cutPoint, LOST, sample } from './power/sampler.js';
import { memoryFolder } from './power/server.js';

const PAGES = 200;
const ROUNDS = Number(process.env.ROUNDS ?? 3);
const CUTS = Number(process.env.CUTS ?? 150); // of each round

test('at any power cut: what was flushed is there, no page is mixed, generations are whole', async () => {
  const rand = random(newSeed('power cut'));
  const memory = await memoryFolder();
  let start: Survivor | undefined;
  for (let round = 0; round < ROUNDS; round++) {
    const recording = await Recording.make(
      memory,
      PAGES,
      rand,
      async (work) => {
        await work.run(60);
        await work.kill();
        await work.run(40);
        await work.kill();
        await work.run(40);
        await work.reopen();
        await work.run(40);
      },
      start,
    );
    const { entries, ledger } = recording;
    const next = Math.floor(rand() * CUTS); // the next round begins with what survived one of these
    for (let cut = 0; cut < CUTS; cut++) {
      const survivor = await recording.check(cutPoint(rand, entries), sample(rand));
      if (cut <= next) start = survivor ?? start;
    }
    console.log(`round ${round}: ${entries.length} calls, ${ledger.generations.length} forks`);
  }
}, 600_000);

test('killed at each sync of a fork, opened again, and then a power cut', async () => {
  const rand = random(newSeed('kill, then cut'));
  const memory = await memoryFolder();
  let cuts = 0;
  for (let sync = 1; sync <= 10; sync++) {
    const recording = await Recording.make(memory, 64, rand, async (work) => {
      await work.run(4);
      await work.killAtSync(sync);
      await work.run(4);
    });
    const { entries } = recording;
    const restart = entries.findLastIndex((entry) => entry.kind === Kind.start);
    for (let k = restart + 1; k <= entries.length; k++) {
      const kind = entries[k - 1]?.kind;
      // Nothing is lost by syncs and answers, and nothing gained by the rest.
      if (kind !== Kind.syncEnd && kind !== Kind.sent && kind !== Kind.rename) continue;
      for (const lost of LOST) await recording.check(k, lost);
      cuts++;
    }
  }
  expect(cuts).toBeGreaterThan(100);
}, 600_000);

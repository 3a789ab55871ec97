// Power cuts at any instant of a random workload on a store: see power/file-system.ts for what a
// disk may lose and power/ledger.ts for what must be there. SEED repeats the choices, not how threads
// interleave; CUTS and ROUNDS make it longer; KEEP names a folder that gets the log and the state
// that failed.
import { expect, test } from 'vitest';
import { journalLine, lineSum } from '../../src/cow-disk/journal-read.js';
import { newSeed, random } from '../blktap/support.js';
import { appended, contentOf } from './power/folders.js';
import { Kind } from './power/log.js';
import { Recording, type Survivor } from './power/recording.js';
import { cutPoint, LOST, sample } from './power/sampler.js';
import { memoryFolder } from './power/server.js';
import type { Workload } from './power/workload.js';

const PAGES = 60;
const ROUNDS = Number(process.env.ROUNDS ?? 3);
const CUTS = Number(process.env.CUTS ?? 100); // of each round

test('at any power cut: what was acknowledged is there, no page is mixed, generations are whole', async () => {
  const rand = random(newSeed('power cut'));
  const memory = await memoryFolder();
  let start: Survivor | undefined;
  for (let round = 0; round < ROUNDS; round++) {
    const recording = await Recording.make(
      memory,
      PAGES,
      rand,
      async (work) => {
        if (work.disks().length === 0) await work.act('create');
        await work.run(150);
        await work.kill();
        await work.run(100);
        await work.kill();
        await work.run(100);
        await work.reopen();
        await work.run(100);
      },
      start,
    );
    const { entries, work } = recording;
    const next = Math.floor(rand() * CUTS); // the next round begins with what survived one of these
    for (let cut = 0; cut < CUTS; cut++) {
      const survivor = await recording.check(cutPoint(rand, entries), sample(rand));
      if (cut <= next) start = survivor ?? start;
    }
    const counts = [...work.counts].map(([name, count]) => `${name} ${count}`).join(', ');
    console.log(`round ${round}: ${entries.length} calls, ${recording.states} states; ${counts}`);
  }
}, 600_000);

/** Lines that change nothing, as many as have the journal rewritten after the next one. */
function longJournal({ state, ...rest }: Survivor): Survivor {
  const path = 'store/store.journal';
  const text = contentOf(state, path);
  let last = lineSum(text.subarray(text.lastIndexOf(10, text.length - 2) + 1));
  const lines: Buffer[] = [];
  for (let bytes = 0; bytes < 64 * 1024; ) {
    const line = journalLine({ removed: { ['0'.repeat(32)]: null } }, last);
    lines.push(line);
    last = lineSum(line);
    bytes += line.length;
  }
  return { state: appended(state, path, Buffer.concat(lines)), ...rest };
}

const OPERATIONS: [string, (work: Workload) => Promise<unknown>][] = [
  ['a fork', (work) => work.act('snapshot')],
  ['a merge', (work) => work.merge()],
  ['a clone', (work) => work.act('clone')],
  ['a rollback', (work) => work.act('rollback')],
  ['a commit', (work) => work.act('commit').then(() => work.settled())],
  ['a flatten', (work) => work.act('flatten')],
  ['a journal rewritten', (work) => work.act('clone').then(() => work.requests(6))],
  ['the end of a disk', (work) => work.act('remove').then(() => work.settled())],
];

for (const [name, operate] of OPERATIONS) {
  test(`killed at each sync of ${name}, opened again, and then a power cut`, async () => {
    const rand = random(newSeed('kill, then cut'));
    const memory = await memoryFolder();
    const before = await Recording.make(memory, PAGES, rand, async (work) => {
      await work.act('create');
      for (const operation of ['snapshot', 'snapshot', 'snapshot', 'clone', 'snapshot'] as const) {
        await work.requests(12);
        await work.act(operation);
      }
    });
    const found = await before.check(before.entries.length, LOST[0] as (typeof LOST)[number]);
    if (found === undefined) throw new Error('no store');
    const start = name === 'a journal rewritten' ? longJournal(found) : found;
    let [cuts, states] = [0, 0];
    for (let sync = 1, killed = true; killed; sync++) {
      const recording = await Recording.make(
        memory,
        PAGES,
        rand,
        async (work) => {
          killed = await work.killAtSync(sync, () => operate(work));
          if (!killed) return;
          await work.act('drop'); // needs the journal alone
          await work.requests(6);
        },
        start,
      );
      if (!killed) {
        expect(sync, 'syncs').toBeGreaterThan(3);
        console.log(`${name}: ${sync - 1} kills, ${cuts} cuts, ${states} different`);
        break;
      }
      const { entries } = recording;
      const restart = entries.findLastIndex((entry) => entry.kind === Kind.start);
      for (let k = restart + 1; k <= entries.length; k++) {
        const kind = entries[k - 1]?.kind;
        // Nothing is lost by syncs and answers, and nothing gained by the rest.
        if (kind !== Kind.syncEnd && kind !== Kind.stdout && kind !== Kind.rename) continue;
        for (const lost of LOST) await recording.check(k, lost);
        cuts++;
      }
      states += recording.states;
    }
  }, 600_000);
}

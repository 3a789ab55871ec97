import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { checkStore } from '../../src/cow-disk/check.js';
import { Store } from '../../src/cow-disk/store.js';
import { cleanup, newSeed, random, temporary } from '../blktap/support.js';
import { operations, stateOf } from './scenario.js';
import { openStore } from './store-support.js';

/** Points in the scenario at which it is killed, a system call: one in each of as many equal parts. */
const KILLS = Number(process.env.KILLS ?? 6);

let expected: Promise<string[]> | undefined;

/** What must be there after each operation, by doing them undisturbed. */
async function expectedStates(): Promise<string[]> {
  const states = [JSON.stringify({})];
  for (let count = 1; count <= operations.length; count++) {
    const folder = await temporary();
    const directory = join(folder, 'store');
    await Store.create(directory);
    const store = await openStore(directory);
    for (const operation of operations.slice(0, count)) await operation(store, folder);
    states.push(JSON.stringify(await stateOf(store)));
    await store.close();
  }
  return states;
}

/**
 * Runs the scenario in a process killed at the `when`th call of `call`, or never. Operations it
 * finished; calls it made, where it was not killed.
 */
async function killedAt(
  directory: string,
  folder: string,
  call: string,
  when?: number,
): Promise<{ done: number; killed: boolean; calls: number }> {
  const here = fileURLToPath(new URL('.', import.meta.url));
  const trace = join(folder, 'trace');
  const child = spawn(
    'strace',
    [
      ...['-f', '-o', trace, '-e', `trace=${call}`],
      ...(when === undefined ? [] : ['-e', `inject=${call}:signal=KILL:when=${when}`]),
      ...[process.execPath, '--import', join(here, '../blktap/ts-loader.mjs')],
      ...[join(here, 'scenario.ts'), directory, folder],
    ],
    // One thread for all calls, so that they are counted in order.
    { env: { ...process.env, UV_THREADPOOL_SIZE: '1' }, stdio: ['ignore', 'pipe', 'pipe'] },
  );
  let [output, errors] = ['', ''];
  child.stdout.on('data', (chunk: Buffer) => {
    output += chunk.toString();
  });
  child.stderr.on('data', (chunk: Buffer) => {
    errors += chunk.toString();
  });
  const closed = once(child, 'close');
  cleanup(async () => {
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGTERM');
    await closed;
  });
  await closed;
  const killed = child.signalCode === 'SIGKILL';
  if (!killed) expect(child.exitCode, errors).toBe(0);
  const calls = (await readFile(trace, 'utf8')).split('\n').filter((line) => line.includes(call));
  return { done: output.split('\n').length - 1, killed, calls: calls.length };
}

async function newFolders(): Promise<{ directory: string; sockets: string }> {
  const folder = await temporary();
  const [directory, sockets] = [join(folder, 'store'), join(folder, 'sockets')];
  await mkdir(sockets);
  await Store.create(directory);
  return { directory, sockets };
}

/** Kills the scenario at a call; what is left must open, as before or after the operation it was in. */
async function survives(states: string[], call: string, when: number, must: boolean) {
  const { directory, sockets } = await newFolders();
  const { done, killed } = await killedAt(directory, sockets, call, when);
  const where = `${call} ${when}, ${done} done`;
  if (must) expect(killed, where).toBe(true);
  const found = await checkStore(directory);
  expect(
    found.filter((each) => each.severity === 'error'),
    where,
  ).toEqual([]);
  const store = await openStore(directory);
  const state = JSON.stringify(await stateOf(store));
  const [before = '', after = ''] = [states[done], states[done + 1]];
  // A snapshot that was never reported may be there without its name.
  const unnamed = after.replace(/@(\w+)"/g, (all) => (before.includes(all) ? all : '@null"'));
  expect([before, after, unnamed], where).toContain(state);
  await store.settled();
  await store.close();
  const left = await checkStore(directory);
  expect(
    left.filter((each) => each.severity !== 'note'),
    where,
  ).toEqual([]);
  return done;
}

// Transactions are written by fdatasync, slices made and merged by fsync, files removed by unlink.
for (const call of ['fdatasync', 'fsync', 'unlink']) {
  test(
    `killed anywhere in every operation, at ${call}: the store opens, nothing is half done`,
    async () => {
      expected ??= expectedStates();
      const states = await expected;
      const rand = random(newSeed(`kill ${call}`));
      const whole = await newFolders();
      const { calls, done: all } = await killedAt(whole.directory, whole.sockets, call);
      expect(all).toBe(operations.length);
      const kills = Math.min(KILLS, calls);
      console.log(`${kills} of ${calls} points; KILLS=${calls} for all`);
      const points = Array.from(
        { length: kills },
        (_, kill) => 1 + Math.floor(((kill + rand()) * calls) / kills),
      );
      const seen = new Set<number>();
      while (points.length > 0) {
        // The number of calls differs a little with when background work comes to run.
        const ended = await Promise.allSettled(
          points.splice(0, 2).map((when) => survives(states, call, when, when < calls * 0.9)),
        );
        for (const each of ended) {
          if (each.status === 'rejected') throw each.reason;
          seen.add(each.value);
        }
      }
      expect(seen.size).toBeGreaterThan(Math.min(3, kills - 2));
    },
    60_000 + 10_000 * KILLS,
  );
}

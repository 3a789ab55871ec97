import { spawn } from 'node:child_process';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeAll, expect, test } from 'vitest';
import { newSeed } from '../blktap/support.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const FUZZ_S = 8;

const cleanups: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  while (cleanups.length > 0) await cleanups.pop()?.();
});

/** Runs scripts/fuzz.mjs to its end; it ends with the test if it does not before. */
async function fuzz(...args: string[]): Promise<{ status: number | null; output: string }> {
  const child = spawn(process.execPath, ['scripts/fuzz.mjs', ...args], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
  }
  const closed = new Promise<number | null>((resolve) => child.once('close', resolve));
  cleanups.push(async () => {
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGTERM');
    await closed;
  });
  return { status: await closed, output };
}

beforeAll(async () => {
  const { status, output } = await fuzz('--build');
  expect(status, output).toBe(0);
}, 600_000);

for (const target of ['nbd', 'slice', 'replica', 'parity', 'packed', 'wire']) {
  test(`${target}: nothing is found in ${FUZZ_S} s, from the corpus on`, async () => {
    const seed = (newSeed(`fuzz ${target}`) % (2 ** 31 - 1)) + 1;
    const corpus = await mkdtemp(join(tmpdir(), 'sf-corpus-'));
    cleanups.push(() => rm(corpus, { recursive: true, force: true }));
    const { status, output } = await fuzz(
      ...[target, '--time', String(FUZZ_S), '--seed', String(seed), '--corpus', corpus],
    );
    // The end of the output has what was found, and the command that runs it again.
    expect(status, output.slice(-8000)).toBe(0);
    const known = await readdir(join(root, 'test', 'fuzz', 'corpus', target));
    const runs = Number(/number_of_executed_units: (\d+)/.exec(output)?.[1]);
    expect(runs, output.slice(-2000)).toBeGreaterThan(known.length);
  });
}

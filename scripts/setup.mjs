// Sets the project up on a fresh Debian machine: packages, npm packages, native and TypeScript
// builds, guest image. Runs in a fresh clone, so it uses nothing but Node.js.
//
//   node scripts/setup.mjs [--quiet] [-v|--verbose]
//
// Each step says what it does, is skipped when it is done already, and on failure prints the
// command to run by hand; the exit status is then not 0. Ctrl-C ends it between or in steps; the
// next run goes on from there. Two at once: the second waits for the first.
import { spawn } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, openSync } from 'node:fs';
import { release } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { unmetRequirements } from './lib/requirements.mjs';
import { Interrupted, run, StepError } from './lib/run.mjs';
import { steps } from './lib/steps.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const work = join(root, '.cache', 'setup');
const options = new Set(process.argv.slice(2));
const quiet = options.delete('--quiet');
const verbose = [options.delete('-v'), options.delete('--verbose')].includes(true);

/** A step this long is worth a line even when it had nothing to do. */
const SLOW_MS = 1500;
/** Longest wait for another set-up: a whole one on a slow machine. */
const LOCK_WAIT_S = 3600;

const say = (/** @type {string} */ line) => {
  if (!quiet) process.stdout.write(`setup: ${line}\n`);
};
const seconds = (/** @type {number} */ since) =>
  `${((performance.now() - since) / 1000).toFixed(1)} s`;

const abort = new AbortController();
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.on(signal, () => abort.abort());
}

/**
 * Holds the lock until this process ends, however it ends: the kernel's lock on an open file, taken
 * by flock(1) on the descriptor it inherits.
 */
async function lock() {
  mkdirSync(work, { recursive: true });
  const file = openSync(join(work, 'lock'), 'w');
  const take = (/** @type {string[]} */ args) =>
    new Promise((resolve, reject) => {
      const child = spawn('flock', [...args, '3'], {
        stdio: ['ignore', 'ignore', 'inherit', file],
      });
      const stop = () => child.kill();
      abort.signal.addEventListener('abort', stop, { once: true });
      child.on('error', reject);
      child.on('close', (status) => {
        abort.signal.removeEventListener('abort', stop);
        resolve(status === 0);
      });
    });
  if (await take(['-n'])) return;
  say('another set-up of this folder is running, waiting for it');
  if (await take(['-w', String(LOCK_WAIT_S)])) return;
  if (abort.signal.aborted) throw new Interrupted();
  throw new StepError('another set-up does not come to an end', 'end it, then: npm run setup');
}

async function main() {
  if (options.size > 0) {
    throw new StepError(
      `unknown option ${[...options][0]}`,
      'node scripts/setup.mjs [--quiet] [-v]',
    );
  }
  const unmet = unmetRequirements({
    platform: process.platform,
    arch: process.arch,
    kernel: release(),
    node: process.version,
  });
  if (unmet.length > 0) throw new StepError(unmet.join('; '), 'npm run setup, when that is mended');
  await lock();
  const start = performance.now();
  let done = 0;
  for (const step of steps(root)) {
    const reason = step.reason();
    if (reason === undefined) {
      if (verbose) say(`${step.title}: ok, up to date`);
      continue;
    }
    const from = performance.now();
    let announced = false;
    const announce = () => {
      announced = true;
      say(`${step.title}: ${reason}`);
    };
    const slow = step.asksItself && !verbose ? setTimeout(announce, SLOW_MS) : undefined;
    if (!slow) announce();
    const log = join(work, `${step.title.replaceAll(' ', '-')}.log`);
    try {
      await step.run((argv, byHand, env) =>
        run(argv, {
          cwd: root,
          log,
          verbose,
          byHand,
          signal: abort.signal,
          ...(env ? { env } : {}),
        }),
      );
    } catch (error) {
      if (error instanceof StepError) error.message = `${step.title}: ${error.message}`;
      throw error;
    } finally {
      clearTimeout(slow);
    }
    if (announced) {
      done += 1;
      say(`${step.title}: done in ${seconds(from)}`);
    }
  }
  if (done > 0) say(`done in ${seconds(start)}`);
  // Executable for `npm link` and for calling it by path.
  const cli = join(root, 'dist/src/cli/main.js');
  if (existsSync(cli)) chmodSync(cli, 0o755);
}

try {
  await main();
} catch (error) {
  if (error instanceof Interrupted) {
    process.stderr.write('setup: interrupted; run it again to go on\n');
    process.exitCode = 130;
  } else if (error instanceof StepError) {
    process.stderr.write(`setup: ${error.message}\n  by hand: ${error.byHand}\n`);
    process.exitCode = 1;
  } else {
    process.stderr.write(`setup: ${error instanceof Error ? error.stack : String(error)}\n`);
    process.exitCode = 1;
  }
}

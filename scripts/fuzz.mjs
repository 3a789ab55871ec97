// Builds and runs a fuzz target (native/fuzz): npm run fuzz -- TARGET [options]; docs/testing.md.
//
// Whatever way it ends, the scratch folder on tmpfs goes with it. An input that breaks something is
// kept in .cache/fuzz/crashes, and the command that runs it again is printed.
import { spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const LIBFUZZER_INTERRUPTED = 72;
const TARGETS = ['nbd', 'slice', 'replica', 'parity', 'packed', 'wire'];
const USAGE = `npm run fuzz -- ${TARGETS.join('|')} [options]
  --time S       seconds to run (60)
  --seed N       of the mutations (drawn, and printed)
  --corpus DIR   inputs found go here (.cache/fuzz/corpus/TARGET)
  --replay FILE  runs one input and nothing else
  --minimize DIR writes the fewest inputs of the corpus that reach all it reaches
  --build        builds and runs nothing; all targets if none is named`;

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const out = join(root, '.cache', 'fuzz');

/** @param {string} text @returns {never} */
function usage(text) {
  process.stderr.write(`${text}\n${USAGE}\n`);
  process.exit(2);
}

function options() {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: {
        time: { type: 'string', default: '60' },
        seed: { type: 'string' },
        corpus: { type: 'string' },
        replay: { type: 'string' },
        minimize: { type: 'string' },
        build: { type: 'boolean', default: false },
      },
    });
    return { values, positionals };
  } catch (error) {
    return usage(/** @type {Error} */ (error).message);
  }
}

/** @param {string | undefined} text @param {string} name */
function natural(text, name) {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1 || value > 0xffff_ffff) {
    usage(`--${name} is a number from 1`);
  }
  return value;
}

/** The child that runs now: what this process is told to end with ends it too. */
/** @type {import('node:child_process').ChildProcess | undefined} */
let child;
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.on(signal, () => {
    if (child === undefined) process.exit(130);
    child.kill(signal);
  });
}

/** @param {string} command @param {string[]} args @param {NodeJS.ProcessEnv} [env] */
function run(command, args, env = {}) {
  return new Promise((done) => {
    child = spawn(command, args, {
      cwd: root,
      stdio: ['ignore', 'inherit', 'inherit'],
      env: { ...process.env, ...env },
    });
    child.on('error', (error) => {
      process.stderr.write(`cannot run ${command} (${error.message}): run npm run setup\n`);
      done(3);
    });
    child.on('close', (status, signal) => {
      child = undefined;
      done(signal === null && status !== LIBFUZZER_INTERRUPTED ? status : 130);
    });
  });
}

const { values, positionals } = options();
const [target, ...rest] = positionals;
if (rest.length > 0) usage(`what is ${rest[0]}?`);
if (target === undefined ? !values.build : !TARGETS.includes(target)) {
  usage(target === undefined ? 'a target is missing' : `there is no target ${target}`);
}
const seconds = natural(values.time, 'time');
const seed = values.seed === undefined ? randomInt(1, 2 ** 31) : natural(values.seed, 'seed');

const wanted = target === undefined ? TARGETS : [target];
const built = await run('make', [
  ...['--no-print-directory', '-f', 'native/fuzz/Makefile', `-j${availableParallelism()}`],
  ...['OUT=.cache/fuzz', ...wanted.map((name) => `.cache/fuzz/${name}`)],
]);
if (built !== 0) {
  process.stderr.write('the fuzz targets could not be built; npm run setup installs clang\n');
  process.exit(built === 130 ? 130 : 3);
}
if (values.build || target === undefined) process.exit(0);

const seeds = join(root, 'test', 'fuzz', 'corpus', target);
const corpus = resolve(values.corpus ?? join(out, 'corpus', target));
const crashes = join(out, 'crashes');
mkdirSync(corpus, { recursive: true });
mkdirSync(crashes, { recursive: true });
const scratch = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'sf-fuzz-'));
process.on('exit', () => rmSync(scratch, { recursive: true, force: true }));

const prefix = join(crashes, `${target}-${seed}-`);
const args = [
  `-seed=${seed}`,
  '-rss_limit_mb=2048', // of the whole process, AddressSanitizer's share included
  '-malloc_limit_mb=64', // a request has at most 32 MiB
  '-timeout=120', // one input; most take a millisecond
  '-max_len=4096',
  '-len_control=0', // what an input means is decided by all of its bytes
  `-artifact_prefix=${prefix}`,
];
const dictionary = join(root, 'native', 'fuzz', `${target}.dict`);
if (existsSync(dictionary)) args.push(`-dict=${dictionary}`);
const folders = existsSync(seeds) ? [corpus, seeds] : [corpus];
if (values.replay !== undefined) {
  args.push(resolve(values.replay));
} else if (values.minimize !== undefined) {
  mkdirSync(resolve(values.minimize), { recursive: true });
  args.push('-merge=1', '-use_counters=0', resolve(values.minimize), ...folders);
} else {
  args.push(`-max_total_time=${seconds}`, '-print_final_stats=1', ...folders);
}
process.stdout.write(`fuzz ${target}: --seed ${seed}\n`);
const before = Date.now();
const status = await run(join(out, target), args, {
  SNOWFLOCK_FUZZ_DIR: scratch,
  UBSAN_OPTIONS: 'print_stacktrace=1',
});
if (status === 0) {
  process.stdout.write(`fuzz ${target}: nothing found\n`);
} else if (status !== 130) {
  const kept = readdirSync(crashes)
    .map((name) => join(crashes, name))
    .find((path) => path.startsWith(prefix) && statSync(path).mtimeMs >= before);
  const found = values.replay ?? kept;
  const name = found === undefined ? 'FILE' : relative(root, resolve(found));
  process.stderr.write(
    `fuzz ${target}: FOUND with --seed ${seed}. Run it again:\n  npm run fuzz -- ${target} --replay ${name}\n`,
  );
}
process.exitCode = status === 0 ? 0 : status === 130 ? 130 : 1;

// Runs the commands of set-up: output into a log, shown when the command fails.
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync } from 'node:fs';
import { dirname } from 'node:path';

/** A command failed; `byHand` is what a person can run to see it. */
export class StepError extends Error {
  /**
   * @param {string} message
   * @param {string} byHand
   */
  constructor(message, byHand) {
    super(message);
    this.byHand = byHand;
  }
}

/** The user interrupted set-up. */
export class Interrupted extends Error {}

const LOG_LINES_SHOWN = 25;

/**
 * The command with `sudo` before it when this is not root. Undefined: neither root nor sudo.
 * @param {readonly string[]} argv
 * @param {readonly string[]} [keep] environment variables sudo must keep
 * @returns {string[] | undefined}
 */
export function asRoot(argv, keep = []) {
  if (process.getuid?.() === 0) return [...argv];
  if (spawnSync('sudo', ['-V'], { stdio: 'ignore' }).error) return undefined;
  const preserve = keep.length > 0 ? [`--preserve-env=${keep.join(',')}`] : [];
  return ['sudo', ...preserve, ...argv];
}

/**
 * Runs a command to its end. A signal to set-up is handed on, and set-up ends when the command
 * has.
 * @param {readonly string[]} argv
 * @param {{ cwd: string, log: string, verbose: boolean, byHand: string, signal: AbortSignal,
 *           env?: NodeJS.ProcessEnv }} options
 * @returns {Promise<void>}
 */
export async function run(argv, { cwd, log, verbose, byHand, signal, env }) {
  if (signal.aborted) throw new Interrupted();
  mkdirSync(dirname(log), { recursive: true });
  const output = openSync(log, 'w');
  const [command = '', ...args] = argv;
  /** @type {{ status: number | null, error?: Error }} */
  const ended = await new Promise((resolve) => {
    const child = spawn(command, args, {
      cwd,
      env: { ...process.env, ...env },
      // sudo asks for its password on the terminal itself.
      stdio: ['inherit', verbose ? 'inherit' : output, verbose ? 'inherit' : output],
    });
    const pass = () => child.kill('SIGTERM');
    signal.addEventListener('abort', pass, { once: true });
    child.on('error', (error) => resolve({ status: null, error }));
    child.on('close', (status) => {
      signal.removeEventListener('abort', pass);
      resolve({ status });
    });
  });
  closeSync(output);
  if (signal.aborted) throw new Interrupted();
  if (ended.status === 0) return;
  if (!verbose) {
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n').slice(-LOG_LINES_SHOWN);
    for (const line of lines) process.stderr.write(`  | ${line}\n`);
  }
  const how = ended.error ? ended.error.message : `exit status ${ended.status}`;
  throw new StepError(`${command} failed (${how})`, byHand);
}

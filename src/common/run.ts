import { spawn } from 'node:child_process';
import type { Readable } from 'node:stream';
import { SnowflockError } from './errors.js';

export interface RunOptions {
  cwd?: string;
  env?: Record<string, string>;
  /** Text, or this process's own standard input. */
  input?: string | 'inherit';
  /** A descriptor that takes standard output; else it is collected. */
  stdout?: number;
  /** What it writes to standard output (1), and to descriptor 3, which is made for this. */
  onText?: (from: 1 | 3, text: string) => void;
  /** Ends the command (SIGTERM, after 5 s SIGKILL); E_INTERRUPTED once it has ended. */
  signal?: AbortSignal | undefined;
}

const OUTPUT_LIMIT_BYTES = 16 << 20;
const END_LIMIT_MS = 5_000;

/** A command line as a person would type it. */
export function commandLine(command: string, args: readonly string[]): string {
  const quote = (word: string) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word}'`);
  return [command, ...args].map(quote).join(' ');
}

/**
 * Runs a command to its end. Resolves with what it wrote; rejects with E_REQUIREMENT if it is not
 * installed, else E_IO naming the command to run by hand and the end of what it said.
 */
export async function run(
  command: string,
  args: readonly string[],
  options: RunOptions = {},
): Promise<{ stdout: string; stderr: string }> {
  const interrupted = () => new SnowflockError('E_INTERRUPTED', `${command} was interrupted`);
  if (options.signal?.aborted) throw interrupted();
  const line = commandLine(command, args);
  return await new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: options.cwd,
      env: { ...process.env, LC_ALL: 'C.UTF-8', ...options.env },
      stdio: [
        options.input === 'inherit' ? 'inherit' : 'pipe',
        options.stdout ?? 'pipe',
        'pipe',
        options.onText === undefined ? 'ignore' : 'pipe',
      ],
    });
    let killer: NodeJS.Timeout | undefined;
    const end = () => {
      child.kill('SIGTERM');
      killer ??= setTimeout(() => child.kill('SIGKILL'), END_LIMIT_MS);
    };
    options.signal?.addEventListener('abort', end, { once: true });
    const done = () => {
      options.signal?.removeEventListener('abort', end);
      clearTimeout(killer);
    };
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let bytes = 0;
    const collect = (into: Buffer[]) => (data: Buffer) => {
      bytes += data.length;
      if (bytes <= OUTPUT_LIMIT_BYTES) into.push(data);
    };
    child.stdout?.on('data', (data: Buffer) => {
      if (options.onText === undefined) collect(out)(data);
      else options.onText(1, data.toString());
    });
    child.stderr?.on('data', collect(err));
    (child.stdio[3] as Readable | null)?.on('data', (data: Buffer) =>
      options.onText?.(3, data.toString()),
    );
    child.stdin?.on('error', () => {}); // it ended without reading: its exit status tells
    child.stdin?.end(options.input ?? '');
    child.on('error', (cause: NodeJS.ErrnoException) => {
      done();
      if (cause.code === 'ENOENT') {
        reject(
          new SnowflockError('E_REQUIREMENT', `${command} is not installed (needed: ${line})`),
        );
      } else {
        reject(new SnowflockError('E_IO', `cannot run ${line}: ${cause.message}`, { cause }));
      }
    });
    child.on('close', (code, signal) => {
      done();
      const stdout = Buffer.concat(out).toString();
      const stderr = Buffer.concat(err).toString();
      if (code === 0) {
        resolve({ stdout, stderr });
        return;
      }
      // Ctrl-C in a terminal reaches the command too, perhaps before this process learns of it.
      if (options.signal?.aborted === true || signal === 'SIGINT') {
        reject(interrupted());
        return;
      }
      const tail = (stderr || stdout).trim().split('\n').slice(-5).join('\n');
      const how = code === null ? `was ended by ${signal}` : `failed with status ${code}`;
      reject(new SnowflockError('E_IO', `${line} ${how}; run it by hand to see why:\n${tail}`));
    });
  });
}

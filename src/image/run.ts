import { spawn } from 'node:child_process';
import { SnowflockError } from '../common/errors.js';

export interface RunOptions {
  cwd?: string;
  env?: Record<string, string>;
  input?: string;
  /** Ends the command (SIGTERM) and rejects with E_INTERRUPTED. */
  signal?: AbortSignal | undefined;
}

const OUTPUT_LIMIT_BYTES = 16 << 20;

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
  if (options.signal?.aborted) throw new SnowflockError('E_INTERRUPTED', 'image build interrupted');
  const line = commandLine(command, args);
  return await new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: options.cwd,
      env: { ...process.env, LC_ALL: 'C.UTF-8', ...options.env },
      stdio: ['pipe', 'pipe', 'pipe'],
      signal: options.signal,
    });
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let bytes = 0;
    const collect = (into: Buffer[]) => (data: Buffer) => {
      bytes += data.length;
      if (bytes <= OUTPUT_LIMIT_BYTES) into.push(data);
    };
    child.stdout.on('data', collect(out));
    child.stderr.on('data', collect(err));
    child.stdin.on('error', () => {}); // it ended without reading: its exit status tells
    child.stdin.end(options.input ?? '');
    child.on('error', (cause: NodeJS.ErrnoException) => {
      if (cause.code === 'ENOENT') {
        reject(
          new SnowflockError('E_REQUIREMENT', `${command} is not installed (needed: ${line})`),
        );
      } else if (cause.name === 'AbortError') {
        reject(new SnowflockError('E_INTERRUPTED', 'image build interrupted'));
      } else {
        reject(new SnowflockError('E_IO', `cannot run ${line}: ${cause.message}`, { cause }));
      }
    });
    child.on('close', (code, signal) => {
      const stdout = Buffer.concat(out).toString();
      const stderr = Buffer.concat(err).toString();
      if (code === 0) {
        resolve({ stdout, stderr });
        return;
      }
      const end = (stderr || stdout).trim().split('\n').slice(-5).join('\n');
      const how = code === null ? `was ended by ${signal}` : `failed with status ${code}`;
      reject(new SnowflockError('E_IO', `${line} ${how}; run it by hand to see why:\n${end}`));
    });
  });
}

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { projectRoot } from '../../src/common/native.js';
import { cleanup } from '../blktap/support.js';

const MAIN = join(projectRoot, 'dist/src/cli/main.js');

export interface Outcome {
  status: number | null;
  stdout: string;
  /** Standard output as it came. */
  bytes: Buffer;
  stderr: string;
}

/** Starts the command line tool, as a process of its own. Standard input is a pipe. */
export function start(
  args: string[],
  env: Record<string, string> = {},
  namespace?: string,
  user: { uid?: number; gid?: number } = {},
): ChildProcess {
  // `ip netns exec` becomes node itself, so the pid is node's.
  const [program = '', ...words] = [
    ...(namespace === undefined ? [] : ['ip', 'netns', 'exec', namespace]),
    process.execPath,
    MAIN,
    ...args,
  ];
  return spawn(program, words, {
    ...user,
    env: { ...process.env, ...env },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
}

/** What a process wrote and how it ended. */
export async function outcome(child: ChildProcess): Promise<Outcome> {
  const chunks: Buffer[] = [];
  let stderr = '';
  child.stdout?.on('data', (data: Buffer) => chunks.push(data));
  child.stderr?.on('data', (data: Buffer) => {
    stderr += data.toString();
  });
  const [status] = (await once(child, 'close')) as [number | null];
  const bytes = Buffer.concat(chunks);
  return { status, stdout: bytes.toString(), bytes, stderr };
}

/** Runs the tool to its end. */
export async function snowflock(
  args: string[],
  options: {
    input?: Buffer;
    env?: Record<string, string>;
    namespace?: string;
    uid?: number;
    gid?: number;
  } = {},
): Promise<Outcome> {
  const { uid, gid } = options;
  const child = start(args, options.env, options.namespace, {
    ...(uid === undefined ? {} : { uid }),
    ...(gid === undefined ? {} : { gid }),
  });
  child.stdin?.on('error', () => undefined); // it ended without reading
  child.stdin?.end(options.input);
  return outcome(child);
}

/** Runs the tool; its standard output, as JSON. Fails with what it said if it failed. */
export async function snowflockJson<T>(args: string[]): Promise<T> {
  const { status, stdout, stderr } = await snowflock([...args, '--json']);
  if (status !== 0) throw new Error(`${args.join(' ')} ended with ${status}: ${stderr}`);
  return JSON.parse(stdout) as T;
}

export interface Serving {
  pid: number;
  /** URIs by export. */
  uris: Map<string, string>;
  tcpUris: Map<string, string>;
  /** What it wrote to standard error so far. */
  said(): string;
  kill(signal: NodeJS.Signals): void;
  ended: Promise<Outcome>;
}

/** `disk serve`, once it has said what it exports (at least `exports`). It ends with the test. */
export async function serve(
  args: string[],
  exports: number,
  env: Record<string, string> = {},
  namespace?: string,
): Promise<Serving> {
  const child = start(['disk', 'serve', ...args, '--json'], env, namespace);
  const ended = outcome(child);
  let said = '';
  child.stderr?.on('data', (data: Buffer) => {
    said += data.toString();
  });
  cleanup(async () => {
    child.kill('SIGKILL'); // does nothing if it has ended
    await ended;
  });
  const uris = new Map<string, string>();
  const tcpUris = new Map<string, string>();
  if (child.stdout === null) throw new Error('no output');
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  while (uris.size < exports) {
    const line = await lines.next();
    if (line.done === true) throw new Error(`disk serve ended: ${(await ended).stderr}`);
    const shown = JSON.parse(line.value) as { export: string; uri: string; tcp_uri?: string };
    uris.set(shown.export, shown.uri);
    if (shown.tcp_uri !== undefined) tcpUris.set(shown.export, shown.tcp_uri);
  }
  return {
    pid: child.pid ?? 0,
    uris,
    tcpUris,
    said: () => said,
    kill: (signal) => child.kill(signal),
    ended,
  };
}

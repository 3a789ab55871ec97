import { PassThrough, type Readable, Writable } from 'node:stream';
import { asSnowflockError, isErrorCode, SnowflockError } from '../common/errors.js';
import { readLines } from '../common/lines.js';
import type { SnowflockClient } from './client.js';

const LINE_LIMIT_BYTES = 1024 * 1024;

/** How a program in a guest ended. */
export interface Exited {
  status: number | null;
  /** Number, as in signal(7). */
  signal: number | null;
}

/** A program that runs in a guest. */
export interface RemoteProcess {
  readonly stdin: Writable;
  readonly stdout: Readable;
  readonly stderr: Readable;
  readonly exited: Promise<Exited>;
  signal(name: string): void;
}

interface Message {
  stdout?: string;
  stderr?: string;
  exited?: Exited;
  error?: { code: string; message: string };
}

function parse(line: string): Message | undefined {
  try {
    return JSON.parse(line) as Message;
  } catch {
    return undefined;
  }
}

/** Runs a program in a VM's guest. Errors: E_NOT_FOUND, E_GUEST, E_DAEMON. */
export async function exec(
  client: SnowflockClient,
  vm: string,
  argv: string[],
  env?: Record<string, string>,
): Promise<RemoteProcess> {
  const query = `?request=${encodeURIComponent(JSON.stringify({ argv, env }))}`;
  const socket = await client.session(vm, 'exec', query);
  const stdout = new PassThrough();
  const stderr = new PassThrough();
  const send = (message: unknown, done?: (error?: Error | null) => void): void => {
    if (socket.destroyed) done?.();
    else socket.write(`${JSON.stringify(message)}\n`, (error) => done?.(error));
  };
  const exited = new Promise<Exited>((resolve, reject) => {
    readLines(socket, LINE_LIMIT_BYTES, (line) => {
      const message = parse(line);
      if (message === undefined) {
        socket.destroy(new SnowflockError('E_DAEMON', `the daemon said ${line.slice(0, 200)}`));
        return;
      }
      if (message.stdout !== undefined) stdout.write(Buffer.from(message.stdout, 'base64'));
      if (message.stderr !== undefined) stderr.write(Buffer.from(message.stderr, 'base64'));
      if (message.exited !== undefined) resolve(message.exited);
      if (message.error !== undefined) {
        const { code, message: text } = message.error;
        reject(new SnowflockError(isErrorCode(code) ? code : 'E_GUEST', text));
      }
    });
    socket.on('error', (error) => reject(asSnowflockError(error, 'E_DAEMON')));
    socket.on('close', () => {
      stdout.end();
      stderr.end();
      reject(new SnowflockError('E_DAEMON', 'the connection ended before the program did'));
    });
  });
  exited.catch(() => {});
  const stdin = new Writable({
    write: (chunk: Buffer, _encoding, done) => {
      if (chunk.length === 0) done();
      // Pieces stay far below the line limit of the other end, base64 included.
      for (let at = 0; at < chunk.length; at += 65_536) {
        const last = at + 65_536 >= chunk.length;
        const piece = chunk.subarray(at, at + 65_536).toString('base64');
        send({ stdin: piece }, last ? done : undefined);
      }
    },
    final: (done) => send({ eof: true }, done),
  });
  return { stdin, stdout, stderr, exited, signal: (name) => send({ signal: name }) };
}

import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { connect } from 'node:net';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { SnowflockError } from '../../src/common/errors.js';

const TICKS = 100; // a second; USER_HZ, the same on every Linux Node.js runs on

/** An NBD server in a process of its own. */
export class NbdProcess {
  protected constructor(
    readonly uri: string,
    protected readonly child: ChildProcess,
  ) {}

  /** Starts a peer's server; resolves when it accepts on `socketPath`. */
  static async start(
    socketPath: string,
    argv: readonly string[],
    env: NodeJS.ProcessEnv = {},
  ): Promise<NbdProcess> {
    const [command = '', ...rest] = argv;
    const child = spawn(command, rest, {
      stdio: ['ignore', 'ignore', 'pipe'],
      env: { ...process.env, ...env },
    });
    let said = ''; // among it complaints about the connection that only asks whether it listens
    child.stderr.on('data', (chunk: Buffer) => {
      said = `${said}${chunk}`.slice(-2000);
    });
    const failed = new Promise<never>((_, reject) => {
      child.once('error', reject);
      child.once('close', (status) => {
        reject(new SnowflockError('E_IO', `${argv.join(' ')} ended with ${status}: ${said}`));
      });
    });
    failed.catch(() => undefined);
    await Promise.race([accepts(socketPath), failed]);
    return new NbdProcess(`nbd+unix:///?socket=${socketPath}`, child);
  }

  /** CPU time of all its threads so far, seconds, in steps of 10 ms. */
  cpuSeconds(): number {
    const stat = readFileSync(`/proc/${this.child.pid}/stat`, 'utf8');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return (Number(fields[11]) + Number(fields[12])) / TICKS;
  }

  /** Lets its threads run on these CPUs only, e.g. `0` or `0-3`. */
  async runOn(cpus: string): Promise<void> {
    await promisify(execFile)('taskset', ['--all-tasks', '-cp', cpus, String(this.child.pid)]);
  }

  async stop(): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return;
    const exited = once(this.child, 'exit');
    this.child.kill('SIGKILL');
    await exited;
  }
}

/** Our own server (disk-child.ts). */
export class OwnProcess extends NbdProcess {
  readonly #lines: AsyncIterator<string>;

  private constructor(
    readonly socketPath: string,
    child: ChildProcess,
    lines: AsyncIterator<string>,
  ) {
    super(`nbd+unix:///?socket=${socketPath}`, child);
    this.#lines = lines;
  }

  static async serve(
    directory: string,
    socketPath: string,
    sizeBytes: number,
  ): Promise<OwnProcess> {
    const script = fileURLToPath(new URL('./disk-child.js', import.meta.url));
    const child = spawn(process.execPath, [script, directory, socketPath, String(sizeBytes)], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    child.stdin.on('error', () => undefined); // it ended; the next answer says so
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const served = new OwnProcess(socketPath, child, lines);
    await served.#answer();
    return served;
  }

  async ask<T>(command: string): Promise<T> {
    this.child.stdin?.write(`${command}\n`);
    return (await this.#answer()) as T;
  }

  /** Closes the disk; its folder may then be copied. */
  async close(): Promise<void> {
    const exited = once(this.child, 'exit');
    this.child.stdin?.end();
    const [status] = await exited;
    if (status !== 0) throw new SnowflockError('E_IO', `a disk's server ended with ${status}`);
  }

  async #answer(): Promise<unknown> {
    const line = await this.#lines.next();
    if (line.done === true) throw new SnowflockError('E_IO', "a disk's server process ended");
    return JSON.parse(line.value);
  }
}

/** Waits until somebody accepts on the socket. */
async function accepts(socketPath: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    const socket = connect(socketPath);
    try {
      await once(socket, 'connect');
      return;
    } catch (error) {
      if (tries > 1000) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    } finally {
      socket.destroy();
    }
  }
}

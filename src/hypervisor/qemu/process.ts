/**
 * A VM's process: started so that it outlives the daemon, recognised again by pid and start time,
 * ended by its own pid.
 *
 * The process gets its own session, an unprivileged user without supplementary groups, a bare
 * environment, no terminal, and its output in a file (a pipe would break with the daemon). A shell
 * sets what Node cannot set for a child alone (umask, limits, the preloaded library, which must not
 * be loaded into the shell) and then becomes the VM's process: same pid.
 *
 * Left out on purpose: the exit status of a process that an earlier daemon started; the kernel
 * tells it only to the parent.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { chownSync, closeSync, fstatSync, openSync, readFileSync, readSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { SnowflockError } from '../../common/errors.js';
import type { VmUser } from '../driver.js';

/** No core files: they would hold guest memory. SIGXFSZ: a full log must not end the VM. */
const WRAPPER = [
  'umask 077',
  'ulimit -c 0',
  'ulimit -n 1024',
  // dash counts in blocks of 512 bytes.
  'ulimit -f "$SF_FILE_BLOCKS"',
  "trap '' XFSZ",
  'if [ -n "$SF_PRELOAD" ]; then export LD_PRELOAD="$SF_PRELOAD"; fi',
  'unset SF_PRELOAD SF_FILE_BLOCKS',
  'exec "$0" "$@"',
].join('\n');

export interface ProcessIdentity {
  pid: number;
  startTicks: string;
  bootId: string;
}

export function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
}

/** Start time and state of a process; undefined if there is none. */
function procStat(pid: number): { startTicks: string; state: string } | undefined {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return undefined;
  }
  // The command name, in parentheses, may itself hold spaces and parentheses.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  const state = fields[0];
  const startTicks = fields[19];
  return state === undefined || startTicks === undefined ? undefined : { startTicks, state };
}

/** True while that very process exists (a zombie does not count). */
export function isAlive(identity: ProcessIdentity): boolean {
  if (identity.bootId !== bootId()) return false;
  const stat = procStat(identity.pid);
  return stat !== undefined && stat.startTicks === identity.startTicks && !/[ZX]/.test(stat.state);
}

/** The last `bytes` bytes of a file as text; empty if it cannot be read. */
export function tailOf(path: string, bytes = 4096): string {
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch {
    return '';
  }
  try {
    const size = fstatSync(fd).size;
    const buffer = Buffer.alloc(Math.min(size, bytes));
    const got = readSync(fd, buffer, 0, buffer.length, size - buffer.length);
    return buffer.toString('utf8', 0, got);
  } finally {
    closeSync(fd);
  }
}

export interface StartOptions {
  binary: string;
  args: string[];
  user: VmUser;
  logFile: string;
  /** Bound for every file the process writes; what is beyond it is dropped. */
  maxFileBytes: number;
  /** Becomes fd 3 of the process. */
  inheritFd?: number;
  preload?: string;
  env?: Record<string, string>;
}

export interface Exit {
  status: number | null;
  signal: string | null;
}

/** A running (or ended) process of a VM, started here or found again. */
export class VmProcess {
  readonly identity: ProcessIdentity;
  /** Resolves when the process is gone; never rejects. */
  readonly exited: Promise<Exit>;
  #exit: Exit | undefined;
  #stopWatching: () => void = () => {};
  #adoptedGone: (() => void) | undefined;

  private constructor(identity: ProcessIdentity, child: ChildProcess | undefined) {
    this.identity = identity;
    this.exited = new Promise((resolve) => {
      const done = (status: number | null, signal: string | null): void => {
        this.#exit ??= { status, signal };
        resolve(this.#exit);
      };
      if (child) child.once('exit', done);
      else this.#adoptedGone = () => done(null, null);
    });
    child?.unref();
  }

  /** Starts the process. @throws E_QEMU if it cannot be executed. */
  static async start(options: StartOptions): Promise<VmProcess> {
    const log = openSync(options.logFile, 'a', 0o600);
    let child: ChildProcess;
    try {
      chownSync(options.logFile, options.user.uid, options.user.gid);
      child = spawn('/bin/sh', ['-c', WRAPPER, options.binary, ...options.args], {
        // Node drops the supplementary groups when it is told a user.
        uid: options.user.uid,
        gid: options.user.gid,
        cwd: '/',
        detached: true,
        env: {
          PATH: '/usr/bin:/bin',
          SF_FILE_BLOCKS: String(Math.ceil(options.maxFileBytes / 512)),
          ...(options.preload === undefined ? {} : { SF_PRELOAD: options.preload }),
          ...options.env,
        },
        stdio: [
          'ignore',
          log,
          log,
          ...(options.inheritFd === undefined ? [] : [options.inheritFd]),
        ],
      });
    } finally {
      closeSync(log);
    }
    const error = await new Promise<Error | undefined>((resolve) => {
      child.once('spawn', () => resolve(undefined));
      child.once('error', resolve);
    });
    const pid = child.pid;
    if (error || pid === undefined) {
      throw new SnowflockError('E_QEMU', `could not start ${options.binary}`, { cause: error });
    }
    // A child that ended already is still there as a zombie until its 'exit' event.
    const startTicks = procStat(pid)?.startTicks ?? '0';
    return new VmProcess({ pid, startTicks, bootId: bootId() }, child);
  }

  /** Finds a process again. @throws E_NOT_FOUND if it is gone. */
  static adopt(identity: ProcessIdentity): VmProcess {
    if (!isAlive(identity)) {
      throw new SnowflockError('E_NOT_FOUND', `process ${identity.pid} of the VM is gone`);
    }
    return new VmProcess(identity, undefined);
  }

  get alive(): boolean {
    if (this.#exit) return false;
    const alive = isAlive(this.identity);
    if (!alive) this.#adoptedGone?.();
    return alive;
  }

  /**
   * Looks every `ms` whether the process is still there. Only for processes of an earlier daemon,
   * once their control connection broke; a child announces its end itself.
   */
  watch(ms = 20): void {
    if (!this.#adoptedGone || this.#exit) return;
    this.#stopWatching();
    const timer = setInterval(() => {
      if (!this.alive) clearInterval(timer);
    }, ms);
    timer.unref();
    this.#stopWatching = () => clearInterval(timer);
  }

  unwatch(): void {
    this.#stopWatching();
  }

  #kill(signal: NodeJS.Signals): void {
    // Between this look and the signal a pid cannot come round again: the kernel hands out all
    // others first.
    if (!this.alive) return;
    try {
      process.kill(this.identity.pid, signal);
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error;
    }
  }

  /** SIGTERM, then SIGKILL after `graceMs`. Resolves when the process is gone. @throws E_TIMEOUT. */
  async end(graceMs: number): Promise<void> {
    if (this.#exit) return;
    if (graceMs > 0) {
      this.#kill('SIGTERM');
      this.watch(5);
      if (await this.#gone(graceMs)) return;
    }
    this.#kill('SIGKILL');
    this.watch(5);
    if (await this.#gone(10_000)) return;
    throw new SnowflockError('E_TIMEOUT', `process ${this.identity.pid} survives SIGKILL`);
  }

  async #gone(ms: number): Promise<boolean> {
    const stop = new AbortController();
    const late = sleep(ms, false, { signal: stop.signal }).catch(() => false);
    const gone = await Promise.race([this.exited.then(() => true), late]);
    stop.abort();
    return gone;
  }
}

import { type ChildProcess, spawn } from 'node:child_process';
import { EventEmitter } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { projectRoot } from '../common/native.js';
import { within } from '../common/timeout.js';
import type { DataplaneEvent, Method, Params, Result } from '../dataplane/protocol.js';
import { connectToDataplane, type DataplaneClient } from '../dataplane/rpc.js';

export interface SupervisorOptions {
  socket: string;
  memtapSocket: string;
  vmGid: number;
  address: string;
  mcdistPort: number;
  maxOpenFiles: number;
  logPath: string;
}

const CONNECT_LIMIT_MS = 10_000;
const END_LIMIT_MS = 5_000;
/** A caller may hold a VM paused meanwhile: it must not wait for a data plane that never comes. */
const UP_LIMIT_MS = 20_000;
const RESTART_PAUSE_MIN_MS = 20;
const RESTART_PAUSE_MAX_MS = 2_000;

/**
 * Keeps one data plane running and connected.
 *
 * States: connecting -> up -> (connection lost) -> connecting ... -> closed.
 * A data plane outlives sfld: at start an existing one is taken over. When the connection is lost,
 * whether the process died or not, it is taken over again or replaced, and `restore` tells it all
 * that should exist before any other call goes through. Pauses between restarts double up to 2 s,
 * so that a data plane that dies at once does not burn the host.
 */
export class DataplaneSupervisor extends EventEmitter<{ event: [DataplaneEvent] }> {
  readonly #options: SupervisorOptions;
  readonly #log: Logger;
  readonly #restore: (call: DataplaneSupervisor['call']) => Promise<void>;
  #client: DataplaneClient | undefined;
  #up: Promise<void> = Promise.resolve();
  #closed = false;
  #pauseMs = RESTART_PAUSE_MIN_MS;
  #restarts = 0;

  constructor(
    options: SupervisorOptions,
    log: Logger,
    restore: (call: DataplaneSupervisor['call']) => Promise<void>,
  ) {
    super();
    this.#options = options;
    this.#log = log;
    this.#restore = restore;
  }

  get restarts(): number {
    return this.#restarts;
  }

  /** Resolves when the data plane is up and restored. Nothing is called before. */
  start(): Promise<void> {
    this.#up = this.#bringUp();
    this.#up.catch(() => {});
    return this.#up;
  }

  /**
   * Calls the data plane, after waiting for it if it is being restarted. Errors: E_DATAPLANE if it
   * does not come back in time; what the method answers.
   */
  readonly call = async <M extends Method>(
    method: M,
    params: Params<M>,
    timeoutMs?: number,
  ): Promise<Result<M>> => {
    await within(this.#up, UP_LIMIT_MS, 'restarting the data plane', 'E_DATAPLANE');
    return this.#direct(method, params, timeoutMs);
  };

  readonly #direct = <M extends Method>(
    method: M,
    params: Params<M>,
    timeoutMs?: number,
  ): Promise<Result<M>> => {
    if (this.#client === undefined) {
      return Promise.reject(new SnowflockError('E_DATAPLANE', 'the data plane is not running'));
    }
    return this.#client.call(method, params, timeoutMs);
  };

  /** Disconnects. The data plane itself ends only if `end` is set. */
  async close(end: boolean): Promise<void> {
    this.#closed = true;
    await this.#up.catch(() => {});
    const client = this.#client;
    this.#client = undefined;
    if (client === undefined) return;
    if (end) {
      const { pid } = await client.call('ping', {});
      const closed = new Promise<void>((resolve) => client.once('closed', () => resolve()));
      process.kill(pid, 'SIGTERM');
      await within(closed, END_LIMIT_MS, 'ending the data plane').catch(async () => {
        process.kill(pid, 'SIGKILL');
        await closed;
      });
    }
    client.close();
  }

  async #bringUp(): Promise<void> {
    const client = await this.#takeOverOrStart();
    this.#client = client;
    client.on('event', (event) => this.emit('event', event));
    try {
      await this.#restore(this.#direct);
      if (!client.open) throw new SnowflockError('E_DATAPLANE', 'the data plane ended at once');
    } catch (error) {
      this.#client = undefined;
      client.close();
      throw error;
    }
    client.once('closed', () => this.#lost());
    this.#pauseMs = RESTART_PAUSE_MIN_MS;
  }

  #lost(): void {
    this.#client = undefined;
    if (this.#closed) return;
    this.#restarts++;
    this.#log.warn({ pause_ms: this.#pauseMs }, 'data plane lost; bringing it up again');
    const again = async (): Promise<void> => {
      for (;;) {
        await new Promise((resolve) => setTimeout(resolve, this.#pauseMs));
        this.#pauseMs = Math.min(this.#pauseMs * 2, RESTART_PAUSE_MAX_MS);
        if (this.#closed) throw new SnowflockError('E_CLOSED', 'the daemon is ending');
        try {
          await this.#bringUp();
          return;
        } catch (error) {
          const { code, message } = asSnowflockError(error);
          this.#log.error({ code }, `data plane: ${message}`);
        }
      }
    };
    this.#up = again();
    this.#up.catch(() => {});
  }

  async #takeOverOrStart(): Promise<DataplaneClient> {
    try {
      return await connectToDataplane(this.#options.socket);
    } catch {
      // Nothing listens there: the normal case at start and after a crash.
    }
    const child = this.#start();
    const died = new Promise<never>((_, reject) => {
      child.once('exit', (code, signal) =>
        reject(
          new SnowflockError(
            'E_DATAPLANE',
            `the data plane ended at start (${signal ?? code}); see ${this.#options.logPath}`,
          ),
        ),
      );
      child.once('error', (error) =>
        reject(new SnowflockError('E_DATAPLANE', `cannot start the data plane: ${error.message}`)),
      );
    });
    died.catch(() => {});
    const limit = Date.now() + CONNECT_LIMIT_MS;
    for (;;) {
      try {
        return await Promise.race([died, connectToDataplane(this.#options.socket)]);
      } catch (error) {
        if (child.exitCode !== null || child.signalCode !== null || Date.now() > limit) throw error;
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    }
  }

  #start(): ChildProcess {
    const o = this.#options;
    const log = openSync(o.logPath, 'a', 0o600);
    try {
      // A process group of its own: it must outlive sfld and not hear the terminal's Ctrl-C.
      const child = spawn(
        process.execPath,
        [
          join(projectRoot, 'dist', 'src', 'dataplane', 'main.js'),
          '--socket',
          o.socket,
          '--memtap-socket',
          o.memtapSocket,
          '--vm-gid',
          String(o.vmGid),
          '--address',
          o.address,
          '--mcdist-port',
          String(o.mcdistPort),
          '--max-open-files',
          String(o.maxOpenFiles),
        ],
        { detached: true, stdio: ['ignore', log, log] },
      );
      child.unref();
      return child;
    } finally {
      closeSync(log);
    }
  }
}

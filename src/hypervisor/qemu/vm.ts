/**
 * One VM in one QEMU process (states: see ../driver.ts).
 *
 * Capture: QEMU is told to "migrate" to a socket of ours with `x-ignore-shared`, which leaves out
 * RAM that is shared with a file; what comes is CPU and device state and the firmware, some 40 KB.
 * All set-up (capabilities, parameters, listening socket) happens before, when the VM starts.
 *
 * Invariants: `#state` follows QEMU's own STOP/RESUME events, never our requests. QEMU finishes a
 * migration (in state finish-migrate) a moment after it announced its end; `cont` is refused in that
 * moment and then repeated. A capture that fails or is late is cancelled before the caller hears of
 * it, so that no rest of it can stop the VM after it was resumed.
 */
import { EventEmitter } from 'node:events';
import { rmSync } from 'node:fs';
import { createConnection } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { asSnowflockError, SnowflockError } from '../../common/errors.js';
import type { Instant, Vm, VmEvents, VmRecord, VmState } from '../driver.js';
import type { MachineShape } from '../shape.js';
import { NETDEV, type VmPaths, vmPaths } from './args.js';
import { keepBounded } from './console-log.js';
import { tailOf, type VmProcess } from './process.js';
import { type MigrationStatus, QmpClient, QmpError, type QmpEvent } from './qmp.js';
import { StateSocket } from './state-socket.js';

const FINISH_MS = 2000;
const RECONNECT_TRIES = 100;
const RECONNECT_EVERY_MS = 50;

const STATES: Readonly<Record<string, VmState>> = {
  running: 'running',
  inmigrate: 'prepared',
  shutdown: 'shutdown',
};

export interface VmParts {
  process: VmProcess;
  qmp: QmpClient;
  record: VmRecord;
  startMs: number;
  maxStateBytes: number;
}

export class QemuVm extends EventEmitter<VmEvents> implements Vm {
  readonly record: VmRecord;
  readonly startMs: number;
  readonly #process: VmProcess;
  readonly #paths: VmPaths;
  readonly #maxStateBytes: number;
  #qmp: QmpClient;
  #socket: StateSocket | undefined;
  #state: VmState = 'running';
  /** QEMU gives the state once per pause: it then counts the VM as moved away until `cont`. */
  #captured = false;
  #loading = false;
  #destroying = false;
  #released = false;
  #destroyed: Promise<void> | undefined;
  #stopRotation: () => void;
  readonly #migrationEnds = new Set<(status: MigrationStatus) => void>();

  private constructor(parts: VmParts) {
    super();
    this.record = parts.record;
    this.startMs = parts.startMs;
    this.#process = parts.process;
    this.#qmp = parts.qmp;
    this.#maxStateBytes = parts.maxStateBytes;
    this.#paths = vmPaths({
      runDir: parts.record.run_dir,
      channelSocket: parts.record.channel_socket,
    });
    this.#stopRotation = keepBounded(
      parts.record.console_log,
      parts.record.console_log_max_bytes,
      () => {},
    );
  }

  /** Takes over a process whose monitor answers: sets it up for captures and reads its state. */
  static async attach(parts: VmParts): Promise<QemuVm> {
    const vm = new QemuVm(parts);
    try {
      vm.#listen(parts.qmp);
      void parts.process.exited.then((exit) => vm.#onExit(exit.status, exit.signal));
      const { user } = parts.record;
      vm.#socket = await StateSocket.listen(vm.#paths.capture, user, vm.#maxStateBytes);
      await vm.#setUp();
      return vm;
    } catch (error) {
      vm.release();
      throw error;
    }
  }

  get id(): string {
    return this.record.id;
  }

  get shape(): MachineShape {
    return this.record.shape;
  }

  async #setUp(): Promise<void> {
    const before = await this.#readState();
    if (before.raw === 'finish-migrate') {
      // An earlier daemon died in the middle of a capture.
      await this.#qmp.execute('migrate_cancel', {});
      await this.#untilNot('finish-migrate');
    }
    await this.#qmp.execute('migrate-set-capabilities', {
      capabilities: [
        { capability: 'events', state: true },
        { capability: 'x-ignore-shared', state: true },
      ],
    });
    await this.#qmp.execute('migrate-set-parameters', {
      // Nothing may throttle a capture. No announcing: see guest_announce in args.ts.
      'max-bandwidth': 2 ** 40,
      'downtime-limit': 2_000_000,
      'announce-rounds': 0,
    });
    await this.#readState();
  }

  async #readState(): Promise<{ raw: string }> {
    const { status } = await this.#qmp.execute('query-status', {});
    if (this.#state !== 'exited') this.#state = STATES[status] ?? 'paused';
    this.#captured = status === 'postmigrate' || status === 'finish-migrate';
    return { raw: status };
  }

  #listen(qmp: QmpClient): void {
    qmp.on('event', (event) => this.#onEvent(event));
    qmp.once('close', () => void this.#onMonitorClosed());
    if (qmp.closed) void this.#onMonitorClosed();
  }

  #onEvent(event: QmpEvent): void {
    const { atMs } = event;
    if (event.event === 'STOP' && this.#state === 'running') {
      this.#state = 'paused';
      this.emit('paused', { atMs });
    } else if (event.event === 'RESUME') {
      this.#state = 'running';
      this.#captured = false;
      this.emit('resumed', { atMs });
    } else if (event.event === 'SHUTDOWN') {
      this.#state = 'shutdown';
      if (event.data.guest === true) this.#onGuestEnd(String(event.data.reason));
    } else if (event.event === 'GUEST_PANICKED') {
      this.emit('panic', { message: 'the guest reported a panic' });
    } else if (event.event === 'MIGRATION') {
      const status = String(event.data.status);
      for (const listener of [...this.#migrationEnds]) listener(status);
    }
  }

  #onGuestEnd(reason: string): void {
    // There is no panic device on these machines: a Linux guest that panics says so on its console
    // and resets itself.
    if (reason === 'guest-reset') {
      const match = /Kernel panic - not syncing: ([^\r\n]*)/.exec(tailOf(this.record.console_log));
      if (match) this.emit('panic', { message: match[1]?.slice(0, 200) ?? '' });
    }
    this.emit('shutdown', { reason });
  }

  async #onMonitorClosed(): Promise<void> {
    for (let i = 0; i < RECONNECT_TRIES; i++) {
      if (this.#released || this.#state === 'exited' || !this.#process.alive) break;
      this.#process.watch();
      await sleep(RECONNECT_EVERY_MS, undefined, { ref: false });
      if (this.#destroying) continue;
      const qmp = await QmpClient.connect(this.#paths.qmp).catch(() => undefined);
      if (!qmp) continue;
      this.#qmp = qmp;
      this.#listen(qmp);
      await this.#readState().catch(() => undefined);
      return;
    }
  }

  #onExit(status: number | null, signal: string | null): void {
    if (this.#state === 'exited') return;
    this.#state = 'exited';
    for (const listener of [...this.#migrationEnds]) listener('failed');
    this.#letGo();
    if (this.#released) return;
    const { qmp, watchdog, console, channel, incoming } = this.#paths;
    for (const path of [qmp, watchdog, console, channel, incoming]) rmSync(path, { force: true });
    const logTail = tailOf(this.record.log);
    this.emit('exited', { status, signal, logTail, expected: this.#destroying });
  }

  /** Throws unless the VM is in one of these states. */
  #expect(what: string, ...states: VmState[]): void {
    if (states.includes(this.#state)) return;
    const code = this.#state === 'exited' ? 'E_CLOSED' : 'E_STATE';
    throw new SnowflockError(code, `cannot ${what} VM ${this.id}: it is ${this.#state}`);
  }

  /** Runs `command` and gives the time of the event that it causes. */
  async #transition(command: 'stop' | 'cont', event: 'paused' | 'resumed'): Promise<Instant> {
    let at: Instant | undefined;
    const note = (instant: Instant): void => {
      at ??= instant;
    };
    this.once(event, note);
    try {
      await this.#execute(command);
      return at ?? { atMs: Date.now() };
    } finally {
      this.off(event, note);
    }
  }

  async #execute(command: 'stop' | 'cont'): Promise<void> {
    const deadline = performance.now() + FINISH_MS;
    for (;;) {
      try {
        await this.#qmp.execute(command, {}, 10_000);
        return;
      } catch (error) {
        if (!(error instanceof QmpError) || performance.now() > deadline) throw error;
        const { raw } = await this.#readState();
        if (raw !== 'finish-migrate') throw error;
        await sleep(1);
      }
    }
  }

  async pause(): Promise<Instant> {
    this.#expect('pause', 'running', 'paused');
    return this.#transition('stop', 'paused');
  }

  async resume(): Promise<Instant> {
    this.#expect('resume', 'running', 'paused');
    return this.#transition('cont', 'resumed');
  }

  async run(): Promise<Instant> {
    this.#expect('run', 'paused');
    return this.#transition('cont', 'resumed');
  }

  async captureState(limits: { timeoutMs?: number } = {}): Promise<Buffer> {
    this.#expect('capture', 'paused');
    if (this.#captured) {
      throw new SnowflockError('E_STATE', `VM ${this.id} must be resumed before the next capture`);
    }
    const socket = this.#socket;
    if (!socket) throw new SnowflockError('E_CLOSED', `VM ${this.id} was let go`);
    const { state, abort } = socket.receive();
    this.#captured = true;
    let cause: unknown;
    state.catch((error: unknown) => {
      cause = error;
    });
    try {
      const status = await this.#migrate(`unix:${socket.path}`, limits.timeoutMs ?? 5000);
      if (status === 'completed') return await state;
      if (cause) throw cause;
      this.#expect('capture', 'paused');
      throw new SnowflockError('E_QEMU', `capture of VM ${this.id}: ${await this.#whyFailed()}`);
    } catch (error) {
      const wrapped = asSnowflockError(error, 'E_QEMU');
      abort(wrapped);
      throw wrapped;
    }
  }

  async #migrate(uri: string, timeoutMs: number): Promise<MigrationStatus> {
    const end = this.#migrationEnd();
    try {
      await this.#qmp.execute('migrate', { uri }, timeoutMs);
      const status = await end.within(timeoutMs);
      if (status !== undefined) return status;
      await this.#qmp.execute('migrate_cancel', {});
      await end.within(FINISH_MS);
      throw new SnowflockError(
        'E_TIMEOUT',
        `capture of VM ${this.id} took longer than ${timeoutMs} ms`,
      );
    } finally {
      end.forget();
    }
  }

  /** The status a migration ends with; `within` gives undefined if that takes longer. */
  #migrationEnd(): {
    within: (ms: number) => Promise<MigrationStatus | undefined>;
    forget: () => void;
  } {
    let listener: (status: MigrationStatus) => void = () => {};
    const ended = new Promise<MigrationStatus>((resolve) => {
      listener = (status) => {
        if (status === 'completed' || status === 'failed' || status === 'cancelled')
          resolve(status);
      };
    });
    this.#migrationEnds.add(listener);
    if (this.#state === 'exited') listener('failed');
    return {
      within: async (ms) => {
        const stop = new AbortController();
        const late = sleep(ms, undefined, { signal: stop.signal }).catch(() => undefined);
        const status = await Promise.race([ended, late]);
        stop.abort();
        return status;
      },
      forget: () => this.#migrationEnds.delete(listener),
    };
  }

  async #whyFailed(): Promise<string> {
    const info = await this.#qmp.execute('query-migrate', {});
    return info['error-desc'] ?? `QEMU reports '${info.status ?? 'nothing'}'`;
  }

  async #untilNot(raw: string): Promise<void> {
    const deadline = performance.now() + FINISH_MS;
    while ((await this.#readState()).raw === raw) {
      if (performance.now() > deadline) {
        throw new SnowflockError('E_TIMEOUT', `VM ${this.id} stays in state ${raw}`);
      }
      await sleep(2);
    }
  }

  async setLink(up: boolean): Promise<void> {
    await this.#qmp.execute('set_link', { name: NETDEV, up });
  }

  /** Makes a prepared clone listen for its state. */
  async listenForState(): Promise<void> {
    rmSync(this.#paths.incoming, { force: true });
    await this.#qmp.execute('migrate-incoming', { uri: `unix:${this.#paths.incoming}` });
  }

  async loadState(state: Buffer, limits: { timeoutMs?: number } = {}): Promise<void> {
    this.#expect('load state into', 'prepared');
    if (this.#loading) throw new SnowflockError('E_STATE', `VM ${this.id} is loading already`);
    this.#loading = true;
    const timeoutMs = limits.timeoutMs ?? 5000;
    const end = this.#migrationEnd();
    // QEMU hangs up as soon as it has seen the end of the state, or refused it: how it went is told
    // by the event.
    const socket = createConnection(this.#paths.incoming);
    socket.on('error', () => {});
    try {
      socket.end(state);
      const status = await end.within(timeoutMs);
      if (status === undefined) {
        throw new SnowflockError('E_TIMEOUT', `VM ${this.id}: state not loaded in ${timeoutMs} ms`);
      }
      if (status !== 'completed') {
        // QEMU ends itself when it refuses a state, and says why just before.
        await Promise.race([this.#process.exited, sleep(1000)]);
        const said = tailOf(this.record.log, 1000).trim();
        throw new SnowflockError('E_QEMU', `VM ${this.id} refused the device state: ${said}`);
      }
      this.#state = 'paused';
      this.record.prepared = false;
    } catch (error) {
      await this.destroy();
      throw error;
    } finally {
      end.forget();
      socket.destroy();
      rmSync(this.#paths.incoming, { force: true });
    }
  }

  async status(): Promise<VmState> {
    if (this.#state === 'exited' || !this.#process.alive) return 'exited';
    try {
      await this.#readState();
    } catch (error) {
      if (this.#process.alive) throw error;
      return 'exited';
    }
    return this.#state;
  }

  destroy(options: { graceMs?: number } = {}): Promise<void> {
    // A second call that wants it faster than the first gets it.
    const graceMs = options.graceMs ?? 1000;
    this.#destroying = true;
    if (this.#destroyed && graceMs > 0) return this.#destroyed;
    this.#destroyed = this.#process.end(graceMs).then(() => {
      this.#onExit(null, null);
    });
    return this.#destroyed;
  }

  release(): void {
    this.#released = true;
    this.#letGo();
    this.#process.unwatch();
  }

  #letGo(): void {
    this.#stopRotation();
    this.#qmp.close();
    this.#socket?.close();
    this.#socket = undefined;
  }
}

/**
 * What the daemon asks of a hypervisor. Nothing here names a particular one.
 *
 * States of a VM, and the calls that move it:
 *
 *   boot() ──────────────► running ◄──── resume()/run() ────┐
 *                            │ pause()                      │
 *                            └────────► paused ─────────────┘
 *                                        │  captureState() leaves it paused, on failure too
 *   prepareClone() ─► prepared ── loadState() ─► paused
 *   any state ── guest ends itself, process dies, destroy() ──► exited (final)
 *
 * Invariants: a VM outlives the process that started it; `adopt` finds it again by its record. A VM
 * whose capture failed can always be resumed. A prepared clone runs no instruction before run().
 * Left out on purpose: what backs guest RAM and disk (the data plane's), and the network set-up.
 */
import type { EventEmitter } from 'node:events';
import type { MachineShape } from './shape.js';

export type { MachineShape, RamRange } from './shape.js';

/** Unprivileged user that VM processes run as; they get no supplementary groups. */
export interface VmUser {
  uid: number;
  gid: number;
}

export interface VmSpec {
  /** Letters, digits, `.`, `_`, `-`; at most 64; unique on this host. */
  id: string;
  /** Folder for this VM's sockets and logs; made if missing, owned by `user`. At most 80 bytes. */
  runDir: string;
  /** Multiple of 1 MiB. */
  ramBytes: number;
  vcpus: number;
  /** Root disk: an NBD export on a Unix socket that `user` may connect to. */
  disk?: { nbdSocket: string; exportName: string };
  /** Network card: an open tap device of this process (inherited by the VM's) and the guest's MAC. */
  nic?: { tapFd: number; mac: string };
  /** Where the guest channel's Unix socket is put; default `runDir/channel.sock`. */
  channelSocket?: string;
  /** Serial console. `logMaxBytes` bounds the log file (default 1 MiB, plus one older file). */
  console?: { logMaxBytes?: number };
  /** Memory on demand; without it guest RAM is the process's own and cannot be cloned. */
  memtap?: { socket: string; vm: string; token: string; agentPath: string };
  /** What to boot; not used for clones, which go on from the parent's state. */
  boot: { kernel: string; initrd?: string; cmdline: string };
  user: VmUser;
}

/** Everything needed to find a VM again after the daemon restarted; plain JSON. */
export interface VmRecord {
  driver: string;
  id: string;
  run_dir: string;
  pid: number;
  /** Start time of the process in clock ticks since boot: with `boot_id` it tells reused pids. */
  start_ticks: string;
  boot_id: string;
  /** Control socket of the driver. */
  control_socket: string;
  /** Second control socket, for the watchdog that resumes the VM if the daemon is gone. */
  watchdog_socket: string;
  console_socket: string;
  console_log: string;
  console_log_max_bytes: number;
  channel_socket: string;
  /** What the VM process itself printed. */
  log: string;
  shape: MachineShape;
  user: VmUser;
  /** True until device state was loaded. */
  prepared: boolean;
}

export interface Capabilities {
  driver: string;
  version: string;
  machine: string;
  accel: string;
  /** Why this accelerator: what the probe guest did. */
  accel_reason: string;
  cpu: string;
  max_vcpus: number;
}

export type VmState = 'prepared' | 'running' | 'paused' | 'shutdown' | 'exited';

/** When something happened: milliseconds since 1970 with microseconds as the fraction. */
export interface Instant {
  atMs: number;
}

export interface VmExit {
  /** Exit status; null if killed by a signal, or if an earlier daemon had started the process. */
  status: number | null;
  signal: string | null;
  /** End of what the VM process printed (at most 4 KiB). */
  logTail: string;
  /** True if destroy() was called. */
  expected: boolean;
}

export interface VmEvents {
  paused: [Instant];
  resumed: [Instant];
  /** The guest ended itself; `reason` e.g. `guest-shutdown`, `guest-reset`. 'exited' follows. */
  shutdown: [{ reason: string }];
  panic: [{ message: string }];
  exited: [VmExit];
}

export interface Vm extends EventEmitter<VmEvents> {
  readonly id: string;
  readonly record: VmRecord;
  readonly shape: MachineShape;
  /** Milliseconds from starting the process until it took commands; 0 if adopted. */
  readonly startMs: number;

  /** Stops the guest between two instructions; its disk requests are complete and flushed. */
  pause(): Promise<Instant>;
  /** Lets a paused guest go on. Also right after a failed or half-done capture. */
  resume(): Promise<Instant>;
  /**
   * Device and CPU state of the paused VM, without RAM; once per pause. The VM stays
   * paused whatever happens.
   * @throws E_STATE not paused, or captured since it was; E_QEMU capture failed; E_TIMEOUT; E_CLOSED VM is gone.
   */
  captureState(options?: { timeoutMs?: number }): Promise<Buffer>;
  /**
   * Loads captured state into a prepared clone and leaves it paused. On failure the VM process is
   * of no more use and is ended.
   * @throws E_STATE not a prepared clone; E_QEMU state refused; E_TIMEOUT.
   */
  loadState(state: Buffer, options?: { timeoutMs?: number }): Promise<void>;
  /** Lets a loaded clone execute its first instruction. */
  run(): Promise<Instant>;
  status(): Promise<VmState>;
  /**
   * Pulls the network card's cable, or puts it back: the guest sees the carrier change, and frames
   * are lost meanwhile. @throws E_QEMU the VM has no card; E_CLOSED.
   */
  setLink(up: boolean): Promise<void>;
  /**
   * Ends the VM: asks, then kills after `graceMs` (default 1000). Resolves when the process is
   * gone. May be called again at any time.
   */
  destroy(options?: { graceMs?: number }): Promise<void>;
  /** Lets go of the VM without ending it (the daemon is about to stop). */
  release(): void;
}

export interface HypervisorDriver {
  readonly name: string;
  /** What this host can run; cached. @throws E_REQUIREMENT if the hypervisor is missing. */
  probe(): Promise<Capabilities>;
  /** The shape a VM of this specification has on this host. */
  shapeOf(spec: VmSpec): Promise<MachineShape>;
  /** Starts a VM; resolves when its guest runs. */
  boot(spec: VmSpec): Promise<Vm>;
  /**
   * Starts a VM process that waits for device state of shape `shape`. The caller destroys it if the
   * state never comes. @throws E_SHAPE before anything is started.
   */
  prepareClone(spec: VmSpec, shape: MachineShape): Promise<Vm>;
  /** Finds a VM again. @throws E_NOT_FOUND if its process is gone. */
  adopt(record: VmRecord): Promise<Vm>;
  /** Whether its process is there. */
  alive(record: VmRecord): boolean;
  /** Ends a VM by its record, without a word to it. Nothing happens if its process is gone. */
  end(record: VmRecord): Promise<void>;
}

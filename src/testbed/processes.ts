/**
 * Processes told apart by pid and start time: a pid alone may meanwhile be someone else's.
 */
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';

/** A process as long as it lives. `startTicks`: field 22 of proc(5) `/proc/PID/stat`. */
export interface ProcessId {
  readonly pid: number;
  readonly startTicks: number;
}

interface Stat {
  readonly state: string;
  readonly startTicks: number;
}

function stat(pid: number): Stat | undefined {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/stat`, 'latin1');
  } catch {
    return undefined;
  }
  // The name in parentheses may hold spaces and parentheses: fields count from the last one.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  return { state: fields[0] ?? '', startTicks: Number(fields[19]) };
}

/** The identity of a running process; undefined when it is gone. */
export function identify(pid: number): ProcessId | undefined {
  const now = stat(pid);
  return now ? { pid, startTicks: now.startTicks } : undefined;
}

/** Whether this very process still runs (a zombie does not). */
export function isAlive(process: ProcessId): boolean {
  const now = stat(process.pid);
  return now !== undefined && now.startTicks === process.startTicks && !/[ZX]/.test(now.state);
}

/** Sends a signal if this very process still runs. */
export function signalProcess(target: ProcessId, signal: NodeJS.Signals): void {
  if (!isAlive(target)) return;
  try {
    process.kill(target.pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** All processes inside a named network namespace (`/run/netns/NAME`). */
export function processesInNetns(name: string): ProcessId[] {
  let inode: number;
  try {
    inode = statSync(`/run/netns/${name}`).ino;
  } catch {
    return [];
  }
  const found: ProcessId[] = [];
  for (const entry of readdirSync('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    try {
      if (readlinkSync(`/proc/${entry}/ns/net`) !== `net:[${inode}]`) continue;
    } catch {
      continue; // it ended meanwhile, or is a kernel thread
    }
    const id = identify(Number(entry));
    if (id && isAlive(id)) found.push(id);
  }
  return found;
}

const sleeper = new Int32Array(new SharedArrayBuffer(4));

/** Sleeps without the event loop: removal runs in exit handlers too. */
export function sleepSync(ms: number): void {
  Atomics.wait(sleeper, 0, 0, ms);
}

/**
 * Ends processes for good: SIGTERM to those asked, SIGKILL to all that are found after `graceMs`,
 * again until none is left. `find` is asked anew each time: a process may have had children.
 * @returns what could not be ended in `limitMs`.
 */
export function endProcessesSync(
  find: () => ProcessId[],
  asked: readonly ProcessId[],
  graceMs: number,
  limitMs = 5000,
): ProcessId[] {
  const start = performance.now();
  for (const target of asked) signalProcess(target, 'SIGTERM');
  while (asked.some(isAlive) && performance.now() - start < graceMs) sleepSync(10);
  for (;;) {
    const left = find();
    if (left.length === 0 || performance.now() - start > graceMs + limitMs) return left;
    for (const target of left) signalProcess(target, 'SIGKILL');
    sleepSync(10);
  }
}

/** The guest's program that tells udhcpc of the carrier, as the image has it, on a real interface. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { compilePrograms } from '../../src/image/programs.js';
import { openTap } from '../../src/network/tap.js';
import { Lab, type Namespace } from '../netback-filter/lab.js';

const CLIENT = `#!/usr/bin/python3
import signal
signal.signal(signal.SIGUSR1, lambda *_: print('back', flush=True))
signal.signal(signal.SIGUSR2, lambda *_: print('gone', flush=True))
print('begun', flush=True)
while True: signal.pause()
`;

let folder: string;
let lab: Lab;
let child: ChildProcess | undefined;
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'sf-linkwatch-'));
  writeFileSync(join(folder, 'client'), CLIENT, { mode: 0o755 });
  await compilePrograms(folder);
});
afterAll(() => rmSync(folder, { recursive: true }));
afterEach(async () => {
  if (child !== undefined && child.exitCode === null && child.signalCode === null) {
    const closed = once(child, 'close');
    child.kill('SIGKILL'); // the first process of its process namespace: all others end with it
    await closed;
  }
  await lab?.destroy();
});

/** Lines of the client's, as many as wanted. Those that came together are in no order. */
async function watch(netns: Namespace): Promise<(lines: number) => Promise<string[]>> {
  const words = `netns exec ${netns.name} unshare --fork --pid --kill-child`.split(' ');
  const program = [join(folder, 'sf-linkwatch'), 'eth0', join(folder, 'client')];
  child = spawn('ip', [...words, ...program], { stdio: ['ignore', 'pipe', 'inherit'] });
  if (child.stdout === null) throw new Error('no output');
  const said = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async (lines: number) => {
    const read: string[] = [];
    while (read.length < lines) {
      const line = await said.next();
      if (line.done === true) throw new Error(`it ended; before that: ${read}`);
      read.push(line.value);
    }
    return read.sort();
  };
  expect(await next(1)).toEqual(['begun']);
  return next;
}

test('the client hears of each loss and return of the carrier, also where the kernel tells once', async () => {
  lab = await Lab.create(1);
  const netns = lab.namespace('watched');
  // A tap: unlike a veth's, its changes are told at most once a second.
  const tap = netns.do(() => openTap('eth0'));
  lab.onDestroy(() => closeSync(tap));
  const carrier = (state: 'on' | 'off') =>
    netns.exec('ip', 'link', 'set', 'eth0', 'carrier', state);
  const next = await watch(netns);
  carrier('off');
  expect(await next(1)).toEqual(['gone']);
  carrier('on');
  expect(await next(1)).toEqual(['back']);
  // At once again: the kernel waits with the first change, and then sees none.
  carrier('off');
  carrier('on');
  expect(await next(2)).toEqual(['back', 'gone']);
});

// An NBD export as a file: nbdfuse, which needs no kernel support for NBD.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { expect } from 'vitest';
import { cleanup, execute, exists, temporary } from './support.js';

/** The export as a file, until `unmount`. */
export async function mountExport(
  from: string,
): Promise<{ file: string; unmount(): Promise<void> }> {
  const folder = await temporary();
  const [mountpoint, ready] = [join(folder, 'mnt'), join(folder, 'pid')];
  await mkdir(mountpoint);
  const command = ['--pidfile', ready, join(mountpoint, 'disk'), from];
  const child = spawn('nbdfuse', command, { stdio: ['ignore', 'inherit', 'inherit'] });
  const ended = once(child, 'exit');
  let mounted = true;
  const unmount = async () => {
    if (!mounted) return;
    mounted = false;
    await execute('umount', [mountpoint]);
    expect(await ended).toEqual([0, null]);
  };
  cleanup(async () => {
    if (child.exitCode === null) {
      await execute('umount', ['--lazy', mountpoint]).catch(() => undefined);
      child.kill('SIGKILL');
      await ended;
    }
    await rm(mountpoint, { recursive: true, force: true });
  });
  while (!(await exists(ready))) {
    if (child.exitCode !== null) throw new Error(`nbdfuse ended with ${child.exitCode}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  return { file: join(mountpoint, 'disk'), unmount };
}

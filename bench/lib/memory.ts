import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

/**
 * Takes that much free memory, writes to each page of it, and gives it back.
 *
 * A virtual machine's free memory may be no memory at all: with free page reporting (virtio-balloon),
 * or where nothing was written yet, the host has to find a page when the guest first writes to one.
 * That was measured to take 9 µs a page beside 2 for a page the host had given before, more than all
 * else of a 4 KiB write, and it hits whoever runs when the freed pages of the last run are used up.
 * Two seconds later the host may have taken them back: call this right before what is measured.
 */
export async function touchFreeMemory(bytes: number, signal: AbortSignal): Promise<void> {
  const script = 'import sys; memory = bytearray(b"\\x01") * int(sys.argv[1])';
  await promisify(execFile)('python3', ['-c', script, String(bytes)], { signal });
}

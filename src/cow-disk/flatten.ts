import { SnowflockError } from '../common/errors.js';
import type { Disk } from './disk.js';
import { type NativePull, native } from './native.js';
import { diskOf, type StoreParts, sliceOf } from './parts.js';
import { pause, Rate } from './rate.js';
import type { StoreTask } from './store-api.js';

const STEP_BYTES = 2 ** 20;
/** A disk forked this often while it is flattened is not flattened. */
const ATTEMPTS = 8;

/**
 * Copies what a disk reads from below into its top, then cuts the top loose: everything pulled is
 * durable before the transaction that names no parent. A fork in between leaves what was pulled in
 * a sealed slice, and the pull begins again in the new top. E_STATE, E_NO_SPACE,
 * E_IO, E_CLOSED, E_SOURCE_LOST; E_INTERRUPTED: what was copied stays, and lies on what it lay on.
 */
export async function flatten(
  { ledger }: StoreParts,
  disk: Disk,
  task: StoreTask,
  rate_bytes_per_s: number,
  signal: AbortSignal,
): Promise<void> {
  const rate = new Rate(rate_bytes_per_s);
  await disk.during(async (checkOpen) => {
    const check = () => {
      checkOpen();
      if (signal.aborted) throw new SnowflockError('E_INTERRUPTED', 'the flatten was interrupted');
    };
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      await disk.journalled();
      const pull = await native(() => disk.device.pullBegin());
      let detached = false;
      try {
        task.done_bytes = 0;
        task.total_bytes = pull.totalBytes;
        for (let done = false; !done; ) {
          check();
          const step = await native(() => pull.step(STEP_BYTES));
          done = step.done;
          task.done_bytes += step.bytes;
          // Short pauses, so that a closed disk does not wait for a slow flatten.
          for (let ms = rate.spend(step.bytes); ms > 1; ms = rate.spend(0)) {
            check();
            await pause(Math.min(ms, 200), signal);
          }
        }
        check();
        detached = await cutLoose(ledger, disk, pull);
      } finally {
        await native(() => pull.abort()); // also lets go of the disk
      }
      if (detached) return;
    }
    throw new SnowflockError(
      'E_STATE',
      `disk ${disk.name} was forked ${ATTEMPTS} times while it was flattened`,
    );
  });
}

async function cutLoose(
  ledger: StoreParts['ledger'],
  disk: Disk,
  pull: NativePull,
): Promise<boolean> {
  return disk.withoutForks(async () => {
    if ((await native(() => pull.detach())).forked) return false;
    await native(() => disk.device.settle()); // what was pulled, before it is all there is
    await ledger.commit((tree) => {
      const { top } = diskOf(tree, disk.name);
      const { size_bytes, map } = sliceOf(tree, top);
      return { slices: { [top]: { parent: null, base: { kind: 'none' }, size_bytes, map } } };
    });
    return true;
  });
}

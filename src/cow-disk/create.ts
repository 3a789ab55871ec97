import { stat } from 'node:fs/promises';
import { isAbsolute } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { type BaseEntry, checkDiskName, checkGenerationId, MAX_SIZE_BYTES } from './entries.js';
import type { CreateDisk } from './store-api.js';

/** What a new disk's first slice will say. E_ARGUMENT, E_IMAGE_UNKNOWN. */
export async function describeDisk(
  p: CreateDisk,
): Promise<{ size_bytes: number; base: BaseEntry }> {
  checkDiskName(p.name);
  const { size_bytes, base = { kind: 'none' } } = p;
  if (!Number.isSafeInteger(size_bytes) || size_bytes < 1 || size_bytes > MAX_SIZE_BYTES) {
    throw new SnowflockError('E_ARGUMENT', `disk size ${size_bytes} is not 1 to 2^46 bytes`);
  }
  if (base.kind === 'none') return { size_bytes, base: { kind: 'none' } };
  if (base.kind === 'replica') {
    checkGenerationId(base.generation);
    return { size_bytes, base: { kind: 'replica', generation: base.generation } };
  }
  if (!isAbsolute(base.path)) {
    throw new SnowflockError('E_ARGUMENT', `base image ${base.path} is not an absolute path`);
  }
  const found = await stat(base.path).catch((error: unknown) => {
    throw new SnowflockError(
      'E_IMAGE_UNKNOWN',
      `base image ${base.path} cannot be read: ${(error as NodeJS.ErrnoException).code}`,
      {
        cause: error,
      },
    );
  });
  if (!found.isFile()) {
    throw new SnowflockError('E_ARGUMENT', `base image ${base.path} is not a regular file`);
  }
  if (found.size > size_bytes) {
    throw new SnowflockError('E_ARGUMENT', `base image ${base.path} is larger than the disk`);
  }
  return { size_bytes, base: { kind: 'image', path: base.path, image_bytes: found.size } };
}

import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { SnowflockError } from '../common/errors.js';
import { projectRoot } from '../common/native.js';
import { type BuiltImage, readImage } from './manifest.js';

/** Where images are kept if nobody says otherwise: the project's cache. */
export function defaultImageDir(): string {
  return process.env.SNOWFLOCK_IMAGES ?? join(projectRoot, '.cache', 'images');
}

/** The images in a folder, damaged ones left out; several versions of one name may be there. */
export async function listImages(folder: string): Promise<BuiltImage[]> {
  const names = await readdir(folder).catch(() => []);
  const images = await Promise.all(
    names
      .filter((name) => !name.startsWith('.'))
      .sort()
      .map((name) => readImage(join(folder, name)).catch(() => undefined)),
  );
  return images.filter((image) => image !== undefined);
}

/** An image by name; of several versions the newest. Errors: E_IMAGE_UNKNOWN. */
export async function findImage(folder: string, name: string): Promise<BuiltImage> {
  const found = await Promise.all(
    (await listImages(folder))
      .filter(({ manifest }) => manifest.name === name)
      // Files inside carry a fixed date; the folder's change time is when it was put in place.
      .map(async (image) => ({ image, placedMs: (await stat(image.folder)).ctimeMs })),
  );
  const image = found.sort((a, b) => a.placedMs - b.placedMs).at(-1)?.image;
  if (image === undefined) {
    throw new SnowflockError('E_IMAGE_UNKNOWN', `no image ${name} in ${folder}`);
  }
  return image;
}

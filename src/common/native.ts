import { createRequire } from 'node:module';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { SnowflockError } from './errors.js';

/** The project's root folder, from `src/` and from `dist/src/` alike. */
export const projectRoot: string = (() => {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, 'package.json'))) {
    const up = dirname(folder);
    if (up === folder) throw new SnowflockError('E_INTERNAL', 'package.json not found');
    folder = up;
  }
  return folder;
})();

/** Path of a native build product, e.g. `nativePath('dataplane.node')`. */
export function nativePath(name: string): string {
  return join(projectRoot, 'build', 'Release', name);
}

/** Loads one of the addons; each component declares the type of what it uses of it. */
export function loadAddon<T>(name: 'dataplane' | 'netback'): T {
  const path = nativePath(`${name}.node`);
  if (!existsSync(path)) {
    throw new SnowflockError('E_REQUIREMENT', `native addon ${name} is not built (${path})`);
  }
  return createRequire(import.meta.url)(path) as T;
}

// Whether node_modules holds what package-lock.json asks for.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

/**
 * @typedef {{ version?: string, link?: boolean, optional?: boolean, peer?: boolean }} Locked
 */

/**
 * @param {string} file
 * @returns {Record<string, Locked> | undefined}
 */
function packagesOf(file) {
  try {
    return JSON.parse(readFileSync(file, 'utf8')).packages ?? {};
  } catch {
    return undefined;
  }
}

/**
 * Why `npm ci` must run, or undefined. Compares versions, not times: a checkout changes times. npm
 * writes its own record last, so an install cut short has none.
 * @param {string} root
 * @returns {string | undefined}
 */
export function npmReason(root) {
  const wanted = packagesOf(join(root, 'package-lock.json'));
  if (!wanted) throw new Error('package-lock.json is missing or not JSON');
  const installed = packagesOf(join(root, 'node_modules', '.package-lock.json'));
  if (!installed) return 'nothing is installed';
  for (const [path, { version, optional, link }] of Object.entries(wanted)) {
    if (path === '' || optional || link) continue;
    const has = installed[path];
    if (!has || !existsSync(join(root, path, 'package.json'))) return `${path} is missing`;
    if (has.version !== version) return `${path} is ${has.version}, not ${version}`;
  }
  return undefined;
}

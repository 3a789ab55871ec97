// Stamps: what a product was built from. Contents count, not times.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

/**
 * All files at or under the given paths (missing ones are left out), sorted.
 * @param {string} root
 * @param {readonly string[]} paths relative to root
 * @returns {string[]}
 */
export function filesUnder(root, paths) {
  /** @type {string[]} */
  const found = [];
  /** @param {string} path */
  const walk = (path) => {
    const full = join(root, path);
    if (!existsSync(full)) return;
    if (!statSync(full).isDirectory()) {
      found.push(path);
      return;
    }
    for (const name of readdirSync(full)) {
      if (name !== 'node_modules' && !name.startsWith('.')) walk(join(path, name));
    }
  };
  for (const path of paths) walk(path);
  return [...new Set(found)].sort();
}

/**
 * A hash over names and contents, and what else the product depends on (`extra`).
 * @param {string} root
 * @param {readonly string[]} paths
 * @param {readonly string[]} extra
 */
export function hashOf(root, paths, extra = []) {
  const hash = createHash('sha256');
  for (const path of filesUnder(root, paths)) {
    const bytes = readFileSync(join(root, path));
    hash.update(`${path}\0${bytes.byteLength}\0`).update(bytes);
  }
  for (const text of extra) hash.update(`\0${text}`);
  return hash.digest('hex');
}

/**
 * Why a product must be built again, or undefined.
 * @param {string} root
 * @param {string} stamp the stamp's file, relative to root
 * @param {string} hash of the present sources
 * @returns {string | undefined}
 */
export function staleReason(root, stamp, hash) {
  /** @type {{ hash: string, products: string[] }} */
  let last;
  try {
    last = JSON.parse(readFileSync(join(root, stamp), 'utf8'));
  } catch {
    return 'not built yet';
  }
  if (last.hash !== hash) return 'sources have changed';
  const lost = last.products.find((product) => !existsSync(join(root, product)));
  return lost === undefined ? undefined : `${lost} is missing`;
}

/**
 * Records a build. The hash is that of the sources before the build: a change during it counts.
 * @param {string} root
 * @param {string} stamp
 * @param {string} hash
 * @param {readonly string[]} products relative to root
 */
export function writeStamp(root, stamp, hash, products) {
  mkdirSync(dirname(join(root, stamp)), { recursive: true });
  writeFileSync(join(root, stamp), `${JSON.stringify({ hash, products }, null, 1)}\n`);
}

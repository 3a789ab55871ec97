import { readdir, readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { SnowflockError } from '../common/errors.js';

/** Names of a kernel module's dependencies, from the `depends=` of its .modinfo section. */
export function moduleDependencies(module: Buffer): string[] {
  const start = module.indexOf('\0depends=');
  if (start < 0) return [];
  const end = module.indexOf(0, start + 1);
  return module
    .toString('latin1', start + '\0depends='.length, end)
    .split(',')
    .filter((name) => name !== '');
}

const canonical = (name: string) => name.replaceAll('-', '_');

/**
 * Files of the named modules and all they depend on, each behind what it depends on. The package
 * carries no modules.dep (its installation would run depmod), so the modules themselves are asked.
 */
export async function resolveModules(folder: string, names: readonly string[]): Promise<string[]> {
  const files = new Map<string, string>();
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    if (entry.isFile() && entry.name.endsWith('.ko')) {
      files.set(canonical(basename(entry.name, '.ko')), join(entry.parentPath, entry.name));
    }
  }
  const order: string[] = [];
  const seen = new Set<string>();
  const add = async (name: string): Promise<void> => {
    if (seen.has(name)) return;
    seen.add(name);
    const file = files.get(name);
    if (!file) throw new SnowflockError('E_REQUIREMENT', `the kernel has no module ${name}`);
    for (const needed of moduleDependencies(await readFile(file))) await add(canonical(needed));
    order.push(file);
  };
  for (const name of names) await add(canonical(name));
  return order;
}

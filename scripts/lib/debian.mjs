// Debian packages: which are missing, whether apt's lists can be used as they are.
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, statSync } from 'node:fs';

const LISTS = '/var/lib/apt/lists';
const LISTS_AGE_MAX_MS = 24 * 3600 * 1000;

/**
 * The packages set-up needs and what each is for.
 * @returns {Record<string, string>}
 */
export function wantedPackages() {
  return JSON.parse(readFileSync(new URL('../packages.json', import.meta.url), 'utf8'));
}

/**
 * Those of `wanted` that dpkg does not have installed, by the output of
 * `dpkg-query -W -f '${Package} ${db:Status-Status}\n'`. A package removed but not purged is
 * listed there too.
 * @param {readonly string[]} wanted
 * @param {string} dpkgOutput
 * @returns {string[]}
 */
export function missingFrom(wanted, dpkgOutput) {
  const installed = new Set();
  for (const line of dpkgOutput.split('\n')) {
    const [name, status] = line.split(' ');
    if (status === 'installed') installed.add(name);
  }
  return wanted.filter((name) => !installed.has(name));
}

/**
 * Asks dpkg. Undefined when there is no dpkg: not Debian.
 * @param {readonly string[]} wanted
 * @returns {string[] | undefined}
 */
export function missingPackages(wanted) {
  // It exits with 1 when it does not know one of the names: what it prints counts.
  const asked = spawnSync(
    'dpkg-query',
    // biome-ignore lint/suspicious/noTemplateCurlyInString: dpkg-query's own placeholders
    ['-W', '-f', '${Package} ${db:Status-Status}\n', ...wanted],
    {
      encoding: 'utf8',
    },
  );
  return asked.error ? undefined : missingFrom(wanted, asked.stdout);
}

/**
 * Whether `apt-get update` must run before packages can be installed.
 * @param {string} [folder]
 * @param {number} [nowMs]
 */
export function listsAreOld(folder = LISTS, nowMs = Date.now()) {
  try {
    const lists = readdirSync(folder).filter(
      (name) => name.endsWith('_Packages') || /_Packages\./.test(name),
    );
    if (lists.length === 0) return true;
    // Lists keep the server's time; the folder tells when they were fetched.
    return nowMs - statSync(folder).mtimeMs > LISTS_AGE_MAX_MS;
  } catch {
    return true;
  }
}

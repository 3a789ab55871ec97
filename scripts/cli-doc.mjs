// Writes docs/cli.md from the command line tool's own --help, so that the two cannot differ.
// `--check` only compares (exit status 1 if they differ).
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';

const MAIN = 'dist/src/cli/main.js';
const FILE = 'docs/cli.md';

/** @param {string[]} path */
function help(path) {
  const { stdout, status } = spawnSync(process.execPath, [MAIN, ...path, '--help'], {
    encoding: 'utf8',
    env: {
      ...process.env,
      COLUMNS: '96',
      SNOWFLOCK_SOCKET: '',
      SNOWFLOCK_STORE: '',
      SNOWFLOCK_IMAGES: '.cache/images', // what it is in the project's folder
    },
  });
  if (status !== 0) throw new Error(`--help of ${path.join(' ')} ended with ${status}`);
  return stdout.trimEnd();
}

/** @param {string} text @returns {string[]} */
function subcommands(text) {
  const at = text.indexOf('\nCommands:\n');
  if (at < 0) return [];
  return [...text.slice(at).matchAll(/^ {2}([a-z]+)(?: |$)/gm)]
    .map((match) => match[1] ?? '')
    .filter((name) => name !== 'help');
}

/** @param {string[]} path @returns {string} */
function section(path) {
  const text = help(path);
  const own = `## ${['snowflock', ...path].join(' ')}\n\n\`\`\`text\n${text}\n\`\`\`\n`;
  return [own, ...subcommands(text).map((name) => section([...path, name]))].join('\n');
}

// Named by a variable: the type checker must not follow it into build products.
const errors = '../dist/src/common/errors.js';
/** @type {{ errorTable: Record<string, { exit: number }> }} */
const { errorTable } = await import(errors);
/** @type {Map<number, string[]>} */
const byStatus = new Map();
for (const [code, { exit }] of Object.entries(errorTable)) {
  byStatus.set(exit, [...(byStatus.get(exit) ?? []), code]);
}
const statuses = [...byStatus]
  .sort(([a], [b]) => a - b)
  .map(([status, codes]) => `| ${status} | ${codes.map((code) => `\`${code}\``).join(', ')} |`)
  .join('\n');
const text = `# Command line

Made from \`--help\` by \`scripts/cli-doc.mjs\`. Data goes to stdout, messages and progress to stderr.
\`--json\` prints data, and errors, as JSON. Folders that begin with \`.cache\` are in the project's folder.
Sizes may have a unit: \`512\` is MiB, so is \`512M\`; \`4G\` is GiB (defaults are shown in bytes). Those of
disks may be any number of bytes: \`1000001B\`.

| variable | what |
| --- | --- |
| \`SNOWFLOCK_SOCKET\` | the default of \`--socket\` |
| \`SNOWFLOCK_IMAGES\` | the default of \`--dir\` of \`snowflock image\`, and where the demo and benches look |
| \`SNOWFLOCK_STORE\` | where disks are that are named without a folder, instead of \`/var/lib/snowflock/disks\` |
| \`SNOWFLOCK_LOG\` | how much the daemon logs: trace, debug, info (the default), warn, error |

## Exit status

| status | meaning |
| --- | --- |
| 0 | done |
| 1 | done, but the answer is no: a clone joined with another status than 0, the demo's check failed, \`disk check\` found lost space and no errors |
${statuses}

\`exec\` ends with the status of the program it ran, 128 + the signal's number if one ended it.

${section([])}`;

if (process.argv.includes('--check')) {
  if (readFileSync(FILE, 'utf8') !== text) {
    console.error(`${FILE} differs from --help: run node scripts/cli-doc.mjs`);
    process.exit(1);
  }
} else {
  writeFileSync(FILE, text);
}

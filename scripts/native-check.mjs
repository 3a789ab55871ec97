// Checks the format of C and C++ files (clang-format, .clang-format); --fix formats them.
import { spawnSync } from 'node:child_process';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { filesUnder } from './lib/stamp.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const fix = process.argv.includes('--fix');
const files = filesUnder(root, ['native', 'kernel', 'bindings', 'guest', 'examples']).filter(
  // vmlinux.h is generated from the running kernel.
  (path) => /\.(c|cc|h)$/.test(path) && !path.endsWith('/vmlinux.h'),
);
const args = fix ? ['-i'] : ['--dry-run', '-Werror'];
if (files.length > 0) {
  const done = spawnSync('clang-format', [...args, ...files], { cwd: root, stdio: 'inherit' });
  if (done.error) {
    process.stderr.write('clang-format is missing: run npm run setup\n');
    process.exit(3);
  }
  if (done.status !== 0) {
    process.stderr.write('C and C++ files are not formatted: run npm run format\n');
    process.exit(1);
  }
}

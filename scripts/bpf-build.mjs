// Compiles kernel/netback for the kernel: node scripts/bpf-build.mjs OUTPUT
import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { dirname } from 'node:path';

const output = process.argv[2];
if (output === undefined) throw new Error('usage: node scripts/bpf-build.mjs OUTPUT');
mkdirSync(dirname(output), { recursive: true });
// Where Debian keeps <asm/types.h>; the BPF target has no multiarch folder of its own.
const multiarch = execFileSync('gcc', ['-print-multiarch'], { encoding: 'utf8' }).trim();
execFileSync(
  'clang',
  [
    ...['-O2', '-g', '-Wall', '-Wextra', '-Werror', '-target', 'bpf', '-mcpu=v3'],
    ...(multiarch === '' ? [] : [`-I/usr/include/${multiarch}`]),
    ...['-c', 'kernel/netback/netback.bpf.c', '-o', output],
  ],
  { stdio: 'inherit' },
);

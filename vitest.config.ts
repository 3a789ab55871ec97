import { defineConfig } from 'vitest/config';

// Two groups, one after the other. Tests of disks and of plain code run two files at a time: they
// wait for syncs and child processes. The others boot VMs and make network namespaces, one file
// after another: two cores shared by several of them would measure only their own contention.
// crash.test.ts kills at the nth sync of a thread, and which thread syncs depends on the load.
const together = ['allocator', 'blktap', 'descriptor', 'fuzz', 'pagestore'].map(
  (folder) => `test/${folder}/**/*.test.ts`,
);
together.push('test/cow-disk/**/!(crash).test.ts', 'packages/**/*.test.ts');

export default defineConfig({
  test: {
    testTimeout: 120_000,
    hookTimeout: 180_000,
    pool: 'forks',
    reporters: ['default', './scripts/vitest-summary.mjs'],
    projects: [
      {
        extends: true,
        test: { name: 'together', include: together, maxWorkers: 2, sequence: { groupOrder: 1 } },
      },
      {
        extends: true,
        test: {
          name: 'alone',
          include: ['test/**/*.test.ts'],
          exclude: together,
          fileParallelism: false,
          sequence: { groupOrder: 2 },
        },
      },
    ],
  },
});

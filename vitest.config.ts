import { defineConfig } from 'vitest/config';

// Files run one after another: the tests boot VMs and make network namespaces, and two cores
// shared by several of them would measure only their own contention.
export default defineConfig({
  test: {
    include: ['test/**/*.test.ts', 'packages/**/*.test.ts'],
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 180_000,
    pool: 'forks',
    reporters: ['default', './scripts/vitest-summary.mjs'],
  },
});

// How the tests run: in child processes (the addon lives per process), with a list of what was skipped, and why, at the end.
import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';
import { SkipReporter } from './test/skip-reporter.js';

const report = process.env.KEELGRAD_TEST_REPORT; // a file for the results as JSON

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    // Two at least: a test's JavaScript uses one core, and on two cores vitest would run one file at a time.
    maxWorkers: Math.max(2, availableParallelism() - 1),
    testTimeout: 120_000,
    hookTimeout: 120_000,
    reporters: ['default', new SkipReporter(), ...(report ? [['json', { outputFile: report }] as const] : [])],
  },
});

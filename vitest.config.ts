// How the tests run: in child processes (the addon lives per process), with a list of what was skipped, and why, at the end.
import { defineConfig } from 'vitest/config';
import { SkipReporter } from './test/skip-reporter.js';

const report = process.env.KEELGRAD_TEST_REPORT; // a file for the results as JSON

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    testTimeout: 60_000,
    hookTimeout: 60_000,
    reporters: ['default', new SkipReporter(), ...(report ? [['json', { outputFile: report }] as const] : [])],
  },
});

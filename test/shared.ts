// Finds the recorded golden values and data sets that lie outside of the repository.
// Suites that need them skip, and say so, where they are absent.

import { existsSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, it } from 'vitest';

const root = resolve(import.meta.dirname, '..', process.env.KEELGRAD_SHARED ?? '../shared');

export const sharedPath = (...parts: string[]): string => join(root, ...parts);

// biome-ignore lint/suspicious/noExplicitAny: golden files have many shapes, each test knows its own
export const readSharedJson = (...parts: string[]): any => JSON.parse(readFileSync(sharedPath(...parts), 'utf8'));

/** `describe` that needs the given path of the shared folder; skipped where it is absent (skip-reporter.ts says so). */
export function describeWithShared(name: string, path: string, body: () => void): void {
  if (existsSync(sharedPath(path))) {
    describe(name, body);
    return;
  }
  // A body that reads at once throws here: one test then stands for those that it would have made.
  describe.skip(`${name} (needs ${path} in KEELGRAD_SHARED)`, () => {
    try {
      body();
    } catch {
      it('what the recorded files list', () => {});
    }
  });
}

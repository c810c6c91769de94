// Prints at the end of a run how many tests were skipped, and why: the note of ctx.skip(note), or the name of the
// skipped suite or test, which carries its reason in parentheses. Reports only; decides nothing.
import type { Reporter, TestCase, TestModule } from 'vitest/node';

/** The name of the outermost skipped suite around a test, or else that of the test. */
function skippedName(test: TestCase): string {
  let name = test.name;
  for (let at = test.parent; at.type === 'suite'; at = at.parent) if (at.options.mode === 'skip') name = at.name;
  return name;
}

function reason(test: TestCase): string {
  const result = test.result();
  return (result.state === 'skipped' && result.note) || skippedName(test);
}

export class SkipReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const counts = new Map<string, number>();
    for (const module of modules)
      for (const test of module.children.allTests('skipped')) {
        const why = `${module.relativeModuleId}: ${reason(test)}`;
        counts.set(why, (counts.get(why) ?? 0) + 1);
      }
    if (counts.size === 0) return;
    const total = [...counts.values()].reduce((a, b) => a + b, 0);
    console.log(`\n ${total} skipped:`);
    for (const [why, count] of counts) console.log(`  ${String(count).padStart(4)}  ${why}`);
  }
}

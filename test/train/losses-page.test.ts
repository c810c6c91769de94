// The page of losses beside the table of options: neither knows one that the other lacks.
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { lossFacts, preferenceLossNames } from '../../src/objectives/preference/facts.js';
import { flagNaming, optionsOf, specOf } from '../../src/train/options.js';

describe('docs/losses.md', () => {
  const page = readFileSync(new URL('../../docs/losses.md', import.meta.url), 'utf8');
  const rows = new Map(
    page.split('\n').flatMap((line) => [...(/^\| `(\w+)`/.exec(line)?.slice(1) ?? [])].map((name) => [name, line])),
  );

  it('has a row for every loss, with its options and whether it needs a reference', () => {
    expect([...rows.keys()]).toEqual(preferenceLossNames);
    for (const name of preferenceLossNames) {
      const row = rows.get(name)!;
      const { uses = [], needsReference, referenceFree: free } = lossFacts[name];
      if (!row.includes('| the same | ')) for (const key of uses) expect(row, name).toContain(flagNaming.option(key));
      expect(row.includes('| yes |'), name).toBe(needsReference !== undefined);
      expect(row.includes('| has none'), name).toBe(free === true);
    }
  });

  it('names every option of the group and no other', () => {
    const flags = new Set(page.match(/--[a-z][a-z-]+[a-z]/g));
    for (const key of optionsOf('dpo').filter((one) => specOf(one).group === 'Parameters of losses'))
      expect(flags, key).toContain(flagNaming.option(key));
    const known = [...optionsOf('dpo'), ...optionsOf('sft')].map(flagNaming.option);
    expect([...flags].filter((flag) => !known.includes(flag))).toEqual([]);
  });
});

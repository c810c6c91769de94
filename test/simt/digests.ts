// Prints one line of JSON: for each op case and dtype, a digest of the bytes of its results and gradients on the device
// cuda. Bundled and run by schedules.test.ts, a process a schedule, so that equal lines mean equal bits.
import { createHash } from 'node:crypto';
import { addon } from '../../src/native/addon.js';
import '../../src/ops/methods.js';
import { families } from '../support/cases.js';
import { bytesOf } from '../support/checks.js';
import type { OpCase } from '../support/op-case.js';

/** Names what follows, where recorder.cjs is the addon. */
const mark = (label: string): void =>
  (globalThis as { keelgradTrace?: (label: string) => void }).keelgradTrace?.(label);

/** Cases of the sizes in KEELGRAD_SIMT_SIZES (small,large). */
const sizes = (process.env.KEELGRAD_SIMT_SIZES ?? 'small').split(',');
const cases = (): OpCase[] =>
  Object.values(families)
    .flatMap((family) => family())
    .filter((c) => sizes.includes(c.size));

function digest(parts: readonly Uint8Array[]): string {
  const hash = createHash('sha1');
  for (const part of parts) hash.update(part);
  return hash.digest('hex').slice(0, 16);
}

async function main(): Promise<void> {
  addon(); // now, so that the first case has its mark
  const digests: Record<string, string> = {};
  for (const c of cases())
    for (const dtype of c.dtypes) {
      const name = `${c.name} ${dtype}`;
      mark(name);
      try {
        digests[name] = digest(await bytesOf(c, { device: 'cuda', dtype }));
      } catch (error) {
        console.error(`${name}: ${(error as Error).message}`);
        process.exitCode = 1;
      }
    }
  console.log(JSON.stringify(digests));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

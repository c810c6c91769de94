// What the products read of a model's adapters, kept from call to call: stacked, and rounded where the model computes in
// bfloat16. Made anew only after an adapter was written (storages count their writes). Owns the copies, never the adapters.
import { type Adapter, fillLowRank, type LowRank, lowRankBuffers, lowRankOf } from '../ops/lora.js';
import type { DType } from '../tensor/dtype.js';
import { detachFromScope } from '../tensor/scope.js';
import { type Storage, withTag } from '../tensor/storage.js';

interface Entry {
  readonly sources: readonly Storage[];
  readonly buffers: ReturnType<typeof lowRankBuffers>;
  /** Of the sources when they were copied. */
  versions: readonly number[];
}

const storagesOf = (adapters: readonly Adapter[]): Storage[] => adapters.flatMap(({ a, b }) => [a.storage, b.storage]);
const versionsOf = (sources: readonly Storage[]): number[] => sources.map((s) => s.version);
const same = <T>(a: readonly T[], b: readonly T[]): boolean => a.length === b.length && a.every((x, i) => x === b[i]);

export class AdapterCopies {
  private readonly entries = new Map<Storage, Entry>();

  /** @param groups the adapters of the linears that read one input; memory is taken here, once */
  constructor(groups: readonly (readonly Adapter[])[], dtype: DType) {
    withTag('weights', () => {
      for (const adapters of groups) {
        const buffers = lowRankBuffers(adapters, dtype);
        for (const t of [buffers.a, ...buffers.b]) if (t) detachFromScope(t);
        this.entries.set(adapters[0].a.storage, { sources: storagesOf(adapters), buffers, versions: [] });
      }
    });
  }

  /** Up to date for these adapters, in the scope of the caller; null for others than the model's own. */
  of(adapters: readonly Adapter[]): LowRank | null {
    const entry = adapters.length > 0 ? this.entries.get(adapters[0].a.storage) : undefined;
    if (!entry || !same(entry.sources, storagesOf(adapters))) return null;
    const versions = versionsOf(entry.sources);
    if (!same(entry.versions, versions)) {
      fillLowRank(adapters, entry.buffers);
      entry.versions = versions;
    }
    return lowRankOf(adapters, entry.buffers);
  }

  dispose(): void {
    for (const { buffers } of this.entries.values()) for (const t of [buffers.a, ...buffers.b]) t?.dispose();
    this.entries.clear();
  }
}

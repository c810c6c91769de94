// Seeded choices for texts and samples; the numbers of models come from the engine's own generator.
import { randomUint32 } from '../data/random.js';

/** A stream of choices: the same seed and stream number give the same ones everywhere. */
export class Choices {
  private readonly next: () => number;

  constructor(seed: number, stream: number) {
    this.next = randomUint32(seed, stream);
  }

  /** Uniform in [0, 1). */
  uniform(): number {
    return this.next() / 2 ** 32;
  }

  /** A whole number from `low` to `high`, both included. */
  integer(low: number, high: number): number {
    return low + Math.floor(this.uniform() * (high - low + 1));
  }

  pick<T>(items: readonly T[]): T {
    return items[this.integer(0, items.length - 1)];
  }
}

// The pseudo-random order of examples: a pure function of seed and pass, the same on every machine.
// Not for numbers inside the model; those come from the engine's counter-based generator.

/**
 * sfc32 (Chris Doty-Humphrey, PractRand): 32-bit outputs from a 128-bit state, seeded with the two halves of `seed`
 * and the pass, the first 15 outputs thrown away.
 */
export function randomUint32(seed: number, pass: number): () => number {
  let [a, b, c, counter] = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0, pass >>> 0, 1];
  const next = (): number => {
    const result = (a + b + counter) >>> 0;
    counter = (counter + 1) >>> 0;
    a = (b ^ (b >>> 9)) >>> 0;
    b = (c + (c << 3)) >>> 0;
    c = (((c << 21) | (c >>> 11)) + result) >>> 0;
    return result;
  };
  for (let i = 0; i < 15; i++) next();
  return next;
}

/** A uniform integer below `limit`, without the bias of a plain remainder. */
function below(limit: number, next: () => number): number {
  const accepted = 2 ** 32 - (2 ** 32 % limit);
  for (;;) {
    const value = next();
    if (value < accepted) return value % limit;
  }
}

/** The numbers 0 .. count - 1 in the order of one pass: Fisher-Yates from the end. */
export function shuffledOrder(count: number, seed: number, pass: number): number[] {
  const next = randomUint32(seed, pass);
  const order = Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = below(i + 1, next);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

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

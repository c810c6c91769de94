// The one error class for everything a user can cause and fix: what was expected, what was found, what to do.
// Never used for bugs of our own; those stay plain Errors with a stack.

/** An expected, user-facing failure. The command line prints its message alone and exits with code 1. */
export class KeelgradError extends Error {
  override readonly name = 'KeelgradError';
}

/** Optimal-string-alignment distance: insertions, deletions, substitutions and swaps of neighbours cost 1. */
function editDistance(a: string, b: string): number {
  let before: number[] = [];
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const substitution = previous[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      row[j] = Math.min(substitution, previous[j] + 1, row[j - 1] + 1);
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      if (swapped) row[j] = Math.min(row[j], before[j - 2] + 1);
    }
    before = previous;
    previous = row;
  }
  return previous[b.length];
}

/** Spellings of one name (`maxLength`, `--max-length`, `max_length`) compare equal. */
const normalizeName = (name: string): string => name.toLowerCase().replace(/[^a-z0-9]/g, '');

/** The candidate nearest to `name`, or undefined when none is near enough to be what was meant. */
export function suggest(name: string, candidates: Iterable<string>): string | undefined {
  const wanted = normalizeName(name);
  let best: string | undefined;
  let bestDistance = Math.max(1, Math.floor(wanted.length * 0.4)) + 1;
  for (const candidate of candidates) {
    const distance = editDistance(wanted, normalizeName(candidate));
    if (distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  return best ?? expand(wanted, candidates);
}

/** The shortest candidate that `name` abbreviates (`mdl` for `model`): its letters in their order, the first one first. */
function expand(name: string, candidates: Iterable<string>): string | undefined {
  if (name.length < 3) return undefined;
  const isShort = (candidate: string): boolean => {
    let at = 0;
    for (const letter of candidate) if (letter === name[at]) at++;
    return at === name.length && candidate[0] === name[0] && candidate.length <= 3 * name.length;
  };
  const found = [...candidates].filter((candidate) => isShort(normalizeName(candidate)));
  return found.sort((a, b) => a.length - b.length)[0];
}

/** `; did you mean "x"?`, or an empty string: the tail of a message about an unknown name. */
export function didYouMean(name: string, candidates: Iterable<string>): string {
  const nearest = suggest(name, candidates);
  return nearest === undefined ? '' : `; did you mean "${nearest}"?`;
}

/** A value as it is quoted in messages: JSON, cut to a line's length. */
export function show(value: unknown): string {
  // JSON has no NaN or infinity: it would print null.
  const isPlain = typeof value !== 'number' || Number.isFinite(value);
  const text = value === undefined ? 'nothing' : ((isPlain ? JSON.stringify(value) : undefined) ?? String(value));
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

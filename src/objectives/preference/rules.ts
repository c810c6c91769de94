// Combinations of losses and their settings that make no sense, each with its reason: for library calls and options alike.
// Must stay free of tensors: options are checked before anything heavy is loaded.
import { type LossFacts, lossFacts, type PreferenceLossName, unpairedLosses } from './facts.js';

/** What a combination consists of. */
export interface LossContext {
  readonly names: readonly PreferenceLossName[];
  readonly labelSmoothing: number;
  readonly fDivergenceType: string;
  readonly nllWeight: number;
  readonly hasReference: boolean;
  /** How to get a reference. */
  readonly referenceRemedy: string;
  /** Pairs that a step sees together, where that is known. */
  readonly batchSize?: number;
  /** Whether pairs are weighted (WPO). */
  readonly weighted?: boolean;
}

/** How messages spell options. */
export interface LossNaming {
  option(key: string): string;
  setting(key: string, value: string | number): string;
}

type Conflict = (context: LossContext, naming: LossNaming) => string | undefined;

const first = (c: LossContext, is: (facts: LossFacts) => unknown): PreferenceLossName | undefined =>
  c.names.find((name) => is(lossFacts[name]));

const usesDivergence = (c: LossContext): boolean => c.fDivergenceType !== 'reverse_kl';

const conflicts: readonly Conflict[] = [
  (c) => {
    const name = c.hasReference ? undefined : first(c, (facts) => facts.needsReference);
    return name && `${name} needs a reference: ${lossFacts[name].needsReference}; ${c.referenceRemedy}`;
  },
  (c, n) => {
    const name = c.labelSmoothing === 0 ? first(c, (facts) => facts.usualSmoothing) : undefined;
    const usual = name && n.setting('labelSmoothing', lossFacts[name].usualSmoothing!);
    return name && `${name} needs a label smoothing above 0: it takes its logarithm; the paper's is ${usual}`;
  },
  (c, n) => {
    const name = usesDivergence(c) ? first(c, (f) => !f.divergence && !f.isNll) : undefined;
    return name && `${name} has no f-divergence; leave out ${n.option('fDivergenceType')}`;
  },
  (c, n) =>
    usesDivergence(c) && !c.hasReference
      ? `an f-divergence is one from the reference, and there is none; leave out ${n.option('fDivergenceType')}`
      : undefined,
  (c, n) => {
    const name = c.nllWeight > 0 ? first(c, (facts) => facts.isNll) : undefined;
    return name && `${name} is the NLL of the chosen responses already; leave out ${n.option('nllWeight')}, or ${name}`;
  },
  (c) => {
    const name = c.weighted ? first(c, (facts) => facts.notPerPair) : undefined;
    return name && `weights of pairs have no meaning for ${name}: ${lossFacts[name].notPerPair}`;
  },
  (c, n) => {
    const name = c.batchSize === 1 ? first(c, (facts) => facts.needsSeveral) : undefined;
    return (
      name && `${name} ${lossFacts[name].needsSeveral?.replace(/^it /, '')}; raise ${n.option('batchSize')} above 1`
    );
  },
];

/** What is wrong with a combination, or undefined. */
export function lossConflict(context: LossContext, naming: LossNaming): string | undefined {
  for (const conflict of conflicts) {
    const found = conflict(context, naming);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** What is wrong with a combination for labelled responses without pairs, or undefined. */
export function unpairedConflict(context: LossContext, naming: LossNaming): string | undefined {
  const name = first(context, (facts) => !facts.unpaired);
  if (name)
    return `${name} compares the two responses of a pair, and these records have one response and its label; use ${unpairedLosses.join(', ')}, or pairs`;
  if (context.nllWeight > 0)
    return `the NLL is one of the chosen responses of pairs, and these records have none; leave out ${naming.option('nllWeight')}`;
  return lossConflict(context, naming);
}

// Gradients of the log-probabilities of a batch's sequences from one backward pass seeded with 1 (spo.md §4, §5): two
// accumulated gradients with coefficients for each sequence, squared norms, and derivatives of these. No model, no loss.
import { type SequenceParameter, SequencePass, type SequencePassOptions } from '../autograd/sequence-sinks.js';
import { differentiate, type GradientSink, type Start, suspend } from '../autograd/tape.js';
import { cast, onesLike } from '../ops/movement.js';
import type { SequenceStreams } from '../ops/streams.js';
import { scope } from '../tensor/scope.js';
import { Tensor } from '../tensor/tensor.js';

/** What a forward pass gives: log-probabilities `[N]` of the targets, and whatever else the caller wants of it. */
export interface ScoredTargets {
  logProbs: Tensor;
}

export interface SequenceProblem<R extends ScoredTargets> {
  /** Everything that is differentiated for. */
  readonly variables: readonly Tensor[];
  /** What becomes of the gradients of each. */
  readonly parameters: readonly SequenceParameter[];
  readonly streams: SequenceStreams;
  readonly forward: (variables: readonly Tensor[]) => R;
  /** `[2, S]` by group: of the first and the second accumulated gradient, from the forward pass (off the tape). */
  readonly coefficients: (result: R) => ReadonlyMap<string, Tensor>;
  /** The second gradient takes the sequences [0, secondCount) alone. */
  readonly secondCount: number;
}

/** Of the sequences' gradients, by group of parameters. */
export interface GradientProducts {
  /** float64 `[S]`. */
  readonly squaredNorms: ReadonlyMap<string, Tensor>;
  /** float64 `[pairs]`: inner products of the two gradients of each, where the streams are of pairs; else empty. */
  readonly innerProducts: ReadonlyMap<string, Tensor>;
}

/** One backward pass: fills the two accumulated gradients. */
export function accumulateSequenceGradients<R extends ScoredTargets>(problem: SequenceProblem<R>): R {
  const { streams, parameters, secondCount, variables } = problem;
  const pass = new SequencePass(streams, parameters, { squares: false, secondCount });
  try {
    return runPass(problem, pass, variables);
  } finally {
    pass.dispose();
  }
}

/** The same with squared norms and inner products; nothing is recorded. What it returns belongs to the current scope. */
export function measureSequenceGradients<R extends ScoredTargets>(
  problem: SequenceProblem<R>,
): GradientProducts & { result: R } {
  const pass = new SequencePass(problem.streams, problem.parameters, measuring(problem));
  try {
    const result = runPass(problem, pass, problem.variables);
    pass.finish();
    return { result, squaredNorms: pass.squaredNorms(), innerProducts: pass.innerProducts() };
  } finally {
    pass.dispose();
  }
}

const measuring = ({
  streams,
  secondCount,
}: Pick<SequenceProblem<never>, 'streams' | 'secondCount'>): SequencePassOptions => ({
  squares: true,
  secondCount,
  inner: streams.headGroups.every(({ sequences }) => sequences.length === 2),
});

function runPass<R extends ScoredTargets>(
  problem: SequenceProblem<R>,
  pass: SequencePass,
  variables: readonly Tensor[],
): R {
  const { result } = differentiate(
    variables,
    (tracked) => problem.forward(tracked),
    (scored) => {
      pass.setCoefficients(problem.coefficients(scored));
      return [{ tensor: scored.logProbs, cotangent: onesLike(scored.logProbs) }];
    },
    { streams: problem.streams, sinks: pass.sinks },
  );
  return result;
}

/** The same pass, recorded, with the squared norms of the sequences' gradients; it waits until it is closed. */
export class RecordedGradients<R extends ScoredTargets> implements GradientProducts {
  readonly result: R;
  /** Owned by this, as the inner products are. */
  readonly squaredNorms: ReadonlyMap<string, Tensor>;
  readonly innerProducts: ReadonlyMap<string, Tensor>;
  private readonly pass: SequencePass;
  private readonly suspended: ReturnType<typeof suspend<R>>;

  /** @param sinks of the variables, for the gradients of norms */
  constructor(problem: SequenceProblem<R>, sinks: readonly (GradientSink | null)[]) {
    const { streams, parameters, variables } = problem;
    this.pass = new SequencePass(streams, parameters, measuring(problem));
    try {
      this.suspended = suspend(
        variables,
        (tracked) => {
          const result = runPass(problem, this.pass, tracked);
          this.pass.finish();
          return result;
        },
        { sinks },
      );
      this.result = this.suspended.result;
      const kept = (totals: Map<string, Tensor>): Map<string, Tensor> =>
        new Map([...totals].map(([group, t]) => [group, this.pass.keep(t)]));
      this.squaredNorms = kept(scope(() => this.pass.squaredNorms()));
      this.innerProducts = kept(scope(() => this.pass.innerProducts()));
    } catch (error) {
      this.pass.dispose();
      throw error;
    }
  }

  /**
   * Adds sum over s of coefficients[s] ∇|g_s|² to the sinks, the squares taken over `groups`; g_s is the gradient of the summed
   * log-probabilities of sequence s. Once; the tape is let go of.
   */
  addSquareGradients(coefficients: ArrayLike<number>, groups: ReadonlySet<string>): void {
    scope(() => {
      const terms = this.pass.terms.filter((t) => groups.has(t.group));
      const first = terms[0]?.tensor;
      if (!first) return;
      const values = Tensor.from(Float64Array.from(coefficients), { device: first.device });
      const starts: Start[] = terms.map(({ tensor }) => ({ tensor, cotangent: cast(values, tensor.dtype) }));
      this.suspended.pullBack(starts);
    });
  }

  dispose(): void {
    this.suspended?.close();
    this.pass.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

// The tape: what was computed from what. How cotangents flow back over it is on the next page, pull-back.ts.
//
// A transform (grad, vjp, ...) opens a level. Its inputs become leaves whose mask has the level's bit; an op with a leaf
// behind it records a node whose mask is the union of its inputs' masks. Backward is made of ordinary ops, so with an outer
// level open it is recorded in turn: gradients of gradients need no special case. During the backward of level L
// only levels below L are recorded: what depends on L's own leaves alone is constant for them.
//
// A node is owned by the lowest level of its mask, which ends last; saved tensors go as soon as that level's
// backward has passed them, or when the level closes.
import type { SequenceStreams } from '../ops/streams.js';
import { detachFromScope } from '../tensor/scope.js';
import type { Storage } from '../tensor/storage.js';
import type { TapeNode, Tensor } from '../tensor/tensor.js';
import { pullBack } from './pull-back.js';

/**
 * A gradient that has not been multiplied out: `materialize()` gives the tensor. A leaf with a sink receives the
 * contribution itself, and may do better (accumulate in place, keep norms per sequence, ...).
 */
export interface Contribution {
  readonly kind: string;
  readonly shape: readonly number[];
  materialize(): Tensor;
}

/** Receives the gradient contributions of one leaf, in backward order. */
export interface GradientSink {
  accept(contribution: Contribution | Tensor): void;
  /** Where kernels that accumulate may add this leaf's gradient themselves; null: hand everything to accept. */
  readonly buffer: Tensor | null;
  /** Takes contributions where backward is itself differentiated, too; other sinks are passed over there. */
  readonly differentiable?: boolean;
  /** Two gradients of this leaf that kernels may accumulate, each sequence with coefficients of its own. */
  readonly shares?: GradientShares | null;
}

/** first += sum over sequences of coefficients[0, s] * gradient of s; second, with coefficients[1], over the first ones. */
export interface GradientShares {
  readonly first: Tensor | null;
  readonly second: Tensor | null;
  /** `[2, N]`: coefficients by target, in the dtype of the accumulated gradients; null where there are none. */
  readonly byTarget: Tensor | null;
  /** Targets that take part in the second. */
  readonly secondTargets: number;
  /** What the head's backward gives beside: inner products for the squares of sequences' gradients, the dense gradient. */
  readonly squares: boolean;
  readonly dense?: boolean;
}

export type Cotangent = Tensor | Contribution | null;

/**
 * Cotangents of the inputs from those of the outputs (null: zero). `saved` are the saved tensors in order, on the tape
 * where they were. `needs[i]` tells whether input i wants one. `differentiable` is true when what this computes will itself be
 * differentiated: then only differentiable ops may be used. Cotangents may have a shape that the input was broadcast to.
 */
export type Backward = (context: BackwardContext) => readonly Cotangent[];

export interface BackwardContext {
  cotangents: readonly (Tensor | null)[];
  /** The first cotangent; throws where it is zero (only ops with several outputs see that). */
  readonly g: Tensor;
  saved: readonly Tensor[];
  needs: readonly boolean[];
  differentiable: boolean;
  /** The accumulation buffer of input i's sink, shaped like the input; null where there is none. */
  buffer: (input: number) => Tensor | null;
  /** Set where cotangents are kept apart by sequence: their rows are those of the streams, not of the packed axis. */
  streams: SequenceStreams | null;
  /** The shares of input i's sink; null where there are none. */
  shares: (input: number) => GradientShares | null;
  /** The sink that takes the contributions to input i; null where its gradient is a tensor. */
  sink: (input: number) => GradientSink | null;
}

interface Saved {
  tensor: Tensor;
  storage: Storage;
  version: number;
  /** Saved outputs are put back on their node when used, so that the node does not hold itself. */
  output: number;
}

export class Node implements TapeNode {
  readonly sequence = ++sequence;
  readonly op: string;
  /** Loses a level's bit when that level closes: the number will mean another transform then. */
  mask: number;
  readonly parents: readonly (Node | null)[];
  readonly parentOutputs: readonly number[];
  readonly inputShapes: readonly (readonly number[])[];
  readonly inputDTypes: readonly Tensor['dtype'][];
  saved: Saved[];
  readonly backward: Backward;
  /** How many outputs the op has. */
  readonly outputs: number;
  /** Whether backward knows of streams. */
  readonly streamed: boolean;
  /** Whether it is an input of a transform: it stands for the tensor that was given. */
  readonly isInput: boolean;
  sink: GradientSink | null = null;

  constructor(
    op: string,
    mask: number,
    inputs: readonly Tensor[],
    saved: Saved[],
    backward: Backward,
    outputs = 1,
    streamed = true,
  ) {
    this.op = op;
    this.isInput = backward === passThrough;
    this.outputs = outputs;
    this.streamed = streamed;
    this.mask = mask;
    this.parents = inputs.map((t) => (t.node && t.node.mask & mask ? (t.node as Node) : null));
    this.parentOutputs = inputs.map((t) => t.output);
    this.inputShapes = inputs.map((t) => t.shape);
    this.inputDTypes = inputs.map((t) => t.dtype);
    this.saved = saved;
    this.backward = backward;
  }

  release(): void {
    for (const s of this.saved) s.tensor.dispose();
    this.saved = [];
  }
}

let sequence = 0;
let recordMask = 0;
/** Levels whose tracked tensors may not be touched: inside a checkpointed function (see forbidCaptured). */
let forbidden = 0;
const tapes: Node[][] = [];

export const lowestLevel = (mask: number): number => 31 - Math.clz32(mask & -mask);

/** The union of the masks of `inputs` that is being recorded now; 0 when nothing is. */
export function trackedMask(inputs: readonly (Tensor | null | undefined)[]): number {
  let mask = 0;
  for (const t of inputs) if (t?.node) mask |= t.node.mask;
  if (mask & forbidden)
    throw new Error(
      '[checkpoint] expected every differentiated tensor among the inputs of the checkpointed function, found a captured one; pass it as an input',
    );
  return mask & recordMask;
}

/** For ops that write in place: a tracked tensor among theirs is an error, not a missing term of a gradient. */
export function requireUntracked(op: string, ...tensors: readonly Tensor[]): void {
  if (trackedMask(tensors) !== 0)
    throw new Error(
      `[${op}] expected tensors that nothing is differentiated for, found ${tensors.join(' and ')}; writing in place has no derivative: use an op that returns a new tensor, or detach()`,
    );
}

/**
 * Puts an op on the tape and returns its outputs, now carrying their place on it; the given outputs are replaced. Where
 * nothing is recorded, returns them unchanged and keeps nothing.
 *
 * @param saved tensors that backward needs, among inputs, outputs or others; aliased, so the originals may be disposed of
 * @param streamed whether backward obeys `context.streams`; where cotangents are kept apart, other ops are an error
 */
export function record<T extends readonly Tensor[]>(
  op: string,
  inputs: readonly Tensor[],
  outputs: T,
  saved: readonly Tensor[],
  backward: Backward,
  streamed = false,
): T {
  const mask = trackedMask(inputs);
  if (mask === 0) return outputs;
  const kept = saved.map((t): Saved => {
    const output = outputs.indexOf(t);
    const alias = detachFromScope(output >= 0 ? t.detach() : t.alias());
    return { tensor: alias, storage: t.storage, version: t.storage.version, output };
  });
  const node = new Node(op, mask, inputs, kept, backward, outputs.length, streamed);
  tapes[lowestLevel(mask)].push(node);
  return outputs.map((t, i) => {
    const tracked = t.alias(node, i);
    t.dispose();
    return tracked;
  }) as unknown as T;
}

/** Runs `f` without recording anything. */
export function noGrad<T>(f: () => T): T {
  return withMasks(0, forbidden, f);
}

function withMasks<T>(mask: number, forbid: number, f: () => T): T {
  const saved = [recordMask, forbidden];
  recordMask = mask;
  forbidden = forbid;
  try {
    return f();
  } finally {
    [recordMask, forbidden] = saved;
  }
}

/** Runs `f` without recording; a tracked tensor that reaches an op inside is an error, not a silent zero. */
export function forbidCaptured<T>(f: () => T): T {
  return withMasks(0, forbidden | recordMask, f);
}

/** The saved tensors of a node, as they were. */
export function useSaved(node: Node): Tensor[] {
  return node.saved.map((s) => {
    if (s.storage.version !== s.version)
      throw new Error(
        `[${node.op}] a tensor saved for backward, ${s.tensor.describe()}, was written in place since; write after backward, or to a clone`,
      );
    return s.output >= 0 ? s.tensor.alias(node, s.output) : s.tensor.alias();
  });
}

export interface Differentiated<R> {
  /** What the function returned, detached from this level. */
  result: R;
  /** One per input; null where the result does not depend on it, or where a sink took the contributions. */
  gradients: (Tensor | null)[];
}

export interface DifferentiateOptions {
  /** A sink per input, or null. Ignored where backward is itself differentiated, but for differentiable sinks. */
  sinks?: readonly (GradientSink | null)[];
  /**
   * Keeps the cotangents of each sequence apart: every op between inputs and outputs must know how. The outputs are
   * log-probabilities, their cotangents 1: coefficients are the sinks' business.
   */
  streams?: SequenceStreams | null;
}

/** Engine-wide helpers that need ops, supplied by ops/reduce.ts: this file uses no op by name. */
export interface TapeOps {
  add(a: Tensor, b: Tensor): Tensor;
  addInPlace(into: Tensor, b: Tensor): void;
  sumTo(t: Tensor, shape: readonly number[]): Tensor;
  cast(t: Tensor, dtype: Tensor['dtype']): Tensor;
}
let ops: TapeOps;
export function defineTapeOps(given: TapeOps): void {
  ops = given;
}
export const tapeOps = (): TapeOps => ops;

/**
 * Runs `f` on tracked aliases of `inputs` and pulls cotangents back. `outputs` picks from f's result the tensors to start
 * from with their cotangents. Result and gradients belong to the caller's scope.
 */
export function differentiate<R>(
  inputs: readonly Tensor[],
  f: (tracked: Tensor[]) => R,
  outputs: (result: R) => readonly Start[],
  options: DifferentiateOptions = {},
): Differentiated<R> {
  const level = new Level(inputs, options);
  try {
    const { result, starts } = level.record(() => {
      const result = f(level.track(inputs));
      return { result, starts: outputs(result) };
    });
    return { result, gradients: level.pullBack(starts) };
  } finally {
    level.close();
  }
}

/** A tensor to pull a cotangent back from. */
export interface Start {
  tensor: Tensor;
  cotangent: Tensor;
}

/** A recorded function whose cotangents come later: its tape waits while other work, and other transforms, run. */
export interface Suspended<R> {
  readonly result: R;
  /** Pulls cotangents back, once; the tape is let go of. */
  pullBack(starts: readonly Start[]): (Tensor | null)[];
  /** Lets go of the tape; nothing happens after `pullBack`. */
  close(): void;
}

/**
 * As `differentiate`, in two parts, so that the cotangents may depend on values that are read in between. At the outermost
 * level only. The result belongs to the caller's scope; tensors of it that cotangents start from must outlive it.
 */
export function suspend<R>(
  inputs: readonly Tensor[],
  f: (tracked: Tensor[]) => R,
  options: DifferentiateOptions = {},
): Suspended<R> {
  if (tapes.length > 0) throw new Error('[suspend] expected no transform around it, found one');
  const level = new Level(inputs, options);
  let result: R;
  try {
    result = level.record(() => f(level.track(inputs)));
  } catch (error) {
    level.close();
    throw error;
  }
  level.leave();
  let open = true;
  const finish = <T>(use: () => T): T => {
    if (tapes.length > 0) throw new Error('[suspend] expected no transform around its end, found one');
    open = false;
    level.enter();
    try {
      return use();
    } finally {
      level.close();
    }
  };
  return {
    result,
    pullBack: (starts) => {
      if (!open) throw new Error('[suspend] expected a tape that waits, found one that is closed');
      return finish(() => level.pullBack(starts));
    },
    close: () => {
      if (open) finish(() => undefined);
    },
  };
}

/** One open transform: its leaves, and its place among those that are open. */
class Level {
  private readonly index = tapes.length;
  private readonly bit = 1 << tapes.length;
  private readonly outerMask = recordMask;
  private readonly before = sequence;
  private readonly tape: Node[] = [];
  private readonly leaves: readonly Node[];
  private readonly streams: SequenceStreams | null;

  constructor(inputs: readonly Tensor[], { sinks, streams }: DifferentiateOptions) {
    if (this.index >= 30) throw new Error('[differentiate] expected at most 30 nested transforms');
    this.streams = streams ?? null;
    this.leaves = inputs.map((t, i) => {
      const outer = t.node ? t.node.mask & this.outerMask : 0;
      const leaf = new Node('input', this.bit | outer, [t], [], passThrough);
      leaf.sink = sinks?.[i] ?? null;
      return leaf;
    });
    this.enter();
  }

  track(inputs: readonly Tensor[]): Tensor[] {
    return inputs.map((t, i) => t.alias(this.leaves[i], 0));
  }

  enter(): void {
    tapes.push(this.tape);
  }

  leave(): void {
    tapes.pop();
  }

  record<T>(f: () => T): T {
    return withMasks(this.outerMask | this.bit, forbidden, f);
  }

  /** Recorded for outer levels only. */
  pullBack(starts: readonly Start[]): (Tensor | null)[] {
    return withMasks(this.outerMask & (this.bit - 1), forbidden, () =>
      pullBack(this.index, this.leaves, starts, this.streams),
    );
  }

  close(): void {
    for (const leaf of this.leaves) {
      leaf.mask &= ~this.bit;
      leaf.sink = null; // it was for this level: an outer backward passes here too
    }
    closeLevel(this.index, this.before);
  }
}

/** An inner transform's input is, for outer ones, the tensor that was given. */
const passThrough: Backward = ({ g }) => [g];

function closeLevel(level: number, before: number): void {
  const tape = tapes.pop()!;
  for (const node of tape) {
    node.release();
    node.mask = 0;
  }
  for (const outer of tapes)
    for (let i = outer.length - 1; i >= 0 && outer[i].sequence > before; i--) outer[i].mask &= ~(1 << level);
}

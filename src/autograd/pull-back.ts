// Backward over a recorded tape: how cotangents flow from nodes to their parents, and into sinks. tape.ts says what a node is
// and when this runs; ops are known by their rules alone.
import { KeelgradError } from '../errors.js';
import type { SequenceStreams } from '../ops/streams.js';
import { inBackwardOf } from '../tensor/out-of-memory.js';
import { owned } from '../tensor/scope.js';
import { sameShape } from '../tensor/shape.js';
import type { Tensor } from '../tensor/tensor.js';
import {
  type BackwardContext,
  type Contribution,
  type GradientSink,
  lowestLevel,
  type Node,
  type Start,
  tapeOps,
  trackedMask,
  useSaved,
} from './tape.js';

/** An op on the way cannot keep the gradients of sequences apart. */
export class UnstreamedOp extends KeelgradError {
  readonly op: string;
  constructor(op: string, remedy = 'use an op that has one') {
    super(`[${op}] has no rule that keeps the gradients of sequences apart; ${remedy}`);
    this.op = op;
  }
}

/** The nodes behind `starts` that depend on the leaves, latest first; does not look behind the leaves. */
function reachable(starts: readonly Node[], leaves: ReadonlySet<Node>, bit: number): Node[] {
  const seen = new Set<Node>();
  const stack = [...starts];
  while (stack.length > 0) {
    const node = stack.pop()!;
    if (seen.has(node) || leaves.has(node)) continue;
    seen.add(node);
    for (const parent of node.parents) if (parent && parent.mask & bit) stack.push(parent);
  }
  return [...seen].sort((a, b) => b.sequence - a.sequence);
}

/** Cotangents of the leaves from those of `starts`, through the nodes of a level. */
export function pullBack(
  level: number,
  leaves: readonly Node[],
  starts: readonly Start[],
  streams: SequenceStreams | null,
): (Tensor | null)[] {
  const bit = 1 << level;
  const pending = new Map<Node, (Tensor | null)[]>();
  const roots: Node[] = [];
  for (const { tensor, cotangent } of starts) {
    const node = tensor.node as Node | null;
    if (!node || !(node.mask & bit)) continue;
    roots.push(node);
    const [own] = owned(() => [cotangent.alias()]);
    accumulate(pending, node, tensor.output, own);
  }
  const nodes = reachable(roots, new Set(leaves), bit);
  // Before any sink has taken anything: who asked may do without.
  const unstreamed = streams && nodes.find((node) => !node.streamed);
  try {
    if (unstreamed) throw new UnstreamedOp(unstreamed.op);
    for (const node of nodes) {
      const cotangents = pending.get(node);
      pending.delete(node);
      if (cotangents) step(node, bit, cotangents, pending, streams);
      if (lowestLevel(node.mask) === level) node.release();
    }
  } catch (error) {
    for (const slots of pending.values()) disposeAll(slots);
    throw error;
  }
  return leaves.map((leaf) => {
    const gradient = pending.get(leaf)?.[0] ?? null;
    if (!gradient) return null;
    const given = gradient.alias();
    gradient.dispose();
    return given;
  });
}

const disposeAll = (tensors: readonly (Tensor | null)[]): void => {
  for (const t of tensors) t?.dispose();
};

/** One node's backward: its cotangents go, those of its parents come. */
function step(
  node: Node,
  bit: number,
  cotangents: (Tensor | null)[],
  pending: Map<Node, (Tensor | null)[]>,
  streams: SequenceStreams | null,
): void {
  let results: readonly (Tensor | null)[];
  try {
    results = runBackward(node, bit, cotangents, streams);
  } finally {
    disposeAll(cotangents);
  }
  try {
    results.forEach((value, i) => {
      if (value) deliver(receiver(node, i, bit), value, pending);
    });
  } catch (error) {
    disposeAll(results);
    throw error;
  }
}

/** Where cotangents of an input go: behind the inputs of inner transforms, which stand for what was given to them. */
function receiver(node: Node, input: number, bit: number): { node: Node; output: number } | null {
  let [parent, output] = [node.parents[input], node.parentOutputs[input]];
  while (parent?.isInput && !parent.sink) {
    const given: Node | null = parent.parents[0];
    if (!given || !(given.mask & bit)) break;
    [parent, output] = [given, parent.parentOutputs[0]];
  }
  return parent && { node: parent, output };
}

/** Cotangents of a node's parents, owned; null where none is needed or a sink took the contribution. */
function runBackward(
  node: Node,
  bit: number,
  cotangents: readonly (Tensor | null)[],
  streams: SequenceStreams | null,
): readonly (Tensor | null)[] {
  const needs = node.parents.map((p) => p !== null && (p.mask & bit) !== 0);
  const sinks = node.parents.map((_, i) => receiver(node, i, bit)?.node.sink ?? null);
  const sunk: { sink: GradientSink; contribution: Contribution }[] = [];
  return owned(() => {
    const saved = useSaved(node);
    const differentiable = trackedMask([...saved, ...cotangents]) !== 0;
    const sinkOf = (i: number): GradientSink | null => {
      const sink = sinks[i];
      return sink && (!differentiable || sink.differentiable) ? sink : null;
    };
    const context: BackwardContext = {
      cotangents: Array.from({ length: node.outputs }, (_, i) => cotangents[i] ?? null),
      get g(): Tensor {
        const first = cotangents[0];
        if (!first) throw new Error(`[${node.op}] backward was reached without a cotangent`);
        return first;
      },
      saved,
      needs,
      differentiable,
      buffer: (i) => (differentiable ? null : (sinks[i]?.buffer ?? null)),
      streams,
      shares: (i) => sinks[i]?.shares ?? null,
      sink: sinkOf,
    };
    const given = inBackwardOf(node.op, () => node.backward(context));
    const tensors = node.parents.map((parent, i): Tensor | null => {
      const value = given[i];
      if (!needs[i] || !parent || !value) return null;
      if (!isContribution(value)) return settle(value, node.inputShapes[i], node.inputDTypes[i], streams);
      const sink = sinkOf(i);
      if (sink) {
        sunk.push({ sink, contribution: value });
        return null;
      }
      return settle(value.materialize(), node.inputShapes[i], node.inputDTypes[i], streams);
    });
    for (const { sink, contribution } of sunk) sink.accept(contribution);
    return tensors;
  });
}

/** Hands an owned cotangent to the parent's sink, or keeps it for the parent's own backward. */
function deliver(to: ReturnType<typeof receiver>, value: Tensor, pending: Map<Node, (Tensor | null)[]>): void {
  if (!to) return;
  const { sink } = to.node;
  if (sink && (value.node === null || sink.differentiable)) {
    owned(() => {
      sink.accept(value);
      return [];
    });
    value.dispose();
  } else accumulate(pending, to.node, to.output, value);
}

const isContribution = (value: Tensor | Contribution): value is Contribution => 'materialize' in value;

/** Undoes broadcasting and promotion, once, for every rule. With streams, rows are the rule's own business. */
function settle(
  value: Tensor,
  shape: readonly number[],
  dtype: Tensor['dtype'],
  streams: SequenceStreams | null,
): Tensor {
  const expected = streams && value.ndim === shape.length ? [value.shape[0], ...shape.slice(1)] : shape;
  const summed = sameShape(value.shape, expected) ? value : tapeOps().sumTo(value, expected);
  return summed.dtype === dtype ? summed : tapeOps().cast(summed, dtype);
}

/** Adds an owned cotangent to what is pending for one output of a node. */
function accumulate(pending: Map<Node, (Tensor | null)[]>, node: Node, output: number, value: Tensor): void {
  let slots = pending.get(node);
  if (!slots) {
    slots = [];
    pending.set(node, slots);
  }
  const present = slots[output];
  if (!present) {
    slots[output] = value;
    return;
  }
  if (present.node === null && value.node === null && present.storage.exclusive && present.contiguous) {
    tapeOps().addInPlace(present, value);
  } else {
    [slots[output]] = owned(() => [tapeOps().add(present, value)]);
    present.dispose();
  }
  value.dispose();
}

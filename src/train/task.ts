// What the loop trains: a task accumulates the gradients of one optimizer step and says what it measured.
import { GradientBuffers } from '../autograd/sinks.js';
import type { CausalLM } from '../models/causal-lm.js';
import type { ModelParameters, ParameterMap } from '../models/parameters.js';
import type { ParameterGroup } from '../optim/optimizer.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Metrics } from './hooks.js';

/** Which variables an optimizer moves. `backbone` is θ, `adapters` φ. */
export type GroupName = 'backbone' | 'adapters';

/** The trained parameters of a model with their gradient buffers. */
export class Trainable {
  readonly model: CausalLM;
  readonly groups: readonly GroupName[];
  readonly gradients: ReadonlyMap<GroupName, GradientBuffers>;

  constructor(model: CausalLM, groups: readonly GroupName[]) {
    this.model = model;
    this.groups = groups;
    this.gradients = new Map(groups.map((g) => [g, new GradientBuffers(parametersOf(model, g))]));
  }

  parameterGroups(): ParameterGroup[] {
    return this.groups.map((name) => ({
      name,
      parameters: parametersOf(this.model, name),
      gradients: this.gradients.get(name)!.buffers,
    }));
  }

  zeroGradients(): void {
    for (const g of this.gradients.values()) g.zero();
  }

  dispose(): void {
    for (const g of this.gradients.values()) g.dispose();
  }
}

export const parametersOf = (model: CausalLM, group: GroupName): ParameterMap =>
  group === 'backbone' ? model.backbone : model.adapters;

/** `parameters` with the tensors of some groups replaced, in the order of their maps. */
export function replaceGroups(
  parameters: ModelParameters,
  groups: readonly GroupName[],
  tensors: readonly Tensor[],
): ModelParameters {
  let at = 0;
  const replaced = (map: ParameterMap): ParameterMap => new Map([...map.keys()].map((name) => [name, tensors[at++]]));
  const result = { ...parameters };
  for (const group of groups) {
    if (group === 'backbone') result.backbone = replaced(parameters.backbone);
    else if (parameters.adapters) result.adapters = replaced(parameters.adapters);
  }
  return result;
}

/** The tensors of some groups, in the order of replaceGroups. */
export const tensorsOf = (parameters: ModelParameters, groups: readonly GroupName[]): Tensor[] =>
  groups.flatMap((g) => [...((g === 'backbone' ? parameters.backbone : parameters.adapters) ?? new Map()).values()]);

/** What one optimizer step measured, read when the work has run. */
export interface StepMeasurement {
  /** Scalars that must be finite for the update to happen. */
  losses: Tensor[];
  metrics: Promise<Metrics>;
}

/** One optimizer step's place: its number from 0 and the examples of its micro-batches. */
export interface StepInput {
  step: number;
  microBatches: readonly (readonly number[])[];
}

export interface Task {
  readonly trainable: Trainable;
  /** Adds the gradients of a step to the (zeroed) buffers of `trainable`. Runs inside no scope; its losses are owned by the caller. */
  accumulate(input: StepInput): StepMeasurement | Promise<StepMeasurement>;
  /** Positions in the data file of a step's records, for messages. */
  records(input: StepInput): number[];
  /** Frees what the task keeps between steps. */
  dispose?(): void;
}

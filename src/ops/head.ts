// The vocabulary head: linear + log-softmax + gather in one pass over the vocabulary; [rows, vocabulary] never exists.
import { launch } from '../native/launch.js';
import { accumulationDType } from '../tensor/dtype.js';
import type { Tensor } from '../tensor/tensor.js';
import { fused } from './fused.js';
import { headBackward } from './head-backward.js';
import { contiguous, emptyLike, fill, gatherLast, gatherRows } from './movement.js';
import { linear } from './product.js';
import { logSoftmax } from './softmax.js';

/** Statistics of each hidden row's next-token distribution, `[R]` each, off the tape. */
export interface HeadStatistics {
  /** In nats. */
  entropy: Tensor;
  /** The most likely id (the first of equals), as a floating number. */
  argmax: Tensor;
  meanLogit: Tensor;
  /** log of the sum of squared probabilities (WPO weighting). */
  logSumSquares: Tensor;
}

export interface HeadOptions {
  statistics?: boolean;
  /** int32 `[Q]`: ids whose log-probabilities are wanted at every row, off the tape. */
  probes?: Tensor | null;
}

/** vocabHead's log-probabilities from primitive ops. */
export function headDefinition(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor): Tensor {
  return gatherLast(gatherRows(logSoftmax(linear(hidden, weight)), rows), ids);
}

/**
 * Log-probabilities of targets: `[N]` in float32 (float64 for float64), entry n = log softmax(hidden[row[n]] weightᵀ)[id[n]], for
 * hidden `[R, H]`, weight `[V, H]`, int32 rows `[N]` and ids `[N]`. A row may serve several targets, or none.
 *
 * `probeLogProbs` is `[R, Q]`; null without probes.
 *
 * @throws at the next read where an id is outside [0, V) or a row outside [0, R)
 */
export function vocabHead(
  hidden: Tensor,
  weight: Tensor,
  rows: Tensor,
  ids: Tensor,
  options: HeadOptions = {},
): { logProbs: Tensor; statistics: HeadStatistics | null; probeLogProbs: Tensor | null } {
  if (hidden.ndim !== 2 || weight.ndim !== 2 || hidden.shape[1] !== weight.shape[1] || hidden.dtype !== weight.dtype)
    throw new RangeError(
      `[vocabHead] expected hidden [R, H] and weight [V, H] of one dtype, found ${hidden.describe()} and ${weight.describe()}`,
    );
  if (rows.dtype !== 'int32' || ids.dtype !== 'int32' || rows.size !== ids.size)
    throw new RangeError(
      `[vocabHead] expected int32 rows and ids of one length, found ${rows.describe()} and ${ids.describe()}`,
    );
  const probes = options.probes ?? null;
  if (probes && (probes.dtype !== 'int32' || probes.ndim !== 1))
    throw new TypeError(`[vocabHead] expected int32 probes [Q], found ${probes.describe()}`);
  const dtype = accumulationDType(hidden.dtype);
  const probeLogProbs = probes && fill(emptyLike(hidden, [hidden.shape[0], probes.size], dtype), 0);
  const stats = options.statistics ? fill(emptyLike(hidden, [hidden.shape[0], 4], dtype), 0) : null;
  const logProbs = fused({
    name: 'vocabHead',
    inputs: [hidden, weight],
    forward: () => {
      const output = emptyLike(hidden, [ids.size], dtype);
      const lse = emptyLike(hidden, [hidden.shape[0]], dtype);
      const kernel = [hidden, weight, rows, ids].map((t) => contiguous(t.detach()));
      if (hidden.size > 0) launch('vocabHead', [output, lse, stats, probeLogProbs, ...kernel, probes]);
      for (const t of kernel) t.dispose();
      return { output, saved: [lse, rows, ids] };
    },
    definition: (h, w) => headDefinition(h, w, rows, ids),
    streamed: true,
    backward: ({ g, saved: [h, w, lse, r, t], needs, buffer, streams, shares }) => {
      if (streams) {
        if (streams.indexKind('vocabHead', r) !== 'targetOrder')
          throw new Error('[vocabHead] expected a row for each target where gradients are kept by sequence');
        return headBackward(h, w, { lse, ids: t }, streams, shares(1));
      }
      const kernel = [g, h, w, lse, r, t].map((x) => contiguous(x.detach()));
      const dhidden = needs[0] ? emptyLike(h) : null;
      const sink = needs[1] ? buffer(1) : null;
      const dweight = needs[1] ? (sink ?? fill(emptyLike(w, w.shape, dtype), 0)) : null;
      if (h.size > 0) launch('vocabHeadBackward', [dhidden, dweight, ...kernel, null]);
      return [dhidden, sink ? null : dweight];
    },
  });
  return { logProbs, statistics: stats && columns(stats), probeLogProbs };
}

function columns(stats: Tensor): HeadStatistics {
  const rows = stats.shape[0];
  const size = stats.dtype === 'float64' ? 8 : 4;
  const column = (i: number): Tensor => stats.view([rows], [4], stats.byteOffset + i * size);
  return { entropy: column(0), argmax: column(1), meanLogit: column(2), logSumSquares: column(3) };
}

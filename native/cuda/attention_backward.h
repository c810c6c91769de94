// The call of attention's backward as its two implementations see it: attention_backward.cu and
// attention_general_backward.cu.
#pragma once

#include "cuda/attention.h"

namespace kg::cuda::attention {

// Everything is laid out in cotangent rows but q, k, v, out and lse, which are reached through rowMap.
template <class T>
struct Backward {
  HeadRows<T> dq, dk, dv;
  HeadRows<const T> dout, q, k, v, out;
  const compute_t<T>* lse;  // [primal rows, Hq]
  RowMap rowMap;
  SegmentTable segments;  // of the cotangent rows
  Heads heads;            // heads.rows: cotangent rows
  double scale;
  FaultSink faults;
};

// Where a call's tensors begin: dq dk dv; dout; q k v; segments, cotangentSegments, rowMap.
struct Places {
  int dq, dout, q, segments;
};

// All of p but dout..lse.
template <class T>
void readSide(const char* op, const Call& call, const Places& at, Backward<T>& p) {
  p.heads = checkedHeads(op, call[at.q], call[at.q + 1], call[at.q + 2]);
  const int32_t primalRows = p.heads.rows;
  p.heads.rows = static_cast<int32_t>(call[at.dout].size(0));
  const TensorView &map = call[at.segments + 2], &own = call[at.segments + 1];
  if (map.present() && (map.dtype != DType::I32 || map.numel() != p.heads.rows))
    fail("[%s] expected rowMap int32 [%lld], found %s with %lld entries", op, (long long)p.heads.rows,
         dtypeName(map.dtype), (long long)map.numel());
  if (!map.present() && p.heads.rows != primalRows)
    fail("[%s] expected dout with %lld rows, found %lld; give a rowMap", op, (long long)primalRows,
         (long long)p.heads.rows);
  p.rowMap = RowMap::of(map, primalRows);
  p.segments = checkedSegments(op, own.present() ? own : call[at.segments], p.heads.rows);
  p.scale = call.attr(0);
  p.dq = HeadRows<T>::of(call[at.dq]);
  p.dk = HeadRows<T>::of(call[at.dq + 1]);
  p.dv = HeadRows<T>::of(call[at.dq + 2]);
  p.faults = context(call).faults;
}

// What tensor cores are not for: any dtype, head dimensions up to 256.
void backwardGeneral(const Call& call, const Backward<float>& p);
void backwardGeneral(const Call& call, const Backward<double>& p);
void backwardGeneral(const Call& call, const Backward<bf16>& p);

}  // namespace kg::cuda::attention

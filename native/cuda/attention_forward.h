// The call of attention's forward as its two implementations see it: attention.cu and attention_general.cu.
#pragma once

#include "cuda/attention.h"

namespace kg::cuda::attention {

template <class T>
struct Forward {
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  compute_t<T>* lse;  // [T, Hq]
  SegmentTable segments;
  Heads heads;
  double scale;
  FaultSink faults;
};

// What tensor cores are not for: any dtype, head dimensions up to 256.
void forwardGeneral(const Call& call, const Forward<float>& p);
void forwardGeneral(const Call& call, const Forward<double>& p);
void forwardGeneral(const Call& call, const Forward<bf16>& p);

}  // namespace kg::cuda::attention

// Folding of axes and the loop over runs that every elementwise kernel shares. No arithmetic on elements here.
#include "cpu/strided.h"

#include <cstring>

#include "runtime/error.h"
#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int64_t kBuffer = 256;  // elements of a run that go through a buffer at a time

void checkShapes(const TensorView& out, const TensorView& in) {
  bool equal = in.ndim == out.ndim;
  for (int i = 0; equal && i < out.ndim; i++) equal = in.shape[i] == out.shape[i];
  if (!equal)
    fail("expected views of one shape, found %d and %d axes or unequal lengths; try expanding by stride 0", out.ndim,
         in.ndim);
}

void swapAxes(Walk& w, int i, int j) {
  auto exchange = [&](int64_t* a) {
    const int64_t t = a[i];
    a[i] = a[j];
    a[j] = t;
  };
  exchange(w.shape);
  for (int o = 0; o < w.operands; o++) exchange(w.strides[o]);
}

// Stable insertion sort by falling output stride.
void sortAxes(Walk& w) {
  for (int i = 1; i < w.ndim; i++)
    for (int j = i; j > 0 && w.strides[0][j - 1] < w.strides[0][j]; j--) swapAxes(w, j - 1, j);
}

bool mergeable(const Walk& w, int axis) {
  for (int o = 0; o < w.operands; o++)
    if (w.strides[o][axis] != w.strides[o][axis + 1] * w.shape[axis + 1]) return false;
  return true;
}

void mergeAxes(Walk& w) {
  int kept = 0;
  for (int i = 1; i < w.ndim; i++) {
    // Compare the axis kept last with axis i, brought next to it.
    if (kept + 1 != i) {
      w.shape[kept + 1] = w.shape[i];
      for (int o = 0; o < w.operands; o++) w.strides[o][kept + 1] = w.strides[o][i];
    }
    if (mergeable(w, kept)) {
      w.shape[kept] *= w.shape[kept + 1];
      for (int o = 0; o < w.operands; o++) w.strides[o][kept] = w.strides[o][kept + 1];
    } else {
      kept++;
    }
  }
  if (w.ndim > 0) w.ndim = kept + 1;
}

template <class T>
void gatherTyped(T* __restrict buffer, const T* __restrict from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) buffer[i] = from[i * stride];
}
template <class T>
void scatterTyped(T* __restrict to, int64_t stride, const T* __restrict buffer, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i * stride] = buffer[i];
}

bool direct(const Walk& w, int mayBroadcast, int* broadcast) {
  bool all = w.innerStride(0) == 1;
  *broadcast = 0;
  for (int o = 1; o < w.operands; o++) {
    if (w.innerStride(o) == 0 && (mayBroadcast >> (o - 1) & 1)) {
      *broadcast |= 1 << (o - 1);
    } else {
      all = all && w.innerStride(o) == 1;
    }
  }
  return all;
}

// One run through buffers: gather what is strided, compute, scatter.
void bufferedRun(const Walk& w, BlockFn block, char* const* at, int64_t n, int broadcast) {
  alignas(64) char buffers[kMaxOperands][kBuffer * 8];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t count = n - i < kBuffer ? n - i : kBuffer;
    const void* in[kMaxOperands];
    for (int o = 1; o < w.operands; o++) {
      const int64_t stride = w.innerStride(o);
      const char* from = at[o] + i * stride * w.elementSize[o];
      in[o - 1] = from;
      if (stride == 1 || (broadcast >> (o - 1) & 1)) continue;
      gatherStrided(buffers[o], from, stride, count, w.elementSize[o]);
      in[o - 1] = buffers[o];
    }
    const int64_t stride = w.innerStride(0);
    char* to = at[0] + i * stride * w.elementSize[0];
    block(stride == 1 ? to : buffers[0], in, count, broadcast);
    if (stride != 1) scatterStrided(to, stride, buffers[0], count, w.elementSize[0]);
  }
}

void runRange(const Walk& w, BlockFn block, int mayBroadcast, int64_t begin, int64_t end) {
  int broadcast;
  const bool isDirect = direct(w, mayBroadcast, &broadcast);
  int64_t index[kMaxDims];
  int64_t rest = begin;
  for (int d = w.ndim - 1; d >= 0; d--) {
    index[d] = rest % w.shape[d];
    rest /= w.shape[d];
  }
  char* at[kMaxOperands];
  for (int o = 0; o < w.operands; o++) {
    int64_t offset = 0;
    for (int d = 0; d < w.ndim; d++) offset += index[d] * w.strides[o][d];
    at[o] = w.data[o] + offset * w.elementSize[o];
  }
  const int last = w.ndim - 1;
  while (begin < end) {
    const int64_t left = w.shape[last] - index[last];
    const int64_t n = left < end - begin ? left : end - begin;
    if (isDirect) {
      block(at[0], reinterpret_cast<const void* const*>(at + 1), n, broadcast);
    } else {
      bufferedRun(w, block, at, n, broadcast);
    }
    begin += n;
    // The start of the next run: back to column 0, then carry.
    for (int o = 0; o < w.operands; o++) at[o] -= index[last] * w.strides[o][last] * w.elementSize[o];
    index[last] = 0;
    for (int d = last - 1; d >= 0; d--) {
      const bool carry = ++index[d] == w.shape[d];
      for (int o = 0; o < w.operands; o++) at[o] += (carry ? 1 - w.shape[d] : 1) * w.strides[o][d] * w.elementSize[o];
      if (!carry) break;
      index[d] = 0;
    }
  }
}

}  // namespace

Walk makeWalk(const TensorView* const* views, int count) {
  Walk w;
  const TensorView& out = *views[0];
  w.operands = count;
  w.numel = 1;
  for (int o = 0; o < count; o++) {
    if (o > 0) checkShapes(out, *views[o]);
    w.data[o] = static_cast<char*>(views[o]->data);
    w.elementSize[o] = static_cast<int32_t>(dtypeSize(views[o]->dtype));
  }
  w.ndim = 0;
  for (int i = 0; i < out.ndim; i++) {
    w.numel *= out.shape[i];
    if (out.shape[i] == 1) continue;
    w.shape[w.ndim] = out.shape[i];
    for (int o = 0; o < count; o++) w.strides[o][w.ndim] = views[o]->strides[i];
    w.ndim++;
  }
  sortAxes(w);
  mergeAxes(w);
  if (w.ndim == 0) {
    w.ndim = 1;
    w.shape[0] = 1;
    for (int o = 0; o < count; o++) w.strides[o][0] = 1;
  }
  return w;
}

void gatherStrided(void* buffer, const char* from, int64_t stride, int64_t n, int elementSize) {
  switch (elementSize) {
    case 1:
      return gatherTyped(static_cast<uint8_t*>(buffer), reinterpret_cast<const uint8_t*>(from), stride, n);
    case 2:
      return gatherTyped(static_cast<uint16_t*>(buffer), reinterpret_cast<const uint16_t*>(from), stride, n);
    case 4:
      return gatherTyped(static_cast<uint32_t*>(buffer), reinterpret_cast<const uint32_t*>(from), stride, n);
    default:
      return gatherTyped(static_cast<uint64_t*>(buffer), reinterpret_cast<const uint64_t*>(from), stride, n);
  }
}

void scatterStrided(char* to, int64_t stride, const void* buffer, int64_t n, int elementSize) {
  switch (elementSize) {
    case 1:
      return scatterTyped(reinterpret_cast<uint8_t*>(to), stride, static_cast<const uint8_t*>(buffer), n);
    case 2:
      return scatterTyped(reinterpret_cast<uint16_t*>(to), stride, static_cast<const uint16_t*>(buffer), n);
    case 4:
      return scatterTyped(reinterpret_cast<uint32_t*>(to), stride, static_cast<const uint32_t*>(buffer), n);
    default:
      return scatterTyped(reinterpret_cast<uint64_t*>(to), stride, static_cast<const uint64_t*>(buffer), n);
  }
}

namespace {

// Whether an input runs along another axis than the output does, over more than a cache holds.
bool crossed(const Walk& w) {
  if (w.ndim < 2 || w.numel < 16384) return false;
  for (int o = 1; o < w.operands; o++)
    for (int d = 0; d + 1 < w.ndim; d++)
      if (w.strides[o][d] == 1 && w.innerStride(o) > 1) return true;
  return false;
}

void runFlat(const Walk& walk, BlockFn block, int64_t grain, int mayBroadcast) {
  if (walk.numel <= grain) {
    if (walk.numel > 0) runRange(walk, block, mayBroadcast, 0, walk.numel);
    return;
  }
  parallelFor(walk.numel, grain,
              [&](int64_t begin, int64_t end, int) { runRange(walk, block, mayBroadcast, begin, end); });
}

}  // namespace

void runBlocks(const Walk& walk, BlockFn block, int64_t grain, int mayBroadcast) {
  if (!crossed(walk)) return runFlat(walk, block, grain, mayBroadcast);
  // In strips of columns, so that a cache line of the crossing input serves all its rows before it is lost.
  constexpr int64_t kStrip = 64;
  Walk strip = walk;
  for (int64_t first = 0; first < walk.inner(); first += kStrip) {
    strip.shape[walk.ndim - 1] = walk.inner() - first < kStrip ? walk.inner() - first : kStrip;
    strip.numel = walk.numel / walk.inner() * strip.inner();
    for (int o = 0; o < walk.operands; o++)
      strip.data[o] = walk.data[o] + first * walk.innerStride(o) * walk.elementSize[o];
    runFlat(strip, block, grain, mayBroadcast);
  }
}

}  // namespace kg::cpu::KG_ISA

// Folding of axes for the kernels that walk strided views. Host code alone.
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

void checkShapes(const TensorView& out, const TensorView& in) {
  bool equal = in.ndim == out.ndim;
  for (int i = 0; equal && i < out.ndim; i++) equal = in.shape[i] == out.shape[i];
  if (!equal)
    fail("expected views of one shape, found %d and %d axes or unequal lengths; try expanding by stride 0", out.ndim,
         in.ndim);
}

void exchange(int64_t* a, int i, int j) {
  const int64_t t = a[i];
  a[i] = a[j];
  a[j] = t;
}

// Stable insertion sort by falling output stride.
void sortAxes(Walk& w) {
  for (int i = 1; i < w.ndim; i++)
    for (int j = i; j > 0 && w.strides[0][j - 1] < w.strides[0][j]; j--) {
      exchange(w.shape, j - 1, j);
      for (int o = 0; o < w.operands; o++) exchange(w.strides[o], j - 1, j);
    }
}

bool mergeable(const Walk& w, int axis) {
  for (int o = 0; o < w.operands; o++)
    if (w.strides[o][axis] != w.strides[o][axis + 1] * w.shape[axis + 1]) return false;
  return true;
}

void mergeAxes(Walk& w) {
  for (int axis = 0; axis + 1 < w.ndim;) {
    if (!mergeable(w, axis)) {
      axis++;
      continue;
    }
    w.shape[axis + 1] *= w.shape[axis];
    dropAxis(w, axis);
  }
}

}  // namespace

void dropAxis(Walk& w, int axis) {
  w.ndim--;
  for (int d = axis; d < w.ndim; d++) {
    w.shape[d] = w.shape[d + 1];
    for (int o = 0; o < w.operands; o++) w.strides[o][d] = w.strides[o][d + 1];
  }
}

Walk makeWalk(const TensorView* const* views, int count) {
  Walk w{};
  const TensorView& out = *views[0];
  w.operands = count;
  w.numel = out.numel();
  for (int o = 0; o < count; o++) {
    if (o > 0) checkShapes(out, *views[o]);
    w.data[o] = static_cast<char*>(views[o]->data);
    w.elementSize[o] = static_cast<int32_t>(dtypeSize(views[o]->dtype));
  }
  for (int i = 0; i < out.ndim; i++) {
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

TensorView numberView(const TensorView& like, DType dtype) {
  TensorView v = like;
  v.data = nullptr;
  v.dtype = dtype;
  for (int i = 0; i < v.ndim; i++) v.strides[i] = 0;
  return v;
}

bool packable(const Walk& w, int width) {
  if (width == 1) return true;
  if (w.ndim > 1 && w.inner() % width != 0) return false;
  for (int o = 0; o < w.operands; o++) {
    if (o > 0 && w.innerStride(o) == 0) continue;
    const int64_t size = w.elementSize[o], pack = width * size < 16 ? width * size : 16;
    if (w.innerStride(o) != 1 || reinterpret_cast<uintptr_t>(w.data[o]) % pack != 0) return false;
    for (int d = 0; d + 1 < w.ndim; d++)
      if (w.strides[o][d] * size % pack != 0) return false;
  }
  return true;
}

}  // namespace kg::cuda

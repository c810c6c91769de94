// scatterAddRows: out[V, D] += src[N, D] at ids[N], i ascending for each id: the gradient of an embedding.
//
// A thread block a position i (and panel of 1,024 columns) reads the ids from the start. Meets it i's id before i, that
// block works for i and this one leaves; otherwise it sums the rows of its id in order, in registers, and rounds once.
// No scratch memory, nothing of the table's size is touched, no atomics.
//
// Roofline (H100, 3.35 TB/s), N = 8192, D = 896 in bfloat16 into float32: rows 15 MB, table rows 2 * 4 B * 896 * U for
// U distinct ids (2,000: 14 MB): 9 us. Looking for ids costs more: N blocks read up to N ids each, 4,096 a step and
// about 130 instructions a warp: 8192 * 2 * 8 * 130 / (132 * 4 * 1.7e9) = 19 us at most, less where ids repeat. An id
// that occurs 400 times is summed at about 0.1 us a row, four rows ahead.
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // of one thread, kThreads apart
constexpr int kPanel = kColumns * kThreads;
constexpr int kStep = 4096;            // ids read at a time
constexpr int kWords = kStep / kWarp;  // of bits, one an id
constexpr int kOwn = kWords / kWarp;   // words that a lane of the first warp turns into positions
constexpr int kAhead = 4;              // rows read before the first is added

// Which of the ids [first, first + kStep) are `id`: one bit each, in order. All threads of the block.
KG_DEVICE void findId(const int32_t* ids, int64_t n, int64_t first, int32_t id, uint32_t* bits) {
  constexpr int kRounds = kStep / kThreads;
  bool same[kRounds];
  KG_UNROLL for (int k = 0; k < kRounds; k++) {
    const int64_t at = first + k * kThreads + threadIdx.x;
    same[k] = at < n && ids[at] == id;
  }
  KG_UNROLL for (int k = 0; k < kRounds; k++) {
    const uint32_t found = ballot(same[k]);
    if (laneId() == 0) bits[k * (kThreads / kWarp) + warpId()] = found;
  }
}

// Whether any bit is set; the same in all threads.
KG_DEVICE bool anyBit(const uint32_t* bits) {
  uint32_t own = 0;
  KG_UNROLL for (int k = 0; k < kOwn; k++) own |= bits[k * kWarp + laneId()];
  return anyLane(own != 0);
}

// Writes the positions of the bits that are set, ascending; returns how many there are. One warp's work.
KG_DEVICE int listBits(const uint32_t* bits, uint16_t* list) {
  const uint32_t* words = bits + laneId() * kOwn;
  int own = 0;
  KG_UNROLL for (int k = 0; k < kOwn; k++) own += countBits(words[k]);
  int through = own;
  KG_UNROLL for (int delta = 1; delta < kWarp; delta *= 2) {
    const int left = shuffleUp(through, delta);
    if (laneId() >= delta) through += left;
  }
  int next = through - own;
  KG_LOOP for (int k = 0; k < kOwn; k++) {
    KG_LOOP for (uint32_t word = words[k]; word != 0; word &= word - 1) list[next++] =
        static_cast<uint16_t>((laneId() * kOwn + k) * kWarp + countBits((word & (0u - word)) - 1));
  }
  return shuffle(through, kWarp - 1);
}

// Adds the `count` listed rows to this thread's columns, in order.
template <class C, class S>
KG_DEVICE void addRows(C (&sum)[kColumns], const S* src, int64_t width, int64_t column, const uint16_t* list,
                       int count) {
  KG_LOOP for (int m = 0; m < count; m += kAhead) {
    C v[kAhead][kColumns];
    KG_UNROLL for (int r = 0; r < kAhead; r++) {
      KG_UNROLL for (int c = 0; c < kColumns; c++) {
        const int64_t at = column + c * kThreads;
        v[r][c] = m + r < count && at < width ? static_cast<C>(src[list[m + r] * width + at]) : C(0);
      }
    }
    KG_UNROLL for (int r = 0; r < kAhead; r++) {
      if (m + r >= count) break;
      KG_UNROLL for (int c = 0; c < kColumns; c++) sum[c] += v[r][c];
    }
  }
}

template <class O, class S>
KG_GLOBAL KG_LAUNCH_BOUNDS(kThreads) void scatterAddKernel(O* out, const S* src, const int32_t* ids, int64_t n,
                                                           int64_t width, int64_t limit, FaultSink faults) {
  using C = compute_t<O>;
  KG_SHARED(uint32_t, bits, 2 * kWords);
  KG_SHARED(uint16_t, list, kStep);
  KG_SHARED(int32_t, found, 1);
  const int64_t i = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kPanel + threadIdx.x;
  const int32_t id = ids[i];
  if (id < 0 || id >= limit) {
    if (threadIdx.x == 0) reportFault(faults, FaultKind::IdOutOfRange, id, i, limit);
    return;
  }
  O* to = out + id * width;
  C sum[kColumns] = {};
  int buffer = 0;
  KG_LOOP for (int64_t first = 0; first < n; first += kStep) {
    buffer ^= 1;  // the last step's bits may still be read: one barrier a step is enough
    uint32_t* words = bits + buffer * kWords;
    findId(ids, n, first, id, words);
    syncThreads();
    if (!anyBit(words)) continue;
    if (warpId() == 0) {
      const int count = listBits(words, list);
      if (laneId() == 0) found[0] = count;
    }
    syncThreads();
    const int count = found[0];
    if (first + list[0] < i) return;  // an earlier block works for this id
    if (first <= i) {                 // list[0] is i
      KG_UNROLL for (int c = 0; c < kColumns; c++) {
        if (column + c * kThreads < width) sum[c] = static_cast<C>(to[column + c * kThreads]);
      }
    }
    addRows(sum, src + first * width, width, column, list, count);
  }
  KG_UNROLL for (int c = 0; c < kColumns; c++) {
    if (column + c * kThreads < width) to[column + c * kThreads] = static_cast<O>(sum[c]);
  }
}

template <class O, class S>
void scatterAdd(const Call& call) {
  const int64_t n = call[2].numel();
  int64_t width = 1;
  for (int d = 1; d < call[0].ndim; d++) width *= call[0].shape[d];
  const Context& on = context(call);
  launch(call, {gridOf(n, ceilDiv(width, kPanel)), kThreads}, scatterAddKernel<O, S>, call[0].ptr<O>(),
         call[1].ptr<S>(), call[2].ptr<int32_t>(), n, width, call[0].shape[0], on.faults);
}

}  // namespace

void kernel_scatterAddRows(const Call& call) {
  if (!call[1].contiguous()) fail("expected a contiguous src, found strides; try contiguous() first");
  if (call[2].dtype != DType::I32) fail("expected int32 ids, found %s", dtypeName(call[2].dtype));
  if (!call[2].contiguous()) fail("expected a contiguous ids, found strides; try contiguous() first");
  const DType out = call[0].dtype, src = call[1].dtype;
  if (out == DType::F32 && src == DType::F32) return scatterAdd<float, float>(call);
  if (out == DType::F32 && src == DType::BF16) return scatterAdd<float, bf16>(call);
  if (out == DType::F64 && src == DType::F64) return scatterAdd<double, double>(call);
  if (out == DType::BF16 && src == DType::BF16) return scatterAdd<bf16, bf16>(call);
  fail("expected one floating dtype, or bfloat16 into float32, found %s into %s", dtypeName(src), dtypeName(out));
}

}  // namespace kg::cuda

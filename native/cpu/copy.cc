// copy: any strided view to any other, between any two dtypes. Same-size transpositions go by tiles of one cache line.
#include "cpu/fused.h"
#include "cpu/half.h"
#include "cpu/strided.h"

namespace kg::cpu::KG_ISA {
namespace {

constexpr int64_t kGrain = 65536;

struct Bool {
  uint8_t value;
};

// Conversion of one element: floating point to integer truncates and saturates, NaN becomes 0; to bool is != 0.
template <class D, class S>
KG_INLINE D convertElement(S x) {
  if constexpr (std::is_same_v<S, Bool>) {
    return convertElement<D>(static_cast<uint8_t>(x.value != 0));
  } else if constexpr (std::is_same_v<S, bf16>) {
    return convertElement<D>(static_cast<float>(x));
  } else if constexpr (std::is_same_v<D, Bool>) {
    return {static_cast<uint8_t>(x != S(0))};
  } else if constexpr (std::is_same_v<D, bf16>) {
    return bf16(static_cast<float>(x));
  } else if constexpr (std::is_floating_point_v<S> && std::is_integral_v<D>) {
    constexpr double low = std::is_same_v<D, int32_t> ? INT32_MIN : 0,
                     high = std::is_same_v<D, int32_t> ? INT32_MAX : 255;
    double wide = x == x ? static_cast<double>(x) : 0.0;
    wide = wide > low ? wide : low;
    return static_cast<D>(static_cast<int32_t>(wide < high ? wide : high));
  } else {
    return static_cast<D>(x);
  }
}

template <class D, class S>
void convertBlock(void* out, const void* const* in, int64_t n, int) {
  D* __restrict y = static_cast<D*>(out);
  const S* __restrict x = static_cast<const S*>(in[0]);
  if constexpr ((std::is_same_v<D, bf16> && std::is_same_v<S, float>) ||
                (std::is_same_v<D, float> && std::is_same_v<S, bf16>)) {
    forVectors<float>(
        n, [=](int64_t i, int count) KG_LAMBDA_INLINE { storeLanes(y + i, loadLanes<float>(x + i, count), count); });
  } else {
    for (int64_t i = 0; i < n; i++) y[i] = convertElement<D>(x[i]);
  }
}

template <class D>
BlockFn blockFrom(DType from) {
  switch (from) {
    case DType::F32:
      return convertBlock<D, float>;
    case DType::F64:
      return convertBlock<D, double>;
    case DType::BF16:
      return convertBlock<D, bf16>;
    case DType::I32:
      return convertBlock<D, int32_t>;
    case DType::U8:
      return convertBlock<D, uint8_t>;
    case DType::Bool:
      return convertBlock<D, Bool>;
    default:
      return nullptr;
  }
}

BlockFn converter(DType to, DType from) {
  switch (to) {
    case DType::F32:
      return blockFrom<float>(from);
    case DType::F64:
      return blockFrom<double>(from);
    case DType::BF16:
      return blockFrom<bf16>(from);
    case DType::I32:
      return blockFrom<int32_t>(from);
    case DType::U8:
      return blockFrom<uint8_t>(from);
    case DType::Bool:
      return blockFrom<Bool>(from);
    default:
      return nullptr;
  }
}

// float16 meets every other dtype in float.
template <class Step>
KG_INLINE void throughFloats(int64_t n, const Step& step) {
  constexpr int64_t kChunk = 512;
  for (int64_t i = 0; i < n; i += kChunk) step(i, min64(kChunk, n - i));
}
template <DType D>
void fromHalfBlock(void* out, const void* const* in, int64_t n, int) {
  const f16* x = static_cast<const f16*>(in[0]);
  if (D == DType::F32) return halvesToFloats(static_cast<float*>(out), x, n);
  throughFloats(n, [&](int64_t i, int64_t count) {
    float buffer[512];
    halvesToFloats(buffer, x + i, count);
    const void* from[] = {buffer};
    converter(D, DType::F32)(static_cast<char*>(out) + i * dtypeSize(D), from, count, 0);
  });
}
template <DType S>
void toHalfBlock(void* out, const void* const* in, int64_t n, int) {
  f16* y = static_cast<f16*>(out);
  if (S == DType::F32) return floatsToHalves(y, static_cast<const float*>(in[0]), n);
  throughFloats(n, [&](int64_t i, int64_t count) {
    float buffer[512];
    const void* from[] = {static_cast<const char*>(in[0]) + i * dtypeSize(S)};
    converter(DType::F32, S)(buffer, from, count, 0);
    floatsToHalves(y + i, buffer, count);
  });
}

#define KG_EACH_STORED(row)  \
  case DType::F32:           \
    return row<DType::F32>;  \
  case DType::F64:           \
    return row<DType::F64>;  \
  case DType::BF16:          \
    return row<DType::BF16>; \
  case DType::I32:           \
    return row<DType::I32>;  \
  case DType::U8:            \
    return row<DType::U8>;   \
  case DType::Bool:          \
    return row<DType::Bool>;
BlockFn halfConverter(DType to, DType from) {
  switch (from == DType::F16 ? to : from) {
    case DType::F16:
    case DType::None:
      return nullptr;
    default:
      break;
  }
  if (from == DType::F16) {
    switch (to) {
      KG_EACH_STORED(fromHalfBlock)
      default:
        return nullptr;
    }
  }
  switch (from) {
    KG_EACH_STORED(toHalfBlock)
    default:
      return nullptr;
  }
}
#undef KG_EACH_STORED

template <int Size>
void sameBlock(void* out, const void* const* in, int64_t n, int) {
  memcpy(out, in[0], n * Size);
}
BlockFn sameConverter(size_t size) {
  switch (size) {
    case 1:
      return sameBlock<1>;
    case 2:
      return sameBlock<2>;
    case 4:
      return sameBlock<4>;
    default:
      return sameBlock<8>;
  }
}

// A transposition inside a walk: the innermost axis i has unit stride in out, axis j in x.
struct Transposition {
  int64_t rows, columns;  // lengths of j and i
  int64_t outStride;      // of j in out
  int64_t inStride;       // of i in x
};

// A square of 16-byte rows, transposed by interleaving halves: after log2(n) rounds row and column have changed places.
template <class T>
KG_INLINE void transposeSquare(const T* from, int64_t fromStride, T* to, int64_t toStride) {
  constexpr int n = 16 / sizeof(T);
  typedef T Row __attribute__((vector_size(16)));
  Row low, high, rows[n], mixed[n];
  for (int i = 0; i < n; i++) {
    low[i] = static_cast<T>(i / 2 + (i % 2 ? n : 0));
    high[i] = static_cast<T>(low[i] + n / 2);
    memcpy(&rows[i], from + i * fromStride, 16);
  }
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) rows[i] = mixed[i];
  }
  for (int i = 0; i < n; i++) memcpy(to + i * toStride, &rows[i], 16);
}

// Rows [rowBegin, rowEnd) of one plane, tile by tile. A tile is first read into a buffer in lines of several cache
// lines: lines a power of two apart would otherwise throw each other out.
template <class T>
void transposePlane(T* __restrict out, const T* __restrict x, const Transposition& t, int64_t rowBegin,
                    int64_t rowEnd) {
  constexpr int64_t kTile = sizeof(T) == 8 ? 32 : 64, n = 16 / sizeof(T);
  alignas(64) T tile[kTile][kTile];
  for (int64_t j = rowBegin; j < rowEnd; j += kTile) {
    const int64_t height = min64(kTile, rowEnd - j);
    for (int64_t i = 0; i < t.columns; i += kTile) {
      const int64_t width = min64(kTile, t.columns - i);
      for (int64_t b = 0; b < width; b++) memcpy(tile[b], x + (i + b) * t.inStride + j, height * sizeof(T));
      for (int64_t a = 0; a < height; a += n)
        for (int64_t b = 0; b < width; b += n) {
          T* to = out + (j + a) * t.outStride + i + b;
          if (a + n <= height && b + n <= width) {
            transposeSquare(&tile[b][a], kTile, to, t.outStride);
          } else {
            for (int64_t c = 0; c < n && a + c < height; c++)
              for (int64_t d = 0; d < n && b + d < width; d++) to[c * t.outStride + d] = tile[b + d][a + c];
          }
        }
    }
  }
}

// Takes a transposition out of the walk: the two axes leave it. False where there is none worth a tile.
bool extractTransposition(Walk& w, Transposition* t) {
  const int last = w.ndim - 1;
  if (w.innerStride(0) != 1 || w.innerStride(1) == 1) return false;
  int j = 0;
  while (j < last && w.strides[1][j] != 1) j++;
  if (j == last || w.shape[j] < 4 || w.shape[last] < 4) return false;
  *t = {w.shape[j], w.shape[last], w.strides[0][j], w.strides[1][last]};
  for (int d = j; d + 1 < last; d++) {
    w.shape[d] = w.shape[d + 1];
    for (int o = 0; o < 2; o++) w.strides[o][d] = w.strides[o][d + 1];
  }
  w.ndim -= 2;
  return true;
}

template <class T>
void transposeAll(const Walk& outer, const Transposition& t) {
  constexpr int64_t kRows = 64;  // rows of out a task
  const int64_t stripes = (t.rows + kRows - 1) / kRows;
  int64_t planes = 1;
  for (int d = 0; d < outer.ndim; d++) planes *= outer.shape[d];
  auto range = [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; task++) {
      int64_t rest = task / stripes, offsets[2] = {0, 0};
      for (int d = outer.ndim - 1; d >= 0; d--) {
        for (int o = 0; o < 2; o++) offsets[o] += rest % outer.shape[d] * outer.strides[o][d];
        rest /= outer.shape[d];
      }
      const int64_t row = task % stripes * kRows;
      transposePlane(reinterpret_cast<T*>(outer.data[0]) + offsets[0],
                     reinterpret_cast<const T*>(outer.data[1]) + offsets[1], t, row, min64(row + kRows, t.rows));
    }
  };
  const int64_t tasks = planes * stripes;
  if (outer.numel <= kGrain) return range(0, tasks, 0);
  parallelFor(tasks, 1 + kGrain / (kRows * t.columns), range);
}

bool transposed(Walk& w) {
  Transposition t;
  if (w.numel == 0 || !extractTransposition(w, &t)) return false;
  switch (w.elementSize[0]) {
    case 1:
      transposeAll<uint8_t>(w, t);
      break;
    case 2:
      transposeAll<uint16_t>(w, t);
      break;
    case 4:
      transposeAll<uint32_t>(w, t);
      break;
    default:
      transposeAll<uint64_t>(w, t);
      break;
  }
  return true;
}

}  // namespace

void kernel_copy(const Call& call) {
  const DType to = call[0].dtype, from = call[1].dtype;
  const TensorView* views[] = {&call[0], &call[1]};
  Walk walk = makeWalk(views, 2);
  if (to == from) {
    if (!transposed(walk)) runBlocks(walk, sameConverter(dtypeSize(to)), kGrain, 0);
    return;
  }
  const BlockFn block = to == DType::F16 || from == DType::F16 ? halfConverter(to, from) : converter(to, from);
  if (!block) fail("expected two dtypes, found %s from %s", dtypeName(to), dtypeName(from));
  runBlocks(walk, block, kGrain, 0);
}

}  // namespace kg::cpu::KG_ISA

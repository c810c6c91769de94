// copy: any strided view to any other, between any two dtypes. Rounds to nearest even; floating point to integer
// truncates and saturates, NaN becomes 0; to bool is != 0.
//
// Same dtype: packs of 16 bytes where rows allow it, otherwise the widest unit that they do; a transposition goes by
// tiles through shared memory, so that both sides are read and written in runs of 64 elements. Between dtypes: the
// pairs that models use by packs; all others, and all other strides, by one kernel that converts through float64 (which
// holds every value of every dtype).
//
// Roofline (H100, 3.35 TB/s): a read and a write. 128 MiB of anything: 80 us; float32 to bfloat16, 64 Mi elements: 402
// MB, 120 us. Transposed: the same bytes; a tile of 64 x 64 bfloat16 is 64 runs of 128 bytes each way, and a
// multiprocessor holds 8 tiles, 64 KB of reads in flight.
#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

// ---- float16, a storage format --------------------------------------------------------------------------------------
struct f16 {
  uint16_t bits;
};

KG_DEVICE float floatOfBits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
KG_DEVICE uint32_t bitsOfFloat(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
// Subnormal and normal numbers alike are rescaled by a multiplication; the exponent of inf and NaN is set apart.
KG_DEVICE float halfToFloat(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t u = bitsOfFloat(floatOfBits(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) u |= 0x7f800000u;
  if (magnitude > 0x0f800000u) u |= 0x00400000u;
  return floatOfBits(u | sign);
}
KG_DEVICE uint16_t floatToHalf(float f) {
  uint32_t u = bitsOfFloat(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (u >> 13 & 0x3ffu));
  if (u >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Subnormal: the addition leaves the rounded number in the low bits.
  if (u < 0x38800000u) return static_cast<uint16_t>(sign | (bitsOfFloat(floatOfBits(u) + 0.5f) - 0x3f000000u));
  u += 0xfffu + (u >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
}

// ---- same dtype, by units of T --------------------------------------------------------------------------------------
template <class T, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void copyKernel(Layout<2> layout) {
  forItems<V>(layout, [&](const int64_t (&at)[2], int count) {
    T v[V];
    loadItem<V>(reinterpret_cast<const T*>(layout.data[1]) + at[1], layout.splat(1), count, v);
    storeItem<V>(reinterpret_cast<T*>(layout.data[0]) + at[0], count, v);
  });
}

// The walk in units of up to 8 bytes, where rows are made of such units.
void widen(Walk& w) {
  for (int unit = 8; unit > w.elementSize[0]; unit /= 2) {
    const int64_t by = unit / w.elementSize[0];
    bool fits = w.inner() % by == 0;
    for (int o = 0; o < 2 && fits; o++) {
      fits = w.innerStride(o) == 1 && reinterpret_cast<uintptr_t>(w.data[o]) % unit == 0;
      for (int d = 0; d + 1 < w.ndim && fits; d++) fits = w.strides[o][d] % by == 0;
    }
    if (!fits) continue;
    w.shape[w.ndim - 1] /= by;
    w.numel /= by;
    for (int o = 0; o < 2; o++) {
      for (int d = 0; d + 1 < w.ndim; d++) w.strides[o][d] /= by;
      w.elementSize[o] = unit;
    }
    return;
  }
}

// ---- same dtype, transposed -----------------------------------------------------------------------------------------
// Inside a walk: the innermost axis i has unit stride in out, axis j in x.
struct Transposition {
  int64_t rows, columns;        // lengths of j and i
  int64_t outStride, inStride;  // of j in out, of i in x
  int64_t tiles;
  Divisor tilesAcross, tilesDown;
  Layout<2> planes;  // the other axes; an item is a plane
};
static_assert(kDense<Transposition>);

template <class T>
constexpr int kTile = sizeof(T) == 8 ? 32 : 64;

template <class T>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void transposeKernel(Transposition t) {
  constexpr int kSide = kTile<T>, kPitch = kSide + (sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1);
  constexpr int kDown = kItemThreads / kWarp;  // lines of a tile that the block moves at a time
  KG_SHARED(T, tile, kSide * kPitch);
  KG_UNROLL_BY(1) for (uint32_t index = blockIdx.x; index < t.tiles; index += gridDim.x) {
    uint32_t across, down;
    const uint32_t plane = divide(divide(index, t.tilesAcross, &across), t.tilesDown, &down);
    int64_t at[2];
    locate<1>(t.planes, plane, at);
    const int64_t i0 = static_cast<int64_t>(across) * kSide, j0 = static_cast<int64_t>(down) * kSide;
    const T* x = reinterpret_cast<const T*>(t.planes.data[1]) + at[1];
    T* out = reinterpret_cast<T*>(t.planes.data[0]) + at[0];
    KG_UNROLL for (int k = 0; k < kSide; k += kDown) {
      KG_UNROLL for (int m = 0; m < kSide; m += kWarp) {
        const int i = k + warpId(), j = m + laneId();
        if (i0 + i < t.columns && j0 + j < t.rows) tile[i * kPitch + j] = x[(i0 + i) * t.inStride + j0 + j];
      }
    }
    syncThreads();
    KG_UNROLL for (int k = 0; k < kSide; k += kDown) {
      KG_UNROLL for (int m = 0; m < kSide; m += kWarp) {
        const int j = k + warpId(), i = m + laneId();
        if (i0 + i < t.columns && j0 + j < t.rows) out[(j0 + j) * t.outStride + i0 + i] = tile[i * kPitch + j];
      }
    }
    syncThreads();
  }
}

// Takes a transposition out of the walk: the two axes leave it. False where there is none worth a tile.
bool extractTransposition(Walk& w, Transposition* t) {
  constexpr int64_t kLeast = 16;
  const int last = w.ndim - 1;
  if (w.innerStride(0) != 1 || w.innerStride(1) == 1) return false;
  int j = 0;
  while (j < last && w.strides[1][j] != 1) j++;
  if (j == last || w.shape[j] < kLeast || w.shape[last] < kLeast) return false;
  t->rows = w.shape[j];
  t->columns = w.shape[last];
  t->outStride = w.strides[0][j];
  t->inStride = w.strides[1][last];
  w.numel /= t->rows * t->columns;
  dropAxis(w, last);
  dropAxis(w, j);
  if (w.ndim == 0) {
    w.ndim = 1;
    w.shape[0] = 1;
  }
  return true;
}

template <class T>
bool transposed(const Call& call, Walk walk) {
  Transposition t{};
  if (!extractTransposition(walk, &t)) return false;
  const int64_t across = ceilDiv(t.columns, kTile<T>), down = ceilDiv(t.rows, kTile<T>), tiles = across * down;
  t.tilesAcross = makeDivisor(across);
  t.tilesDown = makeDivisor(down);
  t.tiles = tiles * walk.numel;
  t.planes = makeLayout<2>(walk, 1);
  launch(call, {gridFor(context(call), t.tiles, 1), kItemThreads}, transposeKernel<T>, t);
  return true;
}

template <class T>
void copySame(const Call& call, const Walk& piece) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  if (packable(piece, V)) return launchItems(call, makeLayout<2>(piece, V), copyKernel<T, V>);
  if (!transposed<T>(call, piece)) launchItems(call, makeLayout<2>(piece, 1), copyKernel<T, 1>);
}

void copySame(const Call& call, Walk walk) {
  if (!packable(walk, 16 / walk.elementSize[0])) widen(walk);
  forPieces(walk, [&](const Walk& piece) {
    switch (piece.elementSize[0]) {
      case 1:
        return copySame<uint8_t>(call, piece);
      case 2:
        return copySame<uint16_t>(call, piece);
      case 4:
        return copySame<uint32_t>(call, piece);
      default:
        return copySame<uint64_t>(call, piece);
    }
  });
}

// ---- between dtypes -------------------------------------------------------------------------------------------------
struct Bool {
  uint8_t value;
};

template <class S>
KG_DEVICE auto widenElement(S x) {
  if constexpr (std::is_same_v<S, f16>) {
    return halfToFloat(x.bits);
  } else if constexpr (std::is_same_v<S, Bool>) {
    return x.value != 0 ? 1.0f : 0.0f;
  } else if constexpr (std::is_same_v<S, double>) {
    return x;
  } else {
    return static_cast<float>(x);
  }
}

template <class D, class S, int V>
KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void convertKernel(Layout<2> layout) {
  forItems<V>(layout, [&](const int64_t (&at)[2], int count) {
    using C = decltype(widenElement(S()));
    S x[V];
    C wide[V];
    D y[V];
    loadItem<V>(reinterpret_cast<const S*>(layout.data[1]) + at[1], layout.splat(1), count, x);
    KG_UNROLL for (int i = 0; i < V; i++) wide[i] = widenElement(x[i]);
    if constexpr (std::is_same_v<D, f16>) {
      KG_UNROLL for (int i = 0; i < V; i++) y[i].bits = floatToHalf(wide[i]);
    } else {
      roundItem<V>(wide, y);
    }
    storeItem<V>(reinterpret_cast<D*>(layout.data[0]) + at[0], count, y);
  });
}

// Any value of any dtype.
KG_DEVICE double loadAny(const char* from, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::F32:
      return static_cast<double>(reinterpret_cast<const float*>(from)[at]);
    case DType::F64:
      return reinterpret_cast<const double*>(from)[at];
    case DType::BF16:
      return static_cast<double>(static_cast<float>(reinterpret_cast<const bf16*>(from)[at]));
    case DType::F16:
      return static_cast<double>(halfToFloat(reinterpret_cast<const f16*>(from)[at].bits));
    case DType::I32:
      return static_cast<double>(reinterpret_cast<const int32_t*>(from)[at]);
    case DType::U8:
      return static_cast<double>(reinterpret_cast<const uint8_t*>(from)[at]);
    default:
      return reinterpret_cast<const uint8_t*>(from)[at] != 0 ? 1.0 : 0.0;
  }
}
KG_DEVICE int32_t saturate(double x, double low, double high) {
  if (!(x == x)) return 0;
  return static_cast<int32_t>(x < low ? low : x > high ? high : x);
}
// `wraps`: x is an integer, of which uint8 keeps the low bits.
KG_DEVICE void storeAny(char* to, int64_t at, DType dtype, double x, bool wraps) {
  switch (dtype) {
    case DType::F32:
      reinterpret_cast<float*>(to)[at] = static_cast<float>(x);
      break;
    case DType::F64:
      reinterpret_cast<double*>(to)[at] = x;
      break;
    case DType::BF16:
      reinterpret_cast<bf16*>(to)[at] = bf16(static_cast<float>(x));
      break;
    case DType::F16:
      reinterpret_cast<f16*>(to)[at].bits = floatToHalf(static_cast<float>(x));
      break;
    case DType::I32:
      reinterpret_cast<int32_t*>(to)[at] = saturate(x, INT32_MIN, INT32_MAX);
      break;
    case DType::U8:
      reinterpret_cast<uint8_t*>(to)[at] =
          static_cast<uint8_t>(wraps ? static_cast<int32_t>(x) & 255 : saturate(x, 0, 255));
      break;
    default:
      reinterpret_cast<uint8_t*>(to)[at] = x != 0;
  }
}

KG_GLOBAL KG_LAUNCH_BOUNDS(kItemThreads) void convertAnyKernel(Layout<2> layout, DType to, DType from) {
  forItems<1>(layout, [&](const int64_t (&at)[2], int) {
    const double x = loadAny(layout.data[1], at[1], from);
    storeAny(layout.data[0], at[0], to, x, from == DType::I32);
  });
}

using Converter = void (*)(Layout<2>);
// The pairs that have a kernel by packs; of 8 elements, or 2 of float64.
Converter packConverter(DType to, DType from) {
  const auto is = [=](DType t, DType f) { return to == t && from == f; };
  if (is(DType::F32, DType::BF16)) return convertKernel<float, bf16, 8>;
  if (is(DType::BF16, DType::F32)) return convertKernel<bf16, float, 8>;
  if (is(DType::F32, DType::F16)) return convertKernel<float, f16, 8>;
  if (is(DType::BF16, DType::F16)) return convertKernel<bf16, f16, 8>;
  if (is(DType::F16, DType::F32)) return convertKernel<f16, float, 8>;
  if (is(DType::F32, DType::I32)) return convertKernel<float, int32_t, 8>;
  if (is(DType::F32, DType::Bool)) return convertKernel<float, Bool, 8>;
  if (is(DType::BF16, DType::Bool)) return convertKernel<bf16, Bool, 8>;
  if (is(DType::F32, DType::F64)) return convertKernel<float, double, 2>;
  if (is(DType::F64, DType::F32)) return convertKernel<double, float, 2>;
  return nullptr;
}

}  // namespace

void kernel_copy(const Call& call) {
  const DType to = call[0].dtype, from = call[1].dtype;
  const TensorView* views[] = {&call[0], &call[1]};
  const Walk walk = makeWalk(views, 2);
  if (to == from) return copySame(call, walk);
  if (to == DType::None || from == DType::None)
    fail("expected two dtypes, found %s from %s", dtypeName(to), dtypeName(from));
  const Converter converter = packConverter(to, from);
  const int width = to == DType::F64 || from == DType::F64 ? 2 : 8;
  forPieces(walk, [&](const Walk& piece) {
    if (converter && packable(piece, width)) return launchItems(call, makeLayout<2>(piece, width), converter);
    launchItems(call, makeLayout<2>(piece, 1), convertAnyKernel, to, from);
  });
}

}  // namespace kg::cuda

// Tiles in shared memory and their products on CUDA cores: what the attention kernels for any dtype and head dimension
// are made of. Knows no softmax.
//
// 256 threads stand as 16 x 16; thread (y, x) has rows y + 16 i and columns x + 16 j of a product. All threads of a row
// are half a warp. A tile's rows are D | 1 elements apart: an odd number, so that 16 rows lie in different banks.
#pragma once

#include "cuda/attention.h"

namespace kg::cuda::attention {

// Backward's kernels ask for one block a multiprocessor (KG_LAUNCH_BOUNDS): their tiles leave room for few more, and
// with more in view ptxas spills registers.
constexpr int kSide = 16, kGeneralThreads = kSide * kSide;

KG_DEVICE int threadRow() { return static_cast<int>(threadIdx.x) / kSide; }
KG_DEVICE int threadColumn() { return static_cast<int>(threadIdx.x) % kSide; }

KG_INLINE int rowStride(int D) { return D | 1; }

// A product [Tile][Tile], and sums [Tile][up to 16 Columns], as one thread holds them.
template <class C, int Tile>
struct Square {
  C v[Tile / kSide][Tile / kSide];
};
template <class C, int Tile, int Columns>
struct Sums {
  C v[Tile / kSide][Columns];
  KG_DEVICE void clear() {
    KG_UNROLL for (int i = 0; i < Tile / kSide; i++) KG_UNROLL for (int c = 0; c < Columns; c++) v[i][c] = 0;
  }
};

// tile[r][d] = factor * x(rowOf(r), head)[d] for r < valid; zeros where there is no row. A row's loads go out at once.
template <int Tile, int Columns, class T, class C, class RowOf>
KG_DEVICE void fillTile(C* tile, const HeadRows<const T>& x, int head, int D, int valid, C factor, const RowOf& rowOf) {
  const int stride = rowStride(D);
  KG_UNROLL_BY(1) for (int r = warpId(); r < Tile; r += kGeneralThreads / kWarp) {
    const int64_t row = r < valid ? rowOf(r) : -1;
    const T* from = row < 0 ? nullptr : x.at(row, head);
    KG_UNROLL for (int c = 0; c < (kSide * Columns + kWarp - 1) / kWarp; c++) {
      const int d = laneId() + kWarp * c;
      if (d < D) tile[r * stride + d] = from ? static_cast<C>(from[d]) * factor : C(0);
    }
  }
}

// s += A B^T, both tiles [Tile][D], d ascending.
template <class C, int Tile>
KG_DEVICE void addProduct(Square<C, Tile>& s, const C* a, const C* b, int D) {
  constexpr int M = Tile / kSide;
  const int stride = rowStride(D);
  const C *const rows = a + threadRow() * stride, *const columns = b + threadColumn() * stride;
  KG_UNROLL_BY(2) for (int d = 0; d < D; d++) {
    C x[M], y[M];
    KG_UNROLL for (int i = 0; i < M; i++) {
      x[i] = rows[i * kSide * stride + d];
      y[i] = columns[i * kSide * stride + d];
    }
    KG_UNROLL for (int i = 0; i < M; i++) KG_UNROLL for (int j = 0; j < M; j++) s.v[i][j] =
        std::fma(x[i], y[j], s.v[i][j]);
  }
}

template <class C, int Tile>
KG_DEVICE void product(Square<C, Tile>& s, const C* a, const C* b, int D) {
  KG_UNROLL for (auto& row : s.v) KG_UNROLL for (C& v : row) v = 0;
  addProduct(s, a, b, D);
}

// delta of the rows that this thread works for: the diagonal of douts outs^T, in the very order of dout v. Where one
// key has all the weight, the two cancel.
template <class C, int Tile>
KG_DEVICE void rowProducts(C (&delta)[Tile / kSide], const C* douts, const C* outs, int D) {
  Square<C, Tile> s;
  product(s, douts, outs, D);
  const int holder = (laneId() & kSide) + threadRow();
  KG_UNROLL for (int i = 0; i < Tile / kSide; i++) delta[i] = shuffle(s.v[i][i], holder);
}

// Hands a product to the threads of its rows: square[Tile][Tile + 1].
template <class C, int Tile>
KG_DEVICE void share(const Square<C, Tile>& s, C* square) {
  syncWarp();
  KG_UNROLL for (int i = 0; i < Tile / kSide; i++) KG_UNROLL for (int j = 0; j < Tile / kSide; j++)
      square[(threadRow() + kSide * i) * (Tile + 1) + threadColumn() + kSide * j] = s.v[i][j];
  syncWarp();
}

// o += P X for a shared product P and a tile X; columns ascending.
template <class C, int Tile, int Columns>
KG_DEVICE void accumulate(Sums<C, Tile, Columns>& o, const C* square, const C* tile, int D) {
  constexpr int M = Tile / kSide;
  const int stride = rowStride(D);
  KG_UNROLL_BY(2) for (int j = 0; j < Tile; j++) {
    C p[M];
    KG_UNROLL for (int i = 0; i < M; i++) p[i] = square[(threadRow() + kSide * i) * (Tile + 1) + j];
    KG_UNROLL for (int c = 0; c < Columns; c++) {
      const int d = threadColumn() + kSide * c;
      if (d >= D) break;
      const C x = tile[j * stride + d];
      KG_UNROLL for (int i = 0; i < M; i++) o.v[i][c] = std::fma(p[i], x, o.v[i][c]);
    }
  }
}

// Sums to rows row..row+count of a head, times the row's factor, rounded once. Adding 0 makes -0 a +0: whether a masked
// key added its 0 then never shows.
template <class T, class C, int Tile, int Columns>
KG_DEVICE void storeSums(const Sums<C, Tile, Columns>& o, const C (&factor)[Tile / kSide], const HeadRows<T>& to,
                         int64_t row, int head, int D, int count) {
  KG_UNROLL for (int i = 0; i < Tile / kSide; i++) {
    const int r = threadRow() + kSide * i;
    if (r >= count) continue;
    KG_UNROLL for (int c = 0; c < Columns; c++) {
      const int d = threadColumn() + kSide * c;
      if (d < D) to.at(row + r, head)[d] = static_cast<T>(o.v[i][c] * factor[i] + C(0));
    }
  }
}

// f(row, count, behind) for all tiles of query rows that see a chunk of keys: from the chunk on to the end of its
// segment, then its segment's children's. Query row `row` of the layout is the first, `count` or Tile of them exist.
// `behind`: the chunk's first key minus that row, within its own segment; no key is behind a child's row.
template <int Tile, class F>
KG_DEVICE void forQueryTiles(const SegmentTable& table, const Chunk& chunk, const F& f) {
  const bool parent = table[chunk.segment].parent < 0;
  for (int s = chunk.segment; s < table.count; s = parent ? nextChild(table, chunk.segment, s) : table.count) {
    const Segment from = table[s];
    const bool own = s == chunk.segment;
    for (int row = own ? chunk.row : 0; row < from.length; row += Tile)
      f(from.start + row, from.length - row, own ? chunk.row - row : -Tile);
  }
}

}  // namespace kg::cuda::attention

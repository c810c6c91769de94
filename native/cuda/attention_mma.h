// Tiles of bfloat16 rows in shared memory and their products on tensor cores: what the attention kernels for head
// dimensions 64 and 128 are made of. Knows no segments, no softmax and no tensor's meaning.
//
// A tile is [rows][D]; the 16-byte piece c of row r lies at piece c ^ (r % 8), so that the eight rows of a matrix load
// touch all banks once. A warp owns 16 MT rows of a product; fragments are as gpu.h says, g = lane / 4, t = lane % 4.
#pragma once

#include "cuda/attention.h"

namespace kg::cuda::attention {

constexpr int kKeyTile = 64;       // keys a tile, aligned on the logical key axis: part of a row's order of summation
constexpr int kTileThreads = 128;  // of every kernel on tensor cores: four warps
constexpr float kLog2e = 1.44269504088896341f;

template <int MT, int NT>
using Accumulator = float[MT][NT][4];

template <int D>
KG_DEVICE int tileOffset(int row, int piece) {
  return row * D + ((piece ^ (row & 7)) << 3);
}

// Starts copies of rows rowOf(0..valid) of a head, zeros behind, to tile[Rows][D]; and of a second tensor likewise.
template <int D, int Rows, class RowOf>
KG_DEVICE void loadTiles(bf16* first, const HeadRows<const bf16>& x, int xHead, bf16* second,
                         const HeadRows<const bf16>& y, int yHead, int valid, const RowOf& rowOf) {
  constexpr int kPieces = D / 8, kStep = kTileThreads / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces, start = static_cast<int>(threadIdx.x) / kPieces;
  KG_UNROLL for (int i = 0; i < Rows / kStep; i++) {
    const int r = start + i * kStep;
    const int64_t row = r < valid ? rowOf(r) : -1;
    const int to = tileOffset<D>(r, piece);
    copyAsync16(first + to, x.at(row < 0 ? 0 : row, xHead) + piece * 8, row >= 0);
    copyAsync16(second + to, y.at(row < 0 ? 0 : row, yHead) + piece * 8, row >= 0);
  }
}

template <int D, int Rows, class RowOf>
KG_DEVICE void loadTile(bf16* tile, const HeadRows<const bf16>& x, int head, int valid, const RowOf& rowOf) {
  constexpr int kPieces = D / 8, kStep = kTileThreads / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces, start = static_cast<int>(threadIdx.x) / kPieces;
  KG_UNROLL for (int i = 0; i < Rows / kStep; i++) {
    const int r = start + i * kStep;
    const int64_t row = r < valid ? rowOf(r) : -1;
    copyAsync16(tile + tileOffset<D>(r, piece), x.at(row < 0 ? 0 : row, head) + piece * 8, row >= 0);
  }
}

// ---- fragments ----------------------------------------------------------------------------------------------------

// A lane's address in a matrix load at column 16 k is its address at column 0 with one XOR: few registers hold many
// addresses. `row` is a multiple of 8 throughout.

// A[16 rows][16 columns] at (row, 16 k) of a tile.
template <int D>
KG_DEVICE void loadA(uint32_t (&a)[4], const bf16* tile, int row, int k) {
  const int lane = tileOffset<D>(laneId() & 15, laneId() >> 4);
  loadMatrix4(a, tile + row * D + (lane ^ (k << 4)));
}

// B[16 k][two columns of 8] for products with the transpose of a tile: the columns are rows row..row+15 of it.
template <int D>
KG_DEVICE void loadB(uint32_t (&low)[2], uint32_t (&high)[2], const bf16* tile, int row, int k) {
  uint32_t r[4];
  const int lane = tileOffset<D>((laneId() & 7) + ((laneId() >> 4) << 3), (laneId() >> 3) & 1);
  loadMatrix4(r, tile + row * D + (lane ^ (k << 4)));
  low[0] = r[0], low[1] = r[1], high[0] = r[2], high[1] = r[3];
}

// B[16 k][two columns of 8] for products with a tile itself: k are rows row..row+15 of it, columns 16 pair..
template <int D>
KG_DEVICE void loadBOfRows(uint32_t (&low)[2], uint32_t (&high)[2], const bf16* tile, int row, int pair) {
  uint32_t r[4];
  const int lane = tileOffset<D>(laneId() & 15, laneId() >> 4);
  loadMatrix4Transposed(r, tile + row * D + (lane ^ (pair << 4)));
  low[0] = r[0], low[1] = r[1], high[0] = r[2], high[1] = r[3];
}

// The A operand of a warp's rows, read from shared memory at each use.
template <int D, int MT>
struct SharedRows {
  const bf16* tile;
  int row;
  KG_DEVICE void load(const bf16* from, int first) { tile = from, row = first; }
  KG_DEVICE void operator()(uint32_t (&a)[4], int m, int k) const { loadA<D>(a, tile, row + 16 * m, k); }
};

// The same, kept in registers.
template <int D, int MT>
struct HeldRows {
  uint32_t held[MT][D / 16][4];
  KG_DEVICE void load(const bf16* tile, int row) {
    KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int k = 0; k < D / 16; k++)
        loadA<D>(held[m][k], tile, row + 16 * m, k);
  }
  KG_DEVICE void operator()(uint32_t (&a)[4], int m, int k) const {
    KG_UNROLL for (int i = 0; i < 4; i++) a[i] = held[m][k][i];
  }
};

// ---- products -----------------------------------------------------------------------------------------------------

template <int MT, int NT>
KG_DEVICE void clear(Accumulator<MT, NT>& x) {
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int n = 0; n < NT; n++) KG_UNROLL for (int i = 0; i < 4; i++)
      x[m][n][i] = 0;
}

// s = A X^T for rows row..row + 8 NT of the tile X.
template <int D, int MT, int NT, class A>
KG_DEVICE void productWithRows(Accumulator<MT, NT>& s, const A& rows, const bf16* tile, int row) {
  clear<MT, NT>(s);
  KG_UNROLL for (int k = 0; k < D / 16; k++) {
    uint32_t a[MT][4];
    KG_UNROLL for (int m = 0; m < MT; m++) rows(a[m], m, k);
    KG_UNROLL for (int n = 0; n < NT; n += 2) {
      uint32_t low[2], high[2];
      loadB<D>(low, high, tile, row + 8 * n, k);
      KG_UNROLL for (int m = 0; m < MT; m++) {
        mmaBf16(s[m][n], a[m], low);
        mmaBf16(s[m][n + 1], a[m], high);
      }
    }
  }
}

// o += P X for rows row..row + 8 NT of the tile X; P, an accumulator, is rounded to bfloat16.
template <int D, int MT, int NT>
KG_DEVICE void accumulateRows(Accumulator<MT, D / 8>& o, const Accumulator<MT, NT>& p, const bf16* tile, int row) {
  KG_UNROLL for (int k = 0; k < NT / 2; k++) {
    uint32_t a[MT][4];
    KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int i = 0; i < 4; i++) {
      const float* pair = &p[m][2 * k + i / 2][2 * (i % 2)];
      a[m][i] = packBf16(pair[0], pair[1]);
    }
    KG_UNROLL for (int n = 0; n < D / 16; n++) {
      uint32_t low[2], high[2];
      loadBOfRows<D>(low, high, tile, row + 16 * k, n);
      KG_UNROLL for (int m = 0; m < MT; m++) {
        mmaBf16(o[m][2 * n], a[m], low);
        mmaBf16(o[m][2 * n + 1], a[m], high);
      }
    }
  }
}

// ---- results ------------------------------------------------------------------------------------------------------

// Rows of an accumulator, times factor[m][half], to rows row..row+count of a head by way of the warp's own rows of a
// tile, so that memory is written 16 bytes at a time. Adding 0 makes -0 a +0: whether a masked key added its 0 then
// never shows.
template <int D, int MT>
KG_DEVICE void storeRows(const Accumulator<MT, D / 8>& o, const float (&factor)[MT][2], bf16* tile, int tileRow,
                         const HeadRows<bf16>& to, int64_t row, int head, int count) {
  const int g = laneId() / 4, t = laneId() % 4;
  syncWarp();
  KG_UNROLL for (int m = 0; m < MT; m++) KG_UNROLL for (int n = 0; n < D / 8; n++)
      KG_UNROLL for (int half = 0; half < 2; half++) {
    const float* x = &o[m][n][2 * half];
    const float f = factor[m][half];
    bf16* at = tile + tileOffset<D>(tileRow + 16 * m + g + 8 * half, n) + 2 * t;
    *reinterpret_cast<uint32_t*>(at) = packBf16(x[0] * f + 0.0f, x[1] * f + 0.0f);
  }
  syncWarp();
  constexpr int kPieces = D / 8, kStep = kWarp / kPieces;
  const int piece = laneId() % kPieces;
  KG_UNROLL for (int i = 0; i < 16 * MT / kStep; i++) {
    const int r = laneId() / kPieces + i * kStep;
    if (r < count)
      storePack<uint32_t, 4>(
          reinterpret_cast<uint32_t*>(to.at(row + r, head) + piece * 8),
          loadPack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(tile + tileOffset<D>(tileRow + r, piece))));
  }
}

}  // namespace kg::cuda::attention

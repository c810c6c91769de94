// A blocked matrix product on the host, for the stand-in cuBLAS: packed panels and a register tile. Each element is the
// sum of its terms by ascending k, in blocks of `depth`, wherever in the matrix it lies: with one depth a row's bits
// depend on no other row; with another they differ.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace standin {

// x(i, k) = data[i * row + k * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

constexpr int kRows = 6, kVectors = 2, kMostDepth = 256, kColumnBlock = 1024;

template <class C>
struct Tile {
  typedef C Vector __attribute__((vector_size(32)));
  static constexpr int kLanes = 32 / sizeof(C);
  static constexpr int kColumns = kVectors * kLanes;
};

// a: [depth][kRows], b: [depth][kColumns], both contiguous; c[kRows][kColumns] += their product.
template <class C>
void multiplyTile(const C* a, const C* b, int64_t depth, C* c) {
  using Vector = typename Tile<C>::Vector;
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vector y[kVectors];
    __builtin_memcpy(y, b + k * Tile<C>::kColumns, sizeof y);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const Vector x = a[k * kRows + i] - Vector{};
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) sum[i][j] += x * y[j];
    }
  }
  for (int i = 0; i < kRows; i++) {
    Vector total[kVectors];
    __builtin_memcpy(total, c + i * Tile<C>::kColumns, sizeof total);
    for (int j = 0; j < kVectors; j++) total[j] += sum[i][j];
    __builtin_memcpy(c + i * Tile<C>::kColumns, total, sizeof total);
  }
}

// panel[k][i] = x(first + i, firstK + k), zeros from `count` on.
template <class C, class T>
void pack(C* panel, int width, const Matrix<T>& x, int64_t first, int64_t count, int64_t firstK, int64_t depth) {
  for (int64_t k = 0; k < depth; k++)
    for (int i = 0; i < width; i++)
      panel[k * width + i] =
          first + i < count ? static_cast<C>(x.data[(first + i) * x.row + (firstK + k) * x.column]) : C(0);
}

// write(i, j, sum over k of a(i, k) b(j, k)) for every i < m, j < n; blockDepth <= kMostDepth.
template <class C, class T, class F>
void multiply(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, int blockDepth, F write) {
  constexpr int kColumns = Tile<C>::kColumns;
  const int64_t rowTiles = (m + kRows - 1) / kRows;
  std::vector<C> left(kMostDepth * kRows), right(kMostDepth * kColumnBlock), sums;
  for (int64_t j0 = 0; j0 < n; j0 += kColumnBlock) {
    const int64_t tiles = (std::min<int64_t>(n - j0, kColumnBlock) + kColumns - 1) / kColumns;
    sums.assign(rowTiles * tiles * kRows * kColumns, C(0));
    for (int64_t k0 = 0; k0 < k; k0 += blockDepth) {
      const int64_t depth = std::min<int64_t>(k - k0, blockDepth);
      for (int64_t j = 0; j < tiles; j++)
        pack(right.data() + j * kMostDepth * kColumns, kColumns, b, j0 + j * kColumns, n, k0, depth);
      for (int64_t i = 0; i < rowTiles; i++) {
        pack(left.data(), kRows, a, i * kRows, m, k0, depth);
        for (int64_t j = 0; j < tiles; j++)
          multiplyTile(left.data(), right.data() + j * kMostDepth * kColumns, depth,
                       sums.data() + (i * tiles + j) * kRows * kColumns);
      }
    }
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < std::min<int64_t>(n - j0, kColumnBlock); j++)
        write(i, j0 + j,
              sums[((i / kRows) * tiles + j / kColumns) * kRows * kColumns + i % kRows * kColumns + j % kColumns]);
  }
}

}  // namespace standin

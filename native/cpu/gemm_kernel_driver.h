// The loops of the matrix product around its micro-kernels: blocks of K, blocks of rows, panels of columns, threads.
// Chooses how work is cut; never changes what is summed in which order (blocks of K depend on K alone).
#pragma once

#include "cpu/gemm.h"
#include "cpu/gemm_kernel_memory.h"
#include "cpu/gemm_kernel_pack.h"
#include "cpu/gemm_kernel_shares.h"
#include "runtime/threads.h"

namespace kg::cpu::KG_ISA {

constexpr int64_t kGemmBlockK = 384;            // packed elements of K accumulated in registers at a time
constexpr int64_t kGemmSpreadK = 48;            // packed elements of K that listing the lines of C is worth
constexpr int64_t kGemmBlockBytes = 220 << 10;  // of a packed block of A: stays in the second-level cache
constexpr int64_t kGemmSharedBytes = 16 << 20;  // of a packed B shared by the threads
constexpr int64_t kGemmMaxK = 8192;             // of one shared B; larger K takes several
constexpr int64_t kGemmSerialWork = 1 << 18;    // M * N * K below which threads cost more than they save

constexpr KG_INLINE int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr KG_INLINE int64_t roundUp(int64_t a, int64_t b) { return ceilDiv(a, b) * b; }
constexpr KG_INLINE int64_t minOf(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr KG_INLINE int64_t maxOf(int64_t a, int64_t b) { return a > b ? a : b; }

// How many of n equal pieces of work a thread takes at a time so that all end together: the smallest number that gives
// the busiest thread the least.
KG_INLINE int64_t evenGrain(int64_t n, int threads) {
  int64_t best = ceilDiv(n, threads), least = best;
  for (int64_t rounds = 2; rounds <= 4; rounds++) {
    const int64_t grain = ceilDiv(n, threads * rounds), busiest = ceilDiv(ceilDiv(n, grain), threads) * grain;
    if (busiest > least) continue;
    best = grain;
    least = busiest;
  }
  return best;
}

// The product of one policy P with C of type Out. All members are set once; the methods only read them.
template <class P, class Out>
class GemmDriver {
 public:
  using In = typename P::In;
  using Packed = typename P::Packed;
  using Acc = typename P::Acc;
  using Shape = GemmShape<P>;
  // Sums cannot rest in C between blocks of K when C is narrower than they are.
  static constexpr bool narrow = !std::is_same_v<Out, Acc>;
  static constexpr int64_t kNarrowPanels = maxOf(1, 1024 / Shape::columns);  // whose sums rest in scratch memory

  explicit GemmDriver(const Gemm& gemm)
      : g_(gemm),
        a_(static_cast<const In*>(gemm.a)),
        b_(static_cast<const In*>(gemm.b)),
        c_(static_cast<Out*>(gemm.c)),
        bias_(static_cast<const In*>(gemm.bias)),
        alpha_(static_cast<Acc>(gemm.alpha)) {
    // Equal blocks, rounded so that packing runs in whole squares.
    const int64_t blocks = maxOf(1, ceilDiv(g_.K, kGemmBlockK * P::kPair));
    blockK_ = maxOf(P::kPair, roundUp(ceilDiv(g_.K, blocks), GemmPacker<P>::lanes * P::kPair));
    const int64_t rows = kGemmBlockBytes / (blockK_ / P::kPair * static_cast<int64_t>(sizeof(Packed)));
    maxRows_ = maxOf(1, minOf(rows, 256) / Shape::rows) * Shape::rows;
    panels_ = ceilDiv(g_.N, Shape::columns);
    if (g_.shares) prepareShares();
  }

  void run() const {
    product();
    if (tileSums_) addSums();
  }

 private:
  void product() const {
    if (g_.M * g_.N * maxOf(1, g_.K) < kGemmSerialWork) return strips(0, panels_);
    const int threads = threadCount();
    if (g_.M <= Shape::rows || (g_.M <= 2 * Shape::rows && panels_ >= 2 * threads)) {
      const int64_t least = ceilDiv(kGemmSerialWork / 2, maxOf(1, g_.M * g_.K * Shape::columns));
      const int64_t grain = maxOf(least, evenGrain(panels_, threads));
      parallelFor(panels_, grain, [this](int64_t from, int64_t to, int) { strips(from, to); });
    } else if (narrow && g_.K > kGemmMaxK) {
      wide();
    } else {
      shared(threads);
    }
  }

  // A part of C under work: rows [row, row + rows), k in [k, k + depth).
  struct Block {
    int64_t row, rows, k, depth;
    Acc* partial;  // narrow C over several blocks of K: sums so far, [rows][partialRow] from column `column`
    int64_t partialRow, column;
    bool half = false;  // of a symmetric C: tiles above the diagonal are left to mirror()
  };

  int64_t units(int64_t depth) const { return ceilDiv(depth, P::kPair); }
  int64_t panelColumns(int64_t panel) const { return minOf(Shape::columns, g_.N - panel * Shape::columns); }
  bool severalBlocks() const { return g_.K > blockK_; }

  static int64_t evenWidth(int64_t rows) { return ceilDiv(rows, ceilDiv(rows, Shape::rows)); }
  int64_t panelWidth(int64_t rows) const { return tileRows_ > 0 ? tileRows_ : evenWidth(rows); }

  // Whether the first `rows` rows of a block lie above the diagonal in all columns of a panel, and are left out.
  static bool above(const Block& block, int64_t rows, int64_t panel) {
    return block.half && block.row + rows <= panel * Shape::columns;
  }

  void packA(const Block& block, Packed* to) const {
    gemmPackPanels<P>({a_ + block.row * g_.aRow + block.k * g_.aCol, g_.aRow, g_.aCol}, block.rows,
                      panelWidth(block.rows), 1, block.depth, to);
  }

  void packB(int64_t panel, int64_t panels, int64_t k, int64_t depth, Packed* to) const {
    const int64_t column = panel * Shape::columns;
    gemmPackPanels<P>({b_ + column * g_.bCol + k * g_.bRow, g_.bCol, g_.bRow},
                      minOf(panels * Shape::columns, g_.N - column), Shape::columns, Shape::lanes, depth, to);
  }

  void strips(int64_t from, int64_t to) const {
    const int64_t step = narrow && severalBlocks() ? kNarrowPanels : to - from;
    for (int64_t p = from; p < to; p += step) strip(p, minOf(p + step, to));
  }

  // Panels [from, to) for all rows at once (few rows): B is packed a panel at a time, or read where it lies.
  void strip(int64_t from, int64_t to) const {
    const int64_t columns = (to - from) * Shape::columns;
    Block block{0, g_.M, 0, 0, nullptr, columns, from * Shape::columns};
    if (narrow && severalBlocks()) block.partial = workspace<Acc>(GemmSlot::partial, g_.M * columns);
    Packed* a = workspace<Packed>(GemmSlot::a, g_.M * units(blockK_) + gemmPackSlack<P>);
    Packed* b = workspace<Packed>(GemmSlot::panel, Shape::columns * units(blockK_) + gemmPackSlack<P>);
    do {
      block.depth = minOf(blockK_, g_.K - block.k);
      packA(block, a);
      for (int64_t panel = from; panel < to; panel++) {
        if constexpr (std::is_same_v<In, Packed>) {
          if (g_.bCol == 1 && g_.M <= 2 * Shape::rows && panelColumns(panel) == Shape::columns) {
            tiles(block, a, b_ + block.k * g_.bRow + panel * Shape::columns, g_.bRow, panel);
            continue;
          }
        }
        packB(panel, 1, block.k, block.depth, b);
        tiles(block, a, b, roundUp(panelColumns(panel), Shape::lanes), panel);
      }
      block.k += block.depth;
    } while (block.k < g_.K);
  }

  // Many rows: B is packed once for all threads, as much of it at a time as fits; then rows and columns are shared out.
  void shared(int threads) const {
    const int64_t maxK = maxOf(1, kGemmMaxK / blockK_) * blockK_;
    for (int64_t k = 0; k == 0 || k < g_.K; k += maxK) {
      const int64_t depth = minOf(maxK, g_.K - k);
      const int64_t unitsK = units(roundUp(depth, P::kPair));
      const int64_t fit = kGemmSharedBytes / (maxOf(1, unitsK) * Shape::columns * static_cast<int64_t>(sizeof(Packed)));
      const int64_t step = ceilDiv(panels_, ceilDiv(panels_, maxOf(4, fit)));
      for (int64_t panel = 0; panel < panels_; panel += step)
        sharedPart(threads, k, depth, panel, minOf(step, panels_ - panel));
    }
    if (g_.symmetric) mirror();
  }

  void sharedPart(int threads, int64_t k0, int64_t depth, int64_t panel0, int64_t panels) const {
    const int64_t rowUnits = panels * Shape::columns;  // packed elements of B at one packed k
    Packed* b = workspace<Packed>(GemmSlot::shared, rowUnits * units(depth) + gemmPackSlack<P>);
    const int64_t blocksK = maxOf(1, ceilDiv(depth, blockK_));
    packShared(k0, depth, panel0, panels, b);

    const int64_t enough =
        maxOf(1, minOf(4 * threads, g_.M * panels * Shape::columns * maxOf(1, depth) / kGemmSerialWork));
    // Rather cut columns than rows below what the cache holds: B is read once a band. As many tasks as threads, or a
    // multiple of it.
    const int64_t mostSpans = ceilDiv(panels, 8), mostBands = ceilDiv(g_.M, 2 * Shape::rows);
    const int64_t wantBands = maxOf(ceilDiv(g_.M, maxRows_), minOf(ceilDiv(enough, mostSpans), mostBands));
    int64_t rows = ceilDiv(g_.M, minOf(roundUp(wantBands, minOf(threads, enough)), maxOf(wantBands, mostBands)));
    if (tileRows_ > 0) rows = roundUp(rows, tileRows_);
    const int64_t bands = ceilDiv(g_.M, rows);
    const int64_t leastSpans = narrow && severalBlocks() ? ceilDiv(panels, kNarrowPanels) : 1;
    const int64_t span = ceilDiv(panels, maxOf(leastSpans, minOf(ceilDiv(enough, bands), mostSpans)));
    const int64_t spans = ceilDiv(panels, span);
    parallelFor(bands * spans, 1, [&](int64_t from, int64_t to, int) {
      for (int64_t task = from; task < to; task++) {
        // From the last band on: of a symmetric C it has the most to do.
        const int64_t row = (bands - 1 - task % bands) * rows, first = task / bands * span;
        Block block{row, minOf(rows, g_.M - row), k0, 0, nullptr, span * Shape::columns, 0, g_.symmetric};
        block.column = (panel0 + first) * Shape::columns;
        band(block, blocksK, k0, depth, b, rowUnits, panel0, first, minOf(first + span, panels));
      }
    });
  }

  // C(i,j) = C(j,i) above the diagonal, by squares.
  void mirror() const {
    if constexpr (!narrow) {
      constexpr int side = Shape::lanes;
      const int64_t squares = ceilDiv(g_.M, side);
      parallelFor(squares, ceilDiv(4096, g_.M * side), [&](int64_t from, int64_t to, int) {
        for (int64_t i = from * side; i < minOf(to * side, g_.M); i += side)
          for (int64_t j = i; j < g_.M; j += side) mirrorSquare(i, j);
      });
    }
  }

  void mirrorSquare(int64_t i, int64_t j) const {
    constexpr int side = Shape::lanes;
    const Acc* below = c_ + j * g_.cRow + i;
    Acc* to = c_ + i * g_.cRow + j;
    if (i == j || j + side > g_.M) {
      for (int64_t r = 0; r < minOf(side, g_.M - i); r++)
        for (int64_t c = i == j ? r + 1 : 0; c < minOf(side, g_.M - j); c++)
          to[r * g_.cRow + c] = below[c * g_.cRow + r];
      return;
    }
    typename P::V v[side];
    for (int r = 0; r < side; r++) v[r] = gemmLoad<typename P::V>(below + r * g_.cRow);
    gemmTranspose<typename P::V, side>(v);
    for (int r = 0; r < side; r++) gemmStore(to + r * g_.cRow, v[r]);
  }

  // Panel `p` of the block of K that starts at k lies at rowUnits * units(k - k0) + p * columns * units(its depth).
  void packShared(int64_t k0, int64_t depth, int64_t panel0, int64_t panels, Packed* b) const {
    const int64_t group = 8, groups = ceilDiv(panels, group), blocks = ceilDiv(depth, blockK_);
    const int64_t grain = maxOf(1, 32768 / maxOf(1, minOf(depth, blockK_) * group * Shape::columns));
    parallelFor(groups * blocks, grain, [&](int64_t from, int64_t to, int) {
      for (int64_t i = from; i < to; i++) {
        const int64_t p = i / blocks * group, k = i % blocks * blockK_, part = minOf(blockK_, depth - k);
        packB(panel0 + p, minOf(group, panels - p), k0 + k, part,
              b + panels * Shape::columns * units(k) + p * Shape::columns * units(part));
      }
    });
  }

  void band(Block block, int64_t blocksK, int64_t k0, int64_t depth, const Packed* b, int64_t rowUnits, int64_t panel0,
            int64_t first, int64_t last) const {
    if (narrow && severalBlocks()) block.partial = workspace<Acc>(GemmSlot::partial, block.rows * block.partialRow);
    Packed* a = workspace<Packed>(GemmSlot::a, block.rows * units(blockK_) + gemmPackSlack<P>);
    for (int64_t i = 0; i < blocksK; i++) {
      block.k = k0 + i * blockK_;
      block.depth = minOf(blockK_, depth - i * blockK_);
      packA(block, a);
      const Packed* bk = b + rowUnits * units(i * blockK_);
      for (int64_t p = first; p < last && !above(block, block.rows, panel0 + p); p++) {
        const int64_t width = roundUp(panelColumns(panel0 + p), Shape::lanes);
        tiles(block, a, bk + p * Shape::columns * units(block.depth), width, panel0 + p);
      }
    }
  }

  // One panel of columns against all rows of the block.
  void tiles(const Block& block, const Packed* a, const Packed* b, int64_t bRow, int64_t panel) const {
    const int64_t column = panel * Shape::columns, columns = panelColumns(panel);
    const int64_t width = panelWidth(block.rows), depth = units(block.depth);
    const bool first = block.k == 0, last = block.k + block.depth == g_.K;
    const int64_t vectors = ceilDiv(columns, Shape::lanes);
    const bool full = columns == vectors * Shape::lanes, shared = g_.shares && last;
    alignas(64) Acc buffer[Shape::rows * Shape::columns];
    GemmTile<Acc> tile{alpha_, false, !first, nullptr, g_.cRow, nullptr, buffer, {}};
    for (int64_t i = 0; i < block.rows; i += width) {
      const int64_t rows = minOf(width, block.rows - i);
      if (above(block, i + rows, panel)) continue;
      Acc* partial = block.partial ? block.partial + i * block.partialRow + column - block.column : nullptr;
      if (partial && !last) {
        tile.direct = true;
        tile.c = partial;
        tile.cRow = block.partialRow;
      } else if constexpr (!narrow) {
        tile.direct = full && !shared;
        if (c_) tile.c = c_ + (block.row + i) * g_.cRow + column;
        tile.accumulate = !first || g_.accumulate;
        if constexpr (std::is_same_v<In, Acc>)
          tile.bias = first && bias_ ? bias_ + column : nullptr;
        else
          tile.direct = tile.direct && !(first && bias_);
      } else {
        tile.direct = false;
      }
      const GemmSharedTile<Acc, Shape::columns> share{buffer, rows, columns, (block.row + i) * g_.N + column, g_.N};
      tile.lines.count = 0;
      if (tile.direct && depth >= kGemmSpreadK) tile.lines.add(tile.c, rows, columns, tile.cRow);
      if (shared) prefetch(share, tile.lines);
      gemmKernels<P>.get(rows, vectors)(depth, a + i * depth, b, bRow, tile);
      if (!tile.direct && c_) finish(buffer, rows, columns, block.row + i, column, first, partial, block.partialRow);
      if (shared) shareOut(share, (block.row + i) / tileRows_ * panels_ + panel);
    }
  }

  // Tiles lie where M and N alone put them, and each has its own sums: neither bands nor threads matter. Between blocks
  // of K sums rest in C, or in memory that stands for it.
  void prepareShares() {
    tileRows_ = evenWidth(g_.M);
    if (g_.shares->sums) tileSums_ = workspace<double>(GemmSlot::sums, 2 * ceilDiv(g_.M, tileRows_) * panels_);
    if constexpr (!narrow)
      if (!c_ && severalBlocks()) c_ = workspace<Acc>(GemmSlot::rest, g_.M * g_.N);
    g_.cRow = g_.N;
  }

  void prefetch(const GemmSharedTile<Acc, Shape::columns>& share, GemmLines& lines) const {
    const void* const matrices[] = {g_.shares->first, g_.shares->second, g_.shares->other, c_};
    for (const void* matrix : matrices)
      if (matrix) lines.add(static_cast<const Acc*>(matrix) + share.at, share.rows, share.columns, share.row);
  }

  void shareOut(const GemmSharedTile<Acc, Shape::columns>& share, int64_t tile) const {
    const GemmShares& to = *g_.shares;
    const Acc* coefficients = static_cast<const Acc*>(to.coefficients);
    if (tileSums_) share.sum(to.other, tileSums_ + 2 * tile);
    if (to.first) share.addTo(to.first, coefficients[0]);
    if (to.second) share.addTo(to.second, coefficients[1]);
  }

  void addSums() const {
    double squares = 0, products = 0;
    const int64_t tiles = ceilDiv(g_.M, tileRows_) * panels_;
    for (int64_t i = 0; i < tiles; i++) {
      squares += tileSums_[2 * i];
      products += tileSums_[2 * i + 1];
    }
    g_.shares->sums[0] += squares;
    g_.shares->sums[1] += products;
  }

  // Adds what is to be added to scaled sums, and writes them to C.
  void finish(Acc* buffer, int64_t rows, int64_t columns, int64_t row, int64_t column, bool first, const Acc* partial,
              int64_t partialRow) const {
    const bool addBias = bias_ && (narrow || first);
    const bool addC = narrow ? g_.accumulate : g_.accumulate || !first;
    for (int64_t i = 0; i < rows; i++) {
      Acc* sum = buffer + i * Shape::columns;
      Out* c = c_ + (row + i) * g_.cRow + column;
      if (narrow && partial)
        for (int64_t j = 0; j < columns; j++) sum[j] += partial[i * partialRow + j];
      if (addBias)
        for (int64_t j = 0; j < columns; j++) sum[j] += static_cast<Acc>(bias_[column + j]);
      if (addC)
        for (int64_t j = 0; j < columns; j++) sum[j] += static_cast<Acc>(c[j]);
      for (int64_t j = 0; j < columns; j++) c[j] = static_cast<Out>(sum[j]);
    }
  }

  // A narrow C whose K does not fit into one shared B: the sums rest in a float copy of some of its rows.
  void wide() const {
    const int64_t step = maxOf(Shape::rows, minOf(g_.M, (4 << 20) / g_.N));
    Acc* sums = workspace<Acc>(GemmSlot::wide, step * g_.N);
    for (int64_t row = 0; row < g_.M; row += step) {
      Gemm part = g_;
      part.M = minOf(step, g_.M - row);
      part.a = a_ + row * g_.aRow;
      part.c = sums;
      part.cRow = g_.N;
      part.accumulate = false;
      part.bias = nullptr;
      GemmDriver<P, Acc>(part).run();
      parallelFor(part.M, ceilDiv(16384, g_.N), [&](int64_t from, int64_t to, int) {
        for (int64_t i = from; i < to; i++) finish(sums + i * g_.N, 1, g_.N, row + i, 0, true, nullptr, 0);
      });
    }
  }

  Gemm g_;
  const In* a_;
  const In* b_;
  Out* c_;
  const In* bias_;
  Acc alpha_;
  int64_t blockK_, maxRows_, panels_;
  int64_t tileRows_ = 0;        // of every tile but the last ones where there are shares; else 0
  double* tileSums_ = nullptr;  // [tiles][2]
};

}  // namespace kg::cpu::KG_ISA

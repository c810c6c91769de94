// Radix sort, least significant digit first (contract: sort.h). A pass moves every item to its rank: how many items
// have a smaller digit, or the same one and come before. A warp ranks 32 items by ballots, so the order of equal digits
// is that of the items; atomics only count.
//
// H100, 1.7 GHz, ids below 151,936 (18 bits). One block: 3 passes of 6 bits. A pass ranks 32 items in about 50
// instructions, 8192 in 256 * 50 at 4 a cycle, and has 8 barriers and 4 ways through shared memory: 4,500 cycles, 2.6
// us. Expected 9 us for 8192 keys, 5 us for 4096, 3 us for 1024; 8 B of scratch memory a key. Tiles: 2 passes of 9 bits
// in three launches each, 16 B an item read and written and 4 B read before to count; 16.5 B of scratch memory a key.
// 15 us of launches; 2^20 keys move 38 MB, largely within L2, in runs of 32 bytes: expected 30 us.
#include "cuda/sort.h"
#include "cuda/strided.h"

namespace kg::cuda {
namespace {

// Up to kBlockMost keys: one block, items in its registers. More: tiles, a block each.
constexpr int kBlockThreads = 1024, kBlockItems = 8, kBlockBits = 7;
constexpr int kBlockMost = kBlockThreads * kBlockItems;
constexpr int kTileThreads = 256, kTileItems = 16, kTileBits = 9;
constexpr int kTile = kTileThreads * kTileItems, kTileDigits = 1 << kTileBits;

// What a pass reads: the keys as they were given, or whole tiles that the pass before has left.
struct Items {
  const int32_t* given;  // nullptr after the first pass
  const uint32_t* keys;
  const int32_t* order;
  int64_t count;
  uint32_t limit;
  FaultKind fault;
  FaultSink faults;

  // Behind the last key, as if there were more that are out of range: they stay behind it.
  KG_DEVICE uint32_t key(int64_t at) const {
    if (!given) return keys[at];
    const uint32_t key = at < count ? static_cast<uint32_t>(given[at]) : limit;
    return key < limit ? key : limit;  // a negative one is above any limit
  }
  KG_DEVICE int32_t position(int64_t at) const { return given ? static_cast<int32_t>(at) : order[at]; }
  KG_DEVICE bool outOfRange(int64_t at, uint32_t key) const { return given && key == limit && at < count; }
  KG_DEVICE void report(int64_t at) const { reportFault(faults, fault, given[at], at, limit); }
};

struct Digit {
  int shift;
  uint32_t mask;

  KG_DEVICE uint32_t of(uint32_t key) const { return key >> shift & mask; }
};

// The digits of keys up to `limit`, of at most `most` bits and about equally wide.
struct Digits {
  int count, bits;

  KG_INLINE Digit digit(int pass) const { return {pass * bits, (1u << bits) - 1}; }
};
Digits digitsOf(uint32_t limit, int most) {
  int bits = 1;
  while (bits < 32 && limit >> bits != 0) bits++;
  const int count = (bits + most - 1) / most;
  return {count, (bits + count - 1) / count};
}

// ---- prefix sums ----------------------------------------------------------------------------------------------------
// Sum over this lane and those before it.
KG_DEVICE int32_t warpThrough(int32_t v) {
  KG_UNROLL for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t left = shuffleUp(v, delta);
    if (laneId() >= delta) v += left;
  }
  return v;
}

// Sum over the threads before this one in a block of kWarps warps. A barrier has to come between the last use of `sums`
// (kWarps of them) and the call.
template <int kWarps>
KG_DEVICE int32_t blockBefore(int32_t v, int32_t* sums) {
  const int32_t through = warpThrough(v);
  if (laneId() == kWarp - 1) sums[warpId()] = through;
  syncThreads();
  const int32_t warps = warpThrough(laneId() < kWarps ? sums[laneId()] : 0);
  const int32_t before = shuffle(warps, warpId() > 0 ? warpId() - 1 : 0);
  return through - v + (warpId() > 0 ? before : 0);
}

// ---- ranks within a block -------------------------------------------------------------------------------------------
// The lanes of this warp that have the same digit.
template <int kBits>
KG_DEVICE uint32_t lanesWith(uint32_t digit) {
  uint32_t same = ~0u;
  KG_UNROLL for (int b = 0; b < kBits; b++) {
    const uint32_t bit = digit >> b & 1;
    same &= ballot(bit != 0) ^ (bit - 1);  // those that have it set, or those that have not
  }
  return same;
}

// Ranks of the items of a block. A warp's come in the order of k and of its lanes, warps' in the order of their
// numbers.
template <int kBits, int kWarps>
struct Ranking {
  static constexpr int kDigits = 1 << kBits;
  static constexpr int kRow = kWarps + 1;  // counters of a digit; a row ahead starts in another bank
  static constexpr int kCounters = kDigits * kRow;
  static constexpr int kOwn = kDigits / kWarp;  // that a thread sums

  uint16_t* counters;  // [kDigits, kRow] items of a digit in a warp; then those before them
  int32_t* sums;       // [kWarps]

  KG_DEVICE uint16_t& counter(uint32_t digit, int warp) const { return counters[digit * kRow + warp]; }

  // Where items of this digit begin in the block.
  KG_DEVICE int32_t start(uint32_t digit) const { return counter(digit, 0); }

  KG_DEVICE int32_t rankInWarp(uint32_t digit) const {
    const uint32_t same = lanesWith<kBits>(digit);
    uint16_t& counter = this->counter(digit, warpId());
    const int32_t before = counter, below = countBits(same & ((1u << laneId()) - 1));
    syncWarp();  // all lanes have read
    if (below == 0) counter = static_cast<uint16_t>(before + countBits(same));
    syncWarp();
    return before + below;
  }

  // Turns counts into the number of items before, digits first.
  KG_DEVICE void sumCounters() const {
    const auto own = [&](int k) -> uint16_t& {
      const int at = static_cast<int>(threadIdx.x) * kOwn + k;
      return counter(at / kWarps, at % kWarps);
    };
    int32_t sum = 0;
    KG_UNROLL for (int k = 0; k < kOwn; k++) sum += own(k);
    int32_t next = blockBefore<kWarps>(sum, sums);
    KG_UNROLL for (int k = 0; k < kOwn; k++) {
      const int32_t count = own(k);
      own(k) = static_cast<uint16_t>(next);
      next += count;
    }
  }

  // Of the first `items` keys of every thread. All threads of the block.
  template <int kItems>
  KG_DEVICE void rank(const uint32_t (&key)[kItems], const Digit& digit, int items, int32_t (&rank)[kItems]) const {
    for (int i = threadIdx.x; i < kCounters; i += kWarps * kWarp) counters[i] = 0;
    syncThreads();
    KG_UNROLL for (int k = 0; k < kItems; k++) {
      if (k < items) rank[k] = rankInWarp(digit.of(key[k]));
    }
    syncThreads();
    sumCounters();
    syncThreads();
    KG_UNROLL for (int k = 0; k < kItems; k++) {
      if (k < items) rank[k] += counter(digit.of(key[k]), warpId());
    }
  }
};

// ---- one block ------------------------------------------------------------------------------------------------------
// Values of all threads to their ranks, and back into registers in the new order. `first` is this thread's first place.
template <class V>
KG_DEVICE void exchange(V (&value)[kBlockItems], const int32_t (&rank)[kBlockItems], int first, int items, V* buffer) {
  syncThreads();  // the last values have been read
  KG_UNROLL for (int k = 0; k < kBlockItems; k++) {
    if (k < items) buffer[rank[k]] = value[k];
  }
  syncThreads();
  KG_UNROLL for (int k = 0; k < kBlockItems; k++) {
    if (k < items) value[k] = buffer[first + k * kWarp];
  }
}

KG_GLOBAL KG_LAUNCH_BOUNDS(kBlockThreads) void sortBlock(Items in, Digits digits, uint32_t* keys, int32_t* order) {
  using Ranks = Ranking<kBlockBits, kBlockThreads / kWarp>;
  KG_SHARED(uint32_t, buffer, kBlockMost);
  KG_SHARED(uint16_t, counters, Ranks::kCounters);
  KG_SHARED(int32_t, sums, kWarp);
  const Ranks ranks{counters, sums};
  const int items = static_cast<int>((in.count + kBlockThreads - 1) / kBlockThreads);
  const int first = warpId() * items * kWarp + laneId();
  uint32_t key[kBlockItems];
  int32_t position[kBlockItems], rank[kBlockItems], fault = -1;
  KG_UNROLL for (int k = 0; k < kBlockItems; k++) {
    if (k >= items) break;
    position[k] = first + k * kWarp;
    key[k] = in.key(position[k]);
    if (fault < 0 && in.outOfRange(position[k], key[k])) fault = position[k];
  }
  if (fault >= 0) in.report(fault);
  KG_UNROLL_BY(1) for (int pass = 0; pass < digits.count; pass++) {
    if (pass > 0) {
      exchange(key, rank, first, items, buffer);
      exchange(position, rank, first, items, reinterpret_cast<int32_t*>(buffer));
    }
    ranks.rank(key, digits.digit(pass), items, rank);
  }
  KG_UNROLL for (int k = 0; k < kBlockItems; k++) {
    if (k >= items) break;
    if (rank[k] >= in.count) continue;
    keys[rank[k]] = key[k];
    order[rank[k]] = position[k];
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
// counts[digit, tile]
KG_GLOBAL KG_LAUNCH_BOUNDS(kTileThreads) void countDigits(Items in, Digit digit, int32_t* counts) {
  KG_SHARED(int32_t, histogram, kTileDigits);
  for (int d = threadIdx.x; d < kTileDigits; d += kTileThreads) histogram[d] = 0;
  syncThreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  int64_t fault = -1;
  KG_UNROLL for (int k = 0; k < kTileItems; k++) {
    const int64_t at = first + k * kTileThreads;
    const uint32_t key = in.key(at);
    if (fault < 0 && in.outOfRange(at, key)) fault = at;
    atomicAddInt(&histogram[digit.of(key)], 1);
  }
  if (fault >= 0) in.report(fault);
  syncThreads();
  for (int d = threadIdx.x; d < kTileDigits; d += kTileThreads) {
    counts[static_cast<int64_t>(d) * gridDim.x + blockIdx.x] = histogram[d];
  }
}

// A warp a digit: counts of its tiles to the number of items in the tiles before; and their total.
KG_GLOBAL KG_LAUNCH_BOUNDS(kTileThreads) void sumTiles(int32_t* counts, int32_t* totals, int64_t tiles) {
  const int64_t digit = static_cast<int64_t>(blockIdx.x) * (kTileThreads / kWarp) + warpId();
  int32_t* row = counts + digit * tiles;
  int32_t before = 0;
  KG_UNROLL_BY(1) for (int64_t first = 0; first < tiles; first += kWarp) {
    const int64_t tile = first + laneId();
    const int32_t count = tile < tiles ? row[tile] : 0, through = warpThrough(count);
    if (tile < tiles) row[tile] = before + through - count;
    before += shuffle(through, kWarp - 1);
  }
  if (laneId() == 0) totals[digit] = before;
}

KG_GLOBAL KG_LAUNCH_BOUNDS(kTileThreads) void placeItems(Items in, Digit digit, const int32_t* counts,
                                                         const int32_t* totals, uint32_t* keys, int32_t* order) {
  constexpr int kWarps = kTileThreads / kWarp, kOwn = kTileDigits / kTileThreads;
  using Ranks = Ranking<kTileBits, kWarps>;
  KG_SHARED(uint16_t, counters, Ranks::kCounters);
  KG_SHARED(int32_t, sums, kWarps);
  KG_SHARED(int32_t, shift, kTileDigits);  // from a rank in the tile to one among all items
  const Ranks ranks{counters, sums};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + warpId() * kTileItems * kWarp + laneId();
  uint32_t key[kTileItems];
  int32_t rank[kTileItems];
  KG_UNROLL for (int k = 0; k < kTileItems; k++) key[k] = in.key(first + k * kWarp);
  ranks.rank(key, digit, kTileItems, rank);

  const int own = static_cast<int>(threadIdx.x) * kOwn;
  int32_t sum = 0;
  KG_UNROLL for (int k = 0; k < kOwn; k++) sum += totals[own + k];
  int32_t next = blockBefore<kWarps>(sum, sums);
  KG_UNROLL for (int d = own; d < own + kOwn; d++) {
    shift[d] = next + counts[static_cast<int64_t>(d) * gridDim.x + blockIdx.x] - ranks.start(d);
    next += totals[d];
  }
  syncThreads();
  KG_UNROLL for (int k = 0; k < kTileItems; k++) {
    const int32_t to = shift[digit.of(key[k])] + rank[k];
    keys[to] = key[k];
    order[to] = in.position(first + k * kWarp);
  }
}

}  // namespace

KeySort::KeySort(Workspace& workspace, int64_t count, int64_t limit)
    : count_(count), limit_(limit < INT64_C(1) << 31 ? limit : INT64_C(1) << 31) {
  const bool inTiles = count > kBlockMost;
  const int64_t tiles = inTiles ? ceilDiv(count, kTile) : 0;
  for (int i = 0; i < 2; i++) {
    const int64_t items = inTiles ? tiles * kTile : i == 0 ? count : 0;
    keys_[i] = workspace.reserve<uint32_t>(items);
    order_[i] = workspace.reserve<int32_t>(items);
  }
  counts_ = workspace.reserve<int32_t>(kTileDigits * tiles);
  totals_ = workspace.reserve<int32_t>(inTiles ? kTileDigits : 0);
}

SortedKeys KeySort::run(const Call& call, const Workspace& workspace, const int32_t* given, FaultKind fault) const {
  const uint32_t limit = static_cast<uint32_t>(limit_);
  uint32_t* keys[2] = {workspace.get<uint32_t>(keys_[0]), workspace.get<uint32_t>(keys_[1])};
  int32_t* order[2] = {workspace.get<int32_t>(order_[0]), workspace.get<int32_t>(order_[1])};
  Items items{given, nullptr, nullptr, count_, limit, fault, context(call).faults};
  if (count_ <= kBlockMost) {
    launch(call, {gridOf(count_ > 0 ? 1 : 0), kBlockThreads}, sortBlock, items, digitsOf(limit, kBlockBits), keys[0],
           order[0]);
    return {keys[0], order[0]};
  }
  const int64_t tiles = ceilDiv(count_, kTile);
  int32_t *counts = workspace.get<int32_t>(counts_), *totals = workspace.get<int32_t>(totals_);
  const Digits digits = digitsOf(limit, kTileBits);
  for (int pass = 0; pass < digits.count; pass++) {
    const int to = (digits.count - 1 - pass) % 2;  // the last pass writes the result
    const Digit digit = digits.digit(pass);
    launch(call, {gridOf(tiles), kTileThreads}, countDigits, items, digit, counts);
    launch(call, {gridOf(kTileDigits * kWarp / kTileThreads), kTileThreads}, sumTiles, counts, totals, tiles);
    launch(call, {gridOf(tiles), kTileThreads}, placeItems, items, digit, counts, totals, keys[to], order[to]);
    items.given = nullptr;
    items.keys = keys[to];
    items.order = order[to];
  }
  return {keys[0], order[0]};
}

}  // namespace kg::cuda

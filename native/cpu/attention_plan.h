// Who sees whom: checks the segment table of an attention call and cuts it into chunks of query rows (the unit of
// work). Reads segment tables only, never a floating tensor.
#pragma once

#include "ops/backend.h"
#include "runtime/error.h"

namespace kg::cpu::KG_ISA::attention {

struct Segment {
  int64_t start, length, parent;  // parent: index of the segment whose rows come first, or -1
};

struct SegmentTable {
  const int32_t* rows;
  int64_t count;
  KG_INLINE Segment operator[](int64_t s) const { return {rows[4 * s], rows[4 * s + 1], rows[4 * s + 2]}; }
};

// Row of the layout that holds logical key j of a segment: its parent's rows come first, then its own.
struct KeyRows {
  int64_t parentStart, parentLength, ownStart;
  KG_INLINE int64_t operator()(int64_t j) const {
    return j < parentLength ? parentStart + j : ownStart + (j - parentLength);
  }
};

KG_INLINE KeyRows keyRows(const SegmentTable& segments, int64_t s) {
  const Segment own = segments[s];
  if (own.parent < 0) return {0, 0, own.start};
  const Segment parent = segments[own.parent];
  return {parent.start, parent.length, own.start};
}

// `rows` query rows of a segment from its row `row` on. `splits`: see Family.
struct Chunk {
  int32_t segment, row, rows, splits;
};

// A root segment and its children: the rows that share keys. Its chunks (root first) are dealt in turn to `splits`
// jobs, each with key gradients of its own, so that one long sequence still occupies several threads. The number
// depends on the family and the heads alone, for a row's gradient must not change with the batch.
struct Family {
  int32_t firstChunk, chunkCount, splits;
};

struct Job {
  int32_t family, split;
};

constexpr int kMaxSplits = 4;

// A split costs memory for key gradients; with many key heads there are jobs enough without.
static inline int32_t splitsFor(int64_t familyRows, int64_t keyHeads) {
  const int64_t byRows = familyRows < 256 ? 1 : familyRows < 1024 ? 2 : kMaxSplits;
  const int64_t byHeads = (16 + keyHeads - 1) / keyHeads;
  return static_cast<int32_t>(byRows < byHeads ? byRows : byHeads);
}

static inline SegmentTable checkedSegments(const char* op, const TensorView& t, int64_t T) {
  if (t.dtype != DType::I32 || t.ndim != 2 || t.size(1) != 4)
    fail("[%s] expected segments int32 [S, 4], found %s with %d axes", op, dtypeName(t.dtype), t.ndim);
  const SegmentTable segments{t.ptr<const int32_t>(), t.size(0)};
  int64_t next = 0;
  for (int64_t s = 0; s < segments.count; s++) {
    const Segment g = segments[s];
    if (g.start != next || g.length < 0)
      fail(
          "[%s] expected segment %lld to start at row %lld with length >= 0, found start %lld length %lld; "
          "segments cover the rows in order",
          op, (long long)s, (long long)next, (long long)g.start, (long long)g.length);
    if (g.parent < -1 || g.parent >= s)
      fail("[%s] expected the parent of segment %lld to be -1 or an earlier segment, found %lld", op, (long long)s,
           (long long)g.parent);
    if (g.parent >= 0 && segments[g.parent].parent >= 0)
      fail("[%s] expected the parent of segment %lld to have no parent, found segment %lld with parent %lld", op,
           (long long)s, (long long)g.parent, (long long)segments[g.parent].parent);
    next += g.length;
  }
  if (next != T) fail("[%s] expected segments to cover %lld rows, found %lld", op, (long long)T, (long long)next);
  return segments;
}

static inline int64_t maxChunks(const SegmentTable& segments, int64_t T, int64_t chunkRows) {
  return T / chunkRows + segments.count;
}

// Cuts segment s; last chunk (the one with most keys) first when `heavyFirst`. Returns the number of chunks.
static inline int64_t cutSegment(const SegmentTable& segments, int64_t s, int64_t chunkRows, bool heavyFirst,
                                 int32_t splits, Chunk* out) {
  const int64_t length = segments[s].length, count = (length + chunkRows - 1) / chunkRows;
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = (heavyFirst ? count - 1 - i : i) * chunkRows;
    const int64_t rows = length - row < chunkRows ? length - row : chunkRows;
    out[i] = {static_cast<int32_t>(s), static_cast<int32_t>(row), static_cast<int32_t>(rows), splits};
  }
  return count;
}

static inline int64_t cutAll(const SegmentTable& segments, int64_t chunkRows, Chunk* out) {
  int64_t n = 0;
  for (int64_t s = 0; s < segments.count; s++) n += cutSegment(segments, s, chunkRows, true, 1, out + n);
  return n;
}

// The backward's plan, in caller-owned arrays: chunks[maxChunks], families[S], jobs[S * kMaxSplits], link[2 * S].
struct FamilyPlan {
  Chunk* chunks;
  Family* families;
  Job* jobs;
  int32_t* link;
  int64_t chunkCount, jobCount;
};

static inline void planFamilies(const SegmentTable& segments, int64_t chunkRows, int64_t keyHeads, FamilyPlan& plan) {
  int32_t *next = plan.link, *last = plan.link + segments.count;  // chains root -> child -> child
  for (int32_t s = 0; s < segments.count; s++) {
    next[s] = -1;
    last[s] = s;
    const int64_t root = segments[s].parent;
    if (root < 0) continue;
    next[last[root]] = s;
    last[root] = s;
  }
  int32_t families = 0;
  plan.chunkCount = plan.jobCount = 0;
  for (int32_t root = 0; root < segments.count; root++) {
    if (segments[root].parent >= 0) continue;
    int64_t rows = 0;
    for (int32_t s = root; s >= 0; s = next[s]) rows += segments[s].length;
    if (rows == 0) continue;
    const int32_t first = static_cast<int32_t>(plan.chunkCount), splits = splitsFor(rows, keyHeads);
    for (int32_t s = root; s >= 0; s = next[s])
      plan.chunkCount += cutSegment(segments, s, chunkRows, false, splits, plan.chunks + plan.chunkCount);
    for (int32_t i = splits - 1; i >= 0; i--) plan.jobs[plan.jobCount++] = {families, i};
    plan.families[families++] = {first, static_cast<int32_t>(plan.chunkCount - first), splits};
  }
}

}  // namespace kg::cpu::KG_ISA::attention

// Stable sort of int32 keys with their positions, for kernels that work key by key: rows of one id, targets of one row.
// Keys are those of a table whose length the host knows; only the digits that it needs are sorted. The result depends
// on the keys alone; nothing waits for the device, and memory is the call's one scratch block.
#pragma once

#include "cuda/block.h"

namespace kg::cuda {

// Keys ascending; order[i] is where keys[i] stood, ascending among equal keys. A key outside of [0, limit) has become
// `limit`: such keys come last.
struct SortedKeys {
  const uint32_t* keys;
  const int32_t* order;
};

// One sort of a call: reserves its part of the workspace, and runs once that is allocated.
class KeySort {
 public:
  KeySort(Workspace& workspace, int64_t count, int64_t limit);
  // Reports a key outside of [0, limit) as `fault`, with its position and the limit.
  SortedKeys run(const Call& call, const Workspace& workspace, const int32_t* keys, FaultKind fault) const;

 private:
  int64_t count_, limit_;
  size_t keys_[2], order_[2];  // the result, and what a pass in between leaves
  size_t counts_, totals_;
};

}  // namespace kg::cuda

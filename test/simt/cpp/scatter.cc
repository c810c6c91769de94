// scatterAddRows on the device against the CPU, bit for bit: numbers of rows on both sides of what one block sorts, ids
// of one to four digits, distinct, equal and in long runs, and ids out of range wherever they stand.
#include <algorithm>

#include "compare.h"

using namespace simt;

namespace {

using Ids = std::vector<int32_t>;

Ids randomIds(Comparison& c, int64_t count, int64_t limit) {
  Ids ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(c.below(limit));
  return ids;
}

// Each once, `step` apart; a step that shares no factor with the limit.
Ids distinctIds(int64_t count, int64_t limit, int64_t step) {
  Ids ids(static_cast<size_t>(count));
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int32_t>(static_cast<int64_t>(i) * step % limit);
  return ids;
}

// Half of them one id, spread among the others.
Ids padded(Ids ids, int32_t id) {
  for (size_t i = 0; i < ids.size(); i += 2) ids[i] = id;
  return ids;
}

template <class O, class S>
void add(Comparison& c, const Ids& ids, int64_t limit, int64_t width) {
  const int64_t count = static_cast<int64_t>(ids.size());
  const std::vector<O> out = c.values<O>(limit * width);
  const std::vector<S> src = c.values<S>(count * width);
  const auto on = [&](Device& device) {
    const Tensor sums = device.upload<O>({limit, width}, out);
    device.call("scatterAddRows", {sums, device.upload<S>({count, width}, src), device.upload<int32_t>({count}, ids)});
    return sums;
  };
  const std::string name = std::string(kg::dtypeName(dtypeOf<S>())) + " [" + std::to_string(count) + ", " +
                           std::to_string(width) + "] into " + kg::dtypeName(dtypeOf<O>()) + " [" +
                           std::to_string(limit) + "]";
  c.equal<O>(name, on(c.cuda), on(c.cpu), 0);
}

// Ids `at` out of range: one of them is reported, with the position where it stands. Rows beside the table are guarded.
void fault(Comparison& c, Ids ids, int64_t limit, const std::vector<std::pair<size_t, int32_t>>& bad) {
  std::vector<std::string> expected;
  for (const auto& [at, id] : bad) {
    ids[at] = id;
    expected.push_back("expected ids[" + std::to_string(at) + "] in [0, " + std::to_string(limit) + "), found " +
                       std::to_string(id));
  }
  const int64_t count = static_cast<int64_t>(ids.size());
  const Tensor sums = c.cuda.upload<float>({limit, 1}, std::vector<float>(static_cast<size_t>(limit)));
  const Tensor src = c.cuda.upload<float>({count, 1}, c.values<float>(count));
  c.cuda.call("scatterAddRows", {sums, src, c.cuda.upload<int32_t>({count}, ids)});
  const std::string found = Comparison::fault(c.cuda);
  const bool known = std::any_of(expected.begin(), expected.end(), [&](const std::string& text) {
    return found.size() >= text.size() && found.compare(found.size() - text.size(), text.size(), text) == 0;
  });
  c.expect(known, std::to_string(count) + " ids: expected the fault '" + expected[0] + "', found '" + found + "'");
}

void faults(Comparison& c, int64_t count, int64_t limit) {
  const Ids ids = randomIds(c, count, limit);
  const auto last = static_cast<size_t>(count - 1), middle = static_cast<size_t>(count / 2);
  const auto above = static_cast<int32_t>(limit);
  fault(c, ids, limit, {{0, above}});
  fault(c, ids, limit, {{last, -1}});
  fault(c, ids, limit, {{middle, INT32_MIN}});
  fault(c, ids, limit, {{last, INT32_MAX}});
  fault(c, ids, limit, {{0, -1}, {middle, above}, {middle + 1, above}, {last, above + 5}});
  fault(c, Ids(ids.size(), 0), limit, {{middle, -7}});
}

}  // namespace

int main() {
  Comparison c;
  constexpr int64_t kVocabulary = 151936;
  for (const int64_t count : {0, 1, 2, 31, 33, 1024, 1025, 8192, 8193, 20000}) {
    add<float, float>(c, randomIds(c, count, 97), 97, 3);
    add<float, kg::bf16>(c, randomIds(c, count, kVocabulary), kVocabulary, 1);
  }
  // Digits of one block are at most 7 bits wide, those of tiles 9.
  for (const int64_t limit : {1, 2, 127, 128, 16383, 16384, 2097152})
    add<float, float>(c, randomIds(c, 3000, limit), limit, 1);
  for (const int64_t limit : {1, 511, 512, 262143, 262144}) add<float, float>(c, randomIds(c, 9000, limit), limit, 1);
  for (const int64_t count : {700, 9001}) {
    add<kg::bf16, kg::bf16>(c, Ids(static_cast<size_t>(count), 5), 7, 3);
    add<float, kg::bf16>(c, padded(randomIds(c, count, 300), 299), 300, 5);
    add<float, float>(c, distinctIds(count, 9002, 4099), 9002, 2);
    add<float, float>(c, distinctIds(count, 9002, 9001), 9002, 2);
  }
  add<float, float>(c, randomIds(c, 135000, 5000), 5000, 1);  // more tiles than a warp sums at a time
  // Columns of several panels.
  add<kg::bf16, kg::bf16>(c, padded(randomIds(c, 40, 12), 3), 12, 1030);
  add<double, double>(c, padded(randomIds(c, 600, 12), 3), 12, 7);
  faults(c, 3, 4);
  faults(c, 900, 128);
  faults(c, 9000, kVocabulary);
  return c.finish();
}

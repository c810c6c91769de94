// The vocabulary head on the device against the CPU: chunks of the vocabulary, several targets a row, rows without one,
// statistics, probes, row maps, a bfloat16 weight gradient, faults; and rows that depend on nothing but themselves.
#include "compare.h"

using namespace simt;

namespace {

template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

struct Pair {
  Tensor cuda, cpu;
};

template <class T>
Pair upload(Comparison& c, const std::vector<int64_t>& shape, const std::vector<T>& values) {
  return {c.cuda.upload<T>(shape, values), c.cpu.upload<T>(shape, values)};
}
template <class T>
Pair uploadRandom(Comparison& c, const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  return upload(c, shape, c.values<T>(count));
}
Pair indices(Comparison& c, int64_t count, int64_t limit) {
  std::vector<int32_t> v(static_cast<size_t>(count));
  for (int32_t& x : v) x = static_cast<int32_t>(c.below(limit));
  return upload(c, {count}, v);
}
template <class T>
Pair empty(Comparison& c, const std::vector<int64_t>& shape) {
  return {c.cuda.empty<T>(shape), c.cpu.empty<T>(shape)};
}

// The same memory as bytes.
Tensor bytesOf(Tensor t) {
  t.view.shape[t.view.ndim - 1] *= static_cast<int64_t>(kg::dtypeSize(t.view.dtype));
  t.view.dtype = kg::DType::U8;
  return t;
}

struct Shape {
  int64_t rows, width, vocabulary, targets, probes;
};

template <class T>
void forwardAndBackward(Comparison& c, const Shape& s) {
  using C = typename Wide<T>::type;
  const double unit = sizeof(C) == 8 ? 1e-12 : 5e-6, narrow = sizeof(T) == 2 ? 2e-2 : 10 * unit;
  const Pair hidden = uploadRandom<T>(c, {s.rows, s.width}), weight = uploadRandom<T>(c, {s.vocabulary, s.width});
  const Pair row = indices(c, s.targets, s.rows), id = indices(c, s.targets, s.vocabulary);
  const Pair probes = indices(c, s.probes, s.vocabulary);
  const Pair logProbs = empty<C>(c, {s.targets}), lse = empty<C>(c, {s.rows}), stats = empty<C>(c, {s.rows, 4});
  const Pair probeLogProbs = empty<C>(c, {s.rows, s.probes});
  c.cuda.call("vocabHead", {logProbs.cuda, lse.cuda, stats.cuda, probeLogProbs.cuda, hidden.cuda, weight.cuda, row.cuda,
                            id.cuda, probes.cuda});
  c.cpu.call("vocabHead", {logProbs.cpu, lse.cpu, stats.cpu, probeLogProbs.cpu, hidden.cpu, weight.cpu, row.cpu, id.cpu,
                           probes.cpu});
  const std::string name = std::string(kg::dtypeName(dtypeOf<T>())) + " [" + std::to_string(s.rows) + ", " +
                           std::to_string(s.width) + "] x " + std::to_string(s.vocabulary);
  c.equal<C>(name + " logProbs", logProbs.cuda, logProbs.cpu, unit);
  c.equal<C>(name + " lse", lse.cuda, lse.cpu, unit);
  c.equal<C>(name + " stats", stats.cuda, stats.cpu, unit);
  c.equal<C>(name + " probes", probeLogProbs.cuda, probeLogProbs.cpu, unit);

  // Alone, and without statistics: the same bits.
  const Tensor alone = c.cuda.empty<C>({1}), none = c.cuda.empty<C>({0});
  Tensor one = hidden.cuda;
  one.view.shape[0] = 1;
  one.view.data = static_cast<T*>(one.view.data) + (s.rows - 1) * s.width;
  const Tensor noIds = c.cuda.empty<int32_t>({0});
  c.cuda.call("vocabHead", {none, alone, Tensor{}, Tensor{}, one, weight.cuda, noIds, noIds, Tensor{}});
  const C last = c.cuda.download<C>(lse.cuda).back(), again = c.cuda.download<C>(alone)[0];
  c.expect(memcmp(&last, &again, sizeof(C)) == 0, name + ": a row alone, without statistics, differs");

  // Backward, with and without a row map, into dweight as it is.
  const Pair g = uploadRandom<C>(c, {s.targets});
  for (const bool mapped : {false, true}) {
    const int64_t rows = mapped ? s.rows + 5 : s.rows;
    const Pair map = indices(c, rows, s.rows), targetRow = indices(c, s.targets, rows);
    const Pair dhidden = empty<T>(c, {rows, s.width});
    const bool roundWeight = mapped && sizeof(T) == 2;
    const Pair dweight =
        roundWeight ? uploadRandom<T>(c, {s.vocabulary, s.width}) : uploadRandom<C>(c, {s.vocabulary, s.width});
    c.cuda.call("vocabHeadBackward", {dhidden.cuda, dweight.cuda, g.cuda, hidden.cuda, weight.cuda, lse.cuda,
                                      targetRow.cuda, id.cuda, mapped ? map.cuda : Tensor{}});
    c.cpu.call("vocabHeadBackward", {dhidden.cpu, dweight.cpu, g.cpu, hidden.cpu, weight.cpu, lse.cpu, targetRow.cpu,
                                     id.cpu, mapped ? map.cpu : Tensor{}});
    c.equal<T>(name + " dhidden" + (mapped ? " mapped" : ""), dhidden.cuda, dhidden.cpu, narrow);
    roundWeight ? c.equal<T>(name + " dweight rounded", dweight.cuda, dweight.cpu, narrow)
                : c.equal<C>(name + " dweight", dweight.cuda, dweight.cpu, narrow);
    const Tensor only = c.cuda.empty<T>({rows, s.width});
    c.cuda.call("vocabHeadBackward", {only, Tensor{}, g.cuda, hidden.cuda, weight.cuda, lse.cuda, targetRow.cuda,
                                      id.cuda, mapped ? map.cuda : Tensor{}});
    c.expect(c.cuda.download<uint8_t>(bytesOf(only)) == c.cuda.download<uint8_t>(bytesOf(dhidden.cuda)),
             name + ": dhidden without dweight differs");
  }
}

// What is wrong in the data is reported as the CPU does, and its results are NaN.
void faults(Comparison& c) {
  const Pair hidden = uploadRandom<float>(c, {4, 8}), weight = uploadRandom<float>(c, {9, 8});
  const Pair lse = empty<float>(c, {4}), logProbs = empty<float>(c, {3}), g = uploadRandom<float>(c, {3});
  const Pair probeLogProbs = empty<float>(c, {4, 1});
  struct Fault {
    std::vector<int32_t> rows, ids, probes, map;
  };
  const Fault all[] = {{{0, 1, 4}, {0, 1, 2}, {0}, {0, 1, 2, 3}},
                       {{0, -1, 2}, {0, 1, 2}, {0}, {0, 1, 2, 3}},
                       {{0, 1, 2}, {0, 9, 2}, {0}, {0, 1, 2, 3}},
                       {{0, 1, 2}, {0, 8, 2}, {-3}, {0, 1, 2, 3}},
                       {{0, 1, 2}, {0, 8, 2}, {1}, {0, 1, 2, 4}}};
  for (const Fault& f : all) {
    const Pair row = upload(c, {3}, f.rows), id = upload(c, {3}, f.ids), probes = upload(c, {1}, f.probes);
    const Pair map = upload(c, {4}, f.map);
    c.cuda.call("vocabHead", {logProbs.cuda, lse.cuda, Tensor{}, probeLogProbs.cuda, hidden.cuda, weight.cuda, row.cuda,
                              id.cuda, probes.cuda});
    c.cpu.call("vocabHead", {logProbs.cpu, lse.cpu, Tensor{}, probeLogProbs.cpu, hidden.cpu, weight.cpu, row.cpu,
                             id.cpu, probes.cpu});
    const std::string found = Comparison::fault(c.cuda), expected = Comparison::fault(c.cpu);
    c.expect(found == expected, "forward: expected the fault '" + expected + "', found '" + found + "'");
    const Pair sound = upload<float>(c, {4}, {2, 2, 2, 2}), dhidden = empty<float>(c, {4, 8});
    c.cuda.call("vocabHeadBackward",
                {dhidden.cuda, Tensor{}, g.cuda, hidden.cuda, weight.cuda, sound.cuda, row.cuda, id.cuda, map.cuda});
    c.cpu.call("vocabHeadBackward",
               {dhidden.cpu, Tensor{}, g.cpu, hidden.cpu, weight.cpu, sound.cpu, row.cpu, id.cpu, map.cpu});
    const std::string back = Comparison::fault(c.cuda), expectedBack = Comparison::fault(c.cpu);
    c.expect(back == expectedBack, "backward: expected the fault '" + expectedBack + "', found '" + back + "'");
  }
}

}  // namespace

int main() {
  Comparison c;
  for (const Shape& s : {Shape{4, 3, 5, 7, 2}, Shape{1, 1, 1, 1, 1}, Shape{19, 40, 4099, 30, 5},
                         Shape{7, 24, 8300, 3, 0}, Shape{5, 16, 4096, 0, 3}}) {
    forwardAndBackward<float>(c, s);
    forwardAndBackward<double>(c, s);
    forwardAndBackward<kg::bf16>(c, s);
  }
  forwardAndBackward<kg::bf16>(c, {4200, 8, 300, 900, 1});  // more rows than a block of logits holds
  forwardAndBackward<float>(c, {600, 4, 20, 9000, 0});      // more targets than one block sorts
  faults(c);
  return c.finish();
}

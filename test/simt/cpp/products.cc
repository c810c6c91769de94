// matmul on the device against the CPU: every dtype, layouts that cuBLAS takes and layouts that it does not, batches of
// up to four axes, bias, accumulation, K = 0, more rows than a grid has, and rows that do not depend on M.
#include "compare.h"
#include "cuda/backend.h"

using namespace simt;

namespace {

enum class Layout { Rows, Columns, Padded, Broadcast, Reversed, Spread };
constexpr Layout kLayouts[] = {Layout::Rows,      Layout::Columns,  Layout::Padded,
                               Layout::Broadcast, Layout::Reversed, Layout::Spread};

struct Case {
  std::vector<int64_t> batch;
  int64_t M, K, N;
  Layout a, b;
  bool bias = false, accumulate = false;
  int64_t padding = 0;  // of rows of the output
  int broadcast = 0;    // bit 0: a has stride 0 over the batch, bit 1: b
  double alpha = 1;
};

// A matrix [rows, columns] with batch axes before it, laid out one way or another; both devices see the same numbers.
struct Operand {
  Tensor cuda, cpu;
};

void setBatch(kg::TensorView& view, const std::vector<int64_t>& batch, int64_t matrix, bool broadcast) {
  for (int i = static_cast<int>(batch.size()) - 1; i >= 0; i--) {
    view.shape[i] = batch[static_cast<size_t>(i)];
    view.strides[i] = broadcast ? 0 : matrix;
    if (!broadcast) matrix *= view.shape[i];
  }
}

template <class T>
Operand operand(Comparison& c, const std::vector<int64_t>& batch, int64_t rows, int64_t columns, Layout layout,
                bool broadcast) {
  int64_t count = 1;
  for (int64_t n : batch) count *= n;
  const int64_t pitch = layout == Layout::Padded ? columns + 3 : layout == Layout::Spread ? 3 * columns : columns;
  const int64_t matrix = (rows > 0 ? rows : 1) * (pitch > 0 ? pitch : 1);
  const std::vector<T> values = c.values<T>(count * matrix + 1);
  const std::vector<int64_t> shape{static_cast<int64_t>(values.size())};
  Operand o{c.cuda.upload<T>(shape, values), c.cpu.upload<T>(shape, values)};
  for (Tensor* t : {&o.cuda, &o.cpu}) {
    kg::TensorView& v = t->view;
    const int n = static_cast<int>(batch.size());
    v.ndim = n + 2;
    v.shape[n] = rows;
    v.shape[n + 1] = columns;
    v.strides[n] = layout == Layout::Columns ? 1 : layout == Layout::Broadcast ? 0 : pitch;
    v.strides[n + 1] = layout == Layout::Columns ? rows : layout == Layout::Spread ? 3 : 1;
    if (layout == Layout::Padded) v.data = static_cast<T*>(v.data) + 1;  // not on 16 bytes
    if (layout == Layout::Reversed && columns > 0) {
      v.data = static_cast<T*>(v.data) + columns - 1;
      v.strides[n + 1] = -1;
    }
    setBatch(v, batch, matrix, broadcast);
  }
  return o;
}

template <class T, class O>
void run(Comparison& c, const Case& p) {
  const Operand a = operand<T>(c, p.batch, p.M, p.K, p.a, p.broadcast & 1);
  const Operand b = operand<T>(c, p.batch, p.K, p.N, p.b, p.broadcast & 2);
  const Operand bias = operand<T>(c, {}, 1, p.N, p.padding ? Layout::Padded : Layout::Rows, false);
  std::vector<int64_t> shape = p.batch;
  shape.push_back(p.M);
  shape.push_back(p.N + p.padding);
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  // Outputs that are not accumulated into hold NaN: they must not be read.
  const std::vector<O> before =
      p.accumulate ? c.values<O>(count) : std::vector<O>(static_cast<size_t>(count), static_cast<O>(float(NAN)));
  Tensor out[2] = {c.cuda.upload<O>(shape, before), c.cpu.upload<O>(shape, before)}, flat[2] = {out[0], out[1]};
  for (int i = 0; i < 2; i++) {
    out[i].view.shape[out[i].view.ndim - 1] = p.N;
    Tensor biasRow = i == 0 ? bias.cuda : bias.cpu;
    biasRow.view.ndim = 1;
    biasRow.view.shape[0] = p.N;
    biasRow.view.strides[0] = 1;
    (i == 0 ? c.cuda : c.cpu)
        .call("matmul", {out[i], i == 0 ? a.cuda : a.cpu, i == 0 ? b.cuda : b.cpu, p.bias ? biasRow : Tensor{}},
              {p.alpha, p.accumulate ? 1.0 : 0.0});
  }
  const double unit = sizeof(O) == 8 ? 1e-13 : sizeof(O) == 4 ? 2e-6 : 8e-3;
  const std::string name = std::string(kg::dtypeName(dtypeOf<T>())) + " -> " + kg::dtypeName(dtypeOf<O>()) + " [" +
                           std::to_string(p.M) + ", " + std::to_string(p.K) + "] @ [.., " + std::to_string(p.N) +
                           "] layouts " + std::to_string(static_cast<int>(p.a)) + " " +
                           std::to_string(static_cast<int>(p.b)) + (p.bias ? " bias" : "") +
                           (p.accumulate ? " accumulated" : "") + " batch axes " + std::to_string(p.batch.size());
  c.equal<O>(name, flat[0], flat[1], unit * (1 + std::sqrt(static_cast<double>(p.K))));
}

void runAll(Comparison& c, const Case& p) {
  run<float, float>(c, p);
  run<double, double>(c, p);
  run<kg::bf16, kg::bf16>(c, p);
  run<kg::bf16, float>(c, p);
}

// Rows first..first+count of product `batch` are the same bits by themselves as among the others.
template <class T>
void rowsAlone(Comparison& c, const Operand& a, const Operand& b, const Tensor& all, int64_t batch, int64_t first,
               int64_t count) {
  const int64_t M = all.view.shape[1], N = all.view.shape[2];
  Tensor rows = a.cuda, right = b.cuda;
  const Tensor part = c.cuda.empty<T>({1, count, N});
  rows.view.shape[0] = right.view.shape[0] = 1;
  rows.view.shape[1] = count;
  rows.view.data = static_cast<T*>(rows.view.data) + batch * rows.view.strides[0] + first * rows.view.strides[1];
  right.view.data = static_cast<T*>(right.view.data) + batch * right.view.strides[0];
  c.cuda.call("matmul", {part, rows, right, Tensor{}}, {1, 0});
  const std::vector<T> everything = c.cuda.download<T>(all), alone = c.cuda.download<T>(part);
  c.expect(memcmp(everything.data() + (batch * M + first) * N, alone.data(), alone.size() * sizeof(T)) == 0,
           "rows among " + std::to_string(all.view.shape[0]) + " x " + std::to_string(M) + " differ, " +
               std::to_string(count) + " from " + std::to_string(first));
}

// A row of a product has one value, whatever the rows around it: alone, in a batch, and in the general kernel.
template <class T>
void rowsAlone(Comparison& c, int64_t batch, int64_t M, Layout layout) {
  constexpr int64_t K = 300, N = 36;
  const Operand a = operand<T>(c, {batch}, M, K, layout, false),
                b = operand<T>(c, {batch}, K, N, Layout::Columns, false);
  const Tensor all = c.cuda.empty<T>({batch, M, N});
  c.cuda.call("matmul", {all, a.cuda, b.cuda, Tensor{}}, {1, 0});
  rowsAlone<T>(c, a, b, all, batch - 1, 0, 1);
  rowsAlone<T>(c, a, b, all, 0, M - 1, 1);
  rowsAlone<T>(c, a, b, all, batch - 1, M / 2, 5);
  rowsAlone<T>(c, a, b, all, 0, 1, M - 1);
}

// cuBLAS may refuse an algorithm for a shape: another one is found, and it shows.
void refusedAlgorithm(Comparison& c) {
  c.expect(kg::cuda::unplannedProducts() == 0, "products whose rows have an algorithm of their own");
  // One that would need more workspace than there is.
  run<float, float>(c, {{}, 5000, 8, 100, Layout::Rows, Layout::Columns});
  c.expect(kg::cuda::unplannedProducts() == 1, "an algorithm without its workspace was not counted");
  // The first that is recommended is refused.
  run<float, float>(c, {{}, 4097, 8, 5, Layout::Columns, Layout::Columns});
  setenv("KEELGRAD_STANDIN_STRICT", "1", 1);
  run<float, float>(c, {{}, 5000, 8, 8, Layout::Rows, Layout::Columns});
  run<float, float>(c, {{}, 5000, 8, 8, Layout::Rows, Layout::Columns});
  c.expect(kg::cuda::unplannedProducts() == 2, "a refused algorithm was not counted");
}

}  // namespace

int main() {
  Comparison c;
  for (const Layout a : kLayouts)
    for (const Layout b : kLayouts) runAll(c, {{}, 37, 50, 41, a, b, a == b, a != Layout::Rows, 2, 0, 0.5});
  for (const Layout l : {Layout::Rows, Layout::Columns, Layout::Spread}) {
    runAll(c, {{}, 1, 20, 9, l, Layout::Columns, true});
    runAll(c, {{}, 65, 1, 1, l, l});
    runAll(c, {{}, 8, 0, 24, l, l, true, true});
    runAll(c, {{}, 8, 0, 24, l, l, false, false});
    runAll(c, {{3}, 17, 20, 9, l, Layout::Rows, true, true});
    runAll(c, {{3}, 17, 20, 9, Layout::Rows, l, false, false, 0, 2});
    runAll(c, {{2, 3}, 5, 8, 16, l, l, false, true, 8, 1});
    runAll(c, {{2, 1, 3, 2}, 4, 8, 8, l, l, true, false, 0});
    runAll(c, {{2, 1, 3, 2}, 4, 8, 8, Layout::Rows, l, true, false, 5, 2});
  }
  runAll(c, {{9, 2, 9}, 2, 3, 2, Layout::Rows, Layout::Padded, false, false, 1});
  runAll(c, {{}, 600, 64, 513, Layout::Rows, Layout::Columns, true});
  runAll(c, {{}, 64, 600, 512, Layout::Columns, Layout::Rows, false, true});
  run<float, float>(c,
                    {{}, 65536 * 64 + 1, 0, 1, Layout::Rows, Layout::Rows, true});  // more tiles than a grid has in y
  for (const Layout layout : {Layout::Rows, Layout::Spread}) {
    for (const auto& [batch, M] : {std::pair<int64_t, int64_t>{1, 70}, {3, 9}, {1, 700}}) {
      rowsAlone<float>(c, batch, M, layout);
      rowsAlone<double>(c, batch, M, layout);
      rowsAlone<kg::bf16>(c, batch, M, layout);
    }
  }
  refusedAlgorithm(c);
  return c.finish();
}

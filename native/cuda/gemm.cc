// gemm(): how a product is put to cuBLASLt (which algorithm: gemm.h), and what is remembered of it: a plan (descriptors
// and an algorithm) for every shape met, so that a product that was seen before costs one look-up. Never synchronizes,
// and allocates nothing but a stream's workspace.
//
// A row-major C = A B is the column-major C^T = B^T A^T: cuBLAS's first operand is our B, its m our N, its n our M.
#include "cuda/gemm.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cuda/backend.h"
#include "cuda/context.h"
#include "cuda/cublas.h"
#include "cuda/gemm_general.h"

namespace kg::cuda {
namespace {

constexpr size_t kMaxPlans = 4096;  // of a stream; beyond, all are forgotten
constexpr int kAlignment = 16;      // bytes beyond which cuBLAS has no use for more

std::atomic<uint64_t> unplanned{0};

// A product as cuBLAS sees it; the key of plans. No padding: compared and hashed as bytes.
struct Problem {
  int32_t in, out;
  int32_t transA, transB;
  int32_t alignA, alignB, alignC;  // bytes
  int32_t bias;                    // epilogue
  int64_t rows, columns, depth;    // m, n, k
  int64_t lda, ldb, ldc;
  int64_t batch, batchA, batchB, batchC;
  int64_t planColumns;  // n for which the algorithm is chosen, whatever n and the batch are; 0: this very shape
};
static_assert(sizeof(Problem) == 8 * sizeof(int32_t) + 11 * sizeof(int64_t), "Problem is compared as bytes");

bool operator==(const Problem& a, const Problem& b) { return memcmp(&a, &b, sizeof(Problem)) == 0; }

struct ProblemHash {
  size_t operator()(const Problem& p) const {
    uint64_t words[sizeof(Problem) / sizeof(uint64_t)], hash = 0;
    memcpy(words, &p, sizeof(Problem));
    for (uint64_t word : words) {
      hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// ---- from strides to a column-major operand
// ---------------------------------------------------------------------------

struct Operand {
  bool valid;       // cuBLAS can take it
  bool transposed;  // the axis that cuBLAS takes as columns is the one with unit stride
  int64_t ld;
};

// A matrix x(i, j) = data[i*rowStride + j*columnStride] of which cuBLAS wants j to have unit stride.
Operand operandOf(int64_t rows, int64_t columns, int64_t rowStride, int64_t columnStride) {
  if (columns == 1 || columnStride == 1) {
    if (rowStride >= columns) return {true, false, rowStride};
    if (rows == 1) return {true, false, columns};
  }
  // A single row of any stride is none of these: its neighbours would not be, and a row has one way to be computed.
  if (rowStride == 1 && columnStride >= rows) return {true, true, columnStride};
  return {false, false, 0};
}

int32_t alignmentOf(const void* data, int64_t batch, int64_t stride, DType dtype) {
  uint64_t bits = reinterpret_cast<uintptr_t>(data) | kAlignment;
  if (batch > 1) bits |= static_cast<uint64_t>(stride) * dtypeSize(dtype);
  return static_cast<int32_t>(bits & (~bits + 1));
}

bool epilogueTakesBias(const Gemm& g) {
  return g.bias && g.in == g.out && reinterpret_cast<uintptr_t>(g.bias) % kAlignment == 0;
}

// False where cuBLAS cannot take the product.
bool problemOf(const Gemm& g, Problem& p) {
  const Operand a = operandOf(g.N, g.K, g.bCol, g.bRow), b = operandOf(g.M, g.K, g.aRow, g.aCol);
  const Operand c = operandOf(g.M, g.N, g.cRow, 1);
  if (!a.valid || !b.valid || !c.valid || c.transposed) return false;
  const bool batched = g.batch > 1;
  if (batched && (g.cBatch <= 0 || g.aBatch < 0 || g.bBatch < 0 || g.batch > INT32_MAX)) return false;
  // operandOf speaks of unit stride along K: for the first operand that is a transposition, for the second none.
  p = {static_cast<int32_t>(g.in),
       static_cast<int32_t>(g.out),
       !a.transposed,
       b.transposed,
       alignmentOf(g.b, g.batch, g.bBatch, g.in),
       alignmentOf(g.a, g.batch, g.aBatch, g.in),
       alignmentOf(g.c, g.batch, g.cBatch, g.out),
       epilogueTakesBias(g),
       g.N,
       g.M,
       g.K,
       a.ld,
       b.ld,
       c.ld,
       g.batch,
       batched ? g.bBatch : 0,
       batched ? g.aBatch : 0,
       batched ? g.cBatch : 0,
       b.transposed ? 0 : g.planRows};
  return true;
}

// Rounded up to five significant bits: sixteen lengths between two powers of two.
int64_t bucket(int64_t n) {
  if (n < 32) return n;
  const int shift = 63 - __builtin_clzll(static_cast<uint64_t>(n)) - 4;
  return ((n + (int64_t(1) << shift) - 1) >> shift) << shift;
}

// The problem for which the algorithm is chosen: one for all products that differ in rows of A and batch alone, or this
// very one, but for lengths that no operand has along its unit stride (tokens, K of dW = dy^T x). Those are rounded up,
// so that a batch of another length needs no new search.
Problem representative(Problem p) {
  if (p.planColumns) {
    p.columns = p.planColumns;
    p.batch = 1;
    p.batchA = p.batchB = p.batchC = 0;
    return p;
  }
  if (!p.transB) p.columns = bucket(p.columns);
  if (!p.transA && p.transB) p.depth = bucket(p.depth);
  if (p.batchA) p.batchA = p.lda * (p.transA ? p.rows : p.depth);
  if (p.batchB) p.batchB = p.ldb * (p.transB ? p.depth : p.columns);
  if (p.batchC) p.batchC = p.ldc * p.columns;
  return p;
}

// ---- plans
// ------------------------------------------------------------------------------------------------------------

lt::DataType dataType(int32_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::F64:
      return lt::DataType::F64;
    case DType::BF16:
      return lt::DataType::BF16;
    default:
      return lt::DataType::F32;
  }
}

template <class T>
void set(lt::Layout layout, lt::LayoutAttribute attribute, T value) {
  check(cublas().MatrixLayoutSetAttribute(layout, attribute, &value, sizeof(T)), "MatrixLayoutSetAttribute");
}
template <class T>
void set(lt::Desc desc, lt::DescAttribute attribute, T value) {
  check(cublas().MatmulDescSetAttribute(desc, attribute, &value, sizeof(T)), "MatmulDescSetAttribute");
}
template <class T>
void set(lt::Preference preference, lt::PreferenceAttribute attribute, T value) {
  check(cublas().MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(T)),
        "MatmulPreferenceSetAttribute");
}

lt::Layout makeLayout(int32_t dtype, int64_t rows, int64_t columns, int64_t ld, int64_t batch, int64_t stride) {
  lt::Layout layout;
  check(cublas().MatrixLayoutCreate(&layout, dataType(dtype), rows, columns, ld), "MatrixLayoutCreate");
  if (batch > 1) {
    set(layout, lt::LayoutAttribute::BatchCount, static_cast<int32_t>(batch));
    set(layout, lt::LayoutAttribute::BatchStride, stride);
  }
  return layout;
}

// cuBLAS's description of a problem.
struct Descriptors {
  lt::Desc desc = nullptr;
  lt::Layout a = nullptr, b = nullptr, c = nullptr;

  Descriptors() = default;
  // The heuristics want to see a bias's address, too.
  Descriptors(const Problem& p, const void* bias);
  Descriptors(Descriptors&& o) noexcept : desc(o.desc), a(o.a), b(o.b), c(o.c) {
    o.desc = nullptr;
    o.a = o.b = o.c = nullptr;
  }
  Descriptors& operator=(Descriptors&&) = delete;
  ~Descriptors() {
    for (lt::Layout layout : {a, b, c})
      if (layout) cublas().MatrixLayoutDestroy(layout);
    if (desc) cublas().MatmulDescDestroy(desc);
  }
};

Descriptors::Descriptors(const Problem& p, const void* bias) {
  const bool isDouble = static_cast<DType>(p.in) == DType::F64;
  check(cublas().MatmulDescCreate(&desc, isDouble ? lt::ComputeType::F64 : lt::ComputeType::F32,
                                  isDouble ? lt::DataType::F64 : lt::DataType::F32),
        "MatmulDescCreate");
  set(desc, lt::DescAttribute::TransA, p.transA ? lt::Operation::Transpose : lt::Operation::None);
  set(desc, lt::DescAttribute::TransB, p.transB ? lt::Operation::Transpose : lt::Operation::None);
  if (p.bias) {
    set(desc, lt::DescAttribute::Epilogue, lt::Epilogue::Bias);
    set(desc, lt::DescAttribute::BiasPointer, bias);
  }
  a = p.transA ? makeLayout(p.in, p.depth, p.rows, p.lda, p.batch, p.batchA)
               : makeLayout(p.in, p.rows, p.depth, p.lda, p.batch, p.batchA);
  b = p.transB ? makeLayout(p.in, p.columns, p.depth, p.ldb, p.batch, p.batchB)
               : makeLayout(p.in, p.depth, p.columns, p.ldb, p.batch, p.batchB);
  c = makeLayout(p.out, p.rows, p.columns, p.ldc, p.batch, p.batchC);
}

struct Choice {
  bool found = false;
  lt::Algorithm algorithm{};
};

struct Plan {
  Descriptors descriptors;
  Choice choice;
};

// What products remember of one stream. Used by the thread that enqueues on it.
class Products {
 public:
  Products() = default;
  ~Products();
  Products(const Products&) = delete;

  void prepare(const Call& call);
  const Plan& planFor(const Problem& problem, const void* bias);
  void run(const Plan& plan, const Gemm& g, cudaStream_t stream);

 private:
  Choice search(const Problem& problem, const Descriptors& descriptors);
  const Choice& remembered(const Problem& problem, const void* bias);
  bool fits(const Descriptors& descriptors, const Choice& choice);
  Choice choose(const Problem& problem, const Descriptors& descriptors, const void* bias);

  lt::Handle handle_ = nullptr;
  lt::Preference preference_ = nullptr;
  void* workspace_ = nullptr;
  std::unordered_map<Problem, Choice, ProblemHash> choices_;
  std::unordered_map<Problem, Plan, ProblemHash> plans_;
};

void Products::prepare(const Call& call) {
  check(cublas().Create(&handle_), "Create");
  workspace_ = acquire(call, kGemmWorkspaceBytes, "workspace of matrix products");
  check(cublas().MatmulPreferenceCreate(&preference_), "MatmulPreferenceCreate");
  set(preference_, lt::PreferenceAttribute::MaxWorkspaceBytes, uint64_t(kGemmWorkspaceBytes));
}

Products::~Products() {
  if (preference_) cublas().MatmulPreferenceDestroy(preference_);
  if (handle_) cublas().Destroy(handle_);
  cudaFree(workspace_);
}

// The first that cuBLAS's heuristics recommend and that runs.
Choice Products::search(const Problem& p, const Descriptors& d) {
  set(preference_, lt::PreferenceAttribute::ReductionSchemeMask,
      p.planColumns ? lt::ReductionScheme::None : lt::ReductionScheme::ComputeType);
  set(preference_, lt::PreferenceAttribute::MinAlignmentA, static_cast<uint32_t>(p.alignA));
  set(preference_, lt::PreferenceAttribute::MinAlignmentB, static_cast<uint32_t>(p.alignB));
  set(preference_, lt::PreferenceAttribute::MinAlignmentC, static_cast<uint32_t>(p.alignC));
  set(preference_, lt::PreferenceAttribute::MinAlignmentD, static_cast<uint32_t>(p.alignC));
  constexpr int kRequested = 4;
  lt::HeuristicResult results[kRequested];
  int found = 0;
  const lt::Status status =
      cublas().MatmulAlgoGetHeuristic(handle_, d.desc, d.a, d.b, d.c, d.c, preference_, kRequested, results, &found);
  if (status == lt::Status::NotSupported) return {};
  check(status, "MatmulAlgoGetHeuristic");
  for (int i = 0; i < found; i++)
    if (results[i].state == lt::Status::Success) return {true, results[i].algorithm};
  return {};
}

const Choice& Products::remembered(const Problem& problem, const void* bias) {
  const auto at = choices_.find(problem);
  if (at != choices_.end()) return at->second;
  return choices_.emplace(problem, search(problem, Descriptors(problem, bias))).first->second;
}

bool Products::fits(const Descriptors& d, const Choice& choice) {
  lt::HeuristicResult result{};
  return choice.found &&
         cublas().MatmulAlgoCheck(handle_, d.desc, d.a, d.b, d.c, d.c, &choice.algorithm, &result) ==
             lt::Status::Success &&
         result.workspaceBytes <= kGemmWorkspaceBytes;
}

// The representative's algorithm; where it does not take this very shape, one of the shape's own.
Choice Products::choose(const Problem& problem, const Descriptors& descriptors, const void* bias) {
  const Choice& shared = remembered(representative(problem), bias);
  if (fits(descriptors, shared)) return shared;
  const Choice own = search(problem, descriptors);
  if (own.found && problem.planColumns) unplanned++;
  return own;
}

const Plan& Products::planFor(const Problem& problem, const void* bias) {
  const auto at = plans_.find(problem);
  if (at != plans_.end()) return at->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  Descriptors descriptors(problem, bias);
  const Choice choice = choose(problem, descriptors, bias);
  return plans_.emplace(problem, Plan{std::move(descriptors), choice}).first->second;
}

void Products::run(const Plan& plan, const Gemm& g, cudaStream_t stream) {
  const Descriptors& d = plan.descriptors;
  const double scalars[2] = {g.alpha, g.accumulate ? 1.0 : 0.0};
  const float narrow[2] = {static_cast<float>(scalars[0]), static_cast<float>(scalars[1])};
  const bool isDouble = g.in == DType::F64;
  const void* alpha = isDouble ? static_cast<const void*>(&scalars[0]) : &narrow[0];
  const void* beta = isDouble ? static_cast<const void*>(&scalars[1]) : &narrow[1];
  if (g.bias) set(d.desc, lt::DescAttribute::BiasPointer, g.bias);
  check(cublas().Matmul(handle_, d.desc, alpha, g.b, d.a, g.a, d.b, beta, g.c, d.c, g.c, d.c, &plan.choice.algorithm,
                        workspace_, kGemmWorkspaceBytes, stream),
        "Matmul");
}

// ---- streams
// ----------------------------------------------------------------------------------------------------------

struct Registry {
  std::mutex mutex;
  std::unordered_map<cudaStream_t, std::unique_ptr<Products>> products;
};
// Never destroyed: streams of other threads may outlive static objects.
Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

Products& productsOf(const Call& call) {
  const cudaStream_t stream = context(call).stream;
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto at = all.products.find(stream);
  if (at != all.products.end()) return *at->second;
  auto made = std::make_unique<Products>();
  made->prepare(call);
  return *all.products.emplace(stream, std::move(made)).first->second;
}

void general(const Call& call, const Gemm& g) {
  BatchAxes batch;
  if (g.batch > 1) {
    batch.axes = 1;
    batch.count = batch.size[0] = g.batch;
    batch.a[0] = g.aBatch;
    batch.b[0] = g.bBatch;
    batch.c[0] = g.cBatch;
  }
  gemmGeneral(call, g, batch);
}

// Where the epilogue does not take the bias: the bias is written first and the product added to it, which rounds once
// as the epilogue does.
void biasFirst(const Call& call, const Gemm& g) {
  gemmBias(call, g);
  Gemm rest = g;
  rest.bias = nullptr;
  rest.accumulate = true;
  gemm(call, rest);
}

}  // namespace

uint64_t unplannedProducts() { return unplanned.load(std::memory_order_relaxed); }

void releaseGemm(cudaStream_t stream) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.products.erase(stream);
}

void gemm(const Call& call, const Gemm& g) {
  if (g.M == 0 || g.N == 0 || g.batch == 0) return;
  Problem problem;
  if (g.K == 0 || !problemOf(g, problem)) return general(call, g);
  if (g.bias && !problem.bias) return biasFirst(call, g);
  Products& products = productsOf(call);
  const Plan& plan = products.planFor(problem, g.bias);
  if (plan.choice.found) return products.run(plan, g, context(call).stream);
  g.bias ? biasFirst(call, g) : general(call, g);
}

}  // namespace kg::cuda

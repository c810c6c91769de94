// A stand-in for cuBLASLt on the SIMT layer: a shared library with the real C symbols that keelgrad resolves, opened
// through KEELGRAD_CUBLAS like the real one. It takes what the real library takes (column-major layouts, leading
// dimensions, one batch stride, the bias epilogue) and refuses what that refuses, with its status codes; it works on
// the stream that it is given, and does not read C where beta is 0. bfloat16 is summed in float32 and rounded once.
//
// An algorithm remembers the alignment that it was searched for, and does not run on less: a plan used beyond the
// conditions under which it was made is an error here, not a crash there. As the real heuristics, these recommend
// another algorithm for another shape, and its order of summation differs; KEELGRAD_STANDIN_STRICT=1 refuses one for
// more columns of D than it was searched for.
//
// The first of the results is refused where D has an odd number of columns: it must not run. Nor may one for more than
// kGreedyRows rows of D in a product of more columns than it was searched for: AlgoCheck says that it would need more
// workspace than there is. Every product writes NaN into the workspace that it is given, to its last byte.
#include "cuda/cublas.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda_runtime_api.h"
#include "product.h"
#include "runtime/dtype.h"
#include "simt/runtime.h"

namespace kg::cuda::lt {

struct HandleOpaque {
  int unused;
};
struct LayoutOpaque {
  DataType type;
  int64_t rows, columns, ld;
  int32_t batch;
  int64_t stride;
};
struct DescOpaque {
  ComputeType compute;
  DataType scale;
  Operation transA, transB;
  lt::Epilogue epilogue;
  const void* bias;
};
struct PreferenceOpaque {
  uint64_t workspaceBytes;
  uint32_t reductionSchemes;
  uint32_t alignment[4];  // of A, B, C, D
};

namespace {

constexpr uint64_t kMagic = 0x6b65656c67656d6d;  // marks an algorithm of this library

// What an Algorithm's words hold.
struct Algorithm_ {
  uint64_t magic;
  DataType in, out, scale;
  Operation transA, transB;
  Epilogue epilogue;
  uint32_t alignment[4];
  uint32_t depth;  // of a block of k
  uint32_t columns;
  uint32_t refused;  // was a result without success: not to be run
};
static_assert(sizeof(Algorithm_) <= sizeof(Algorithm), "fits into the real structure");

// One call, with everything that the stream's work needs.
struct Product {
  DescOpaque desc;
  LayoutOpaque a, b, c, d;
  double alpha, beta;
  const void *A, *B, *C;
  void* D;
  int depth;
  void* workspace;
  size_t workspaceBytes;
};

constexpr int64_t kGreedyRows = 96;

size_t sizeOf(DataType type) { return type == DataType::F64 ? 8 : type == DataType::F32 ? 4 : 2; }

bool knownType(DataType type) { return type == DataType::F32 || type == DataType::F64 || type == DataType::BF16; }

bool soundLayout(const LayoutOpaque* x) {
  return x && x->rows > 0 && x->columns > 0 && x->ld >= x->rows && x->batch > 0;
}

// Shapes, types and batches that fit together.
Status checkProblem(const DescOpaque* desc, const LayoutOpaque* a, const LayoutOpaque* b, const LayoutOpaque* c,
                    const LayoutOpaque* d) {
  if (!desc || !soundLayout(a) || !soundLayout(b) || !soundLayout(c) || !soundLayout(d)) return Status::InvalidValue;
  const bool ta = desc->transA == Operation::Transpose, tb = desc->transB == Operation::Transpose;
  const int64_t m = ta ? a->columns : a->rows, k = ta ? a->rows : a->columns;
  const int64_t n = tb ? b->rows : b->columns, k2 = tb ? b->columns : b->rows;
  if (k != k2 || d->rows != m || d->columns != n || c->rows != m || c->columns != n) return Status::InvalidValue;
  if (a->batch != d->batch || b->batch != d->batch || c->batch != d->batch) return Status::InvalidValue;
  if (d->batch > 1 && d->stride == 0) return Status::InvalidValue;
  if (a->type != b->type || c->type != d->type) return Status::NotSupported;
  const bool isDouble = a->type == DataType::F64;
  if (desc->compute != (isDouble ? ComputeType::F64 : ComputeType::F32)) return Status::NotSupported;
  if (desc->scale != (isDouble ? DataType::F64 : DataType::F32)) return Status::NotSupported;
  const bool widens = a->type == DataType::BF16 && d->type == DataType::F32;
  if (d->type != a->type && !widens) return Status::NotSupported;
  const bool bias = desc->epilogue == Epilogue::Bias;
  if (bias && !desc->bias) return Status::InvalidValue;  // the real one may look at where it lies
  // The real library has no bias epilogue in float64 on every device; the engine must do without.
  return bias && (widens || isDouble) ? Status::NotSupported : Status::Success;
}

// Of a product with so many columns and batches, as a heuristic for the fastest might have it.
uint32_t depthFor(int64_t columns, int32_t batch) {
  const uint32_t depth = columns < 4 ? 2 : columns < 32 ? 8 : columns < 512 ? 24 : 256;
  return batch > 1 ? depth / 2 : depth;
}

bool strict() {
  const char* value = getenv("KEELGRAD_STANDIN_STRICT");
  return value && strcmp(value, "1") == 0;
}

bool aligned(const void* data, const LayoutOpaque& layout, uint32_t alignment) {
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) return false;
  return layout.batch == 1 || layout.stride * sizeOf(layout.type) % alignment == 0;
}

Algorithm_ contentOf(const Algorithm& algorithm) {
  Algorithm_ content;
  memcpy(&content, &algorithm, sizeof content);
  return content;
}

bool matches(const Algorithm_& x, const DescOpaque& desc, const LayoutOpaque& a, const LayoutOpaque& d) {
  return x.magic == kMagic && x.in == a.type && x.out == d.type && x.scale == desc.scale && x.transA == desc.transA &&
         x.transB == desc.transB && x.epilogue == desc.epilogue;
}

// T: of A and B; O: of C and D.
template <class T, class O>
void run(const Product& p) {
  using C = compute_t<T>;
  const bool ta = p.desc.transA == Operation::Transpose, tb = p.desc.transB == Operation::Transpose;
  const int64_t k = ta ? p.a.rows : p.a.columns;
  const T* bias = p.desc.epilogue == Epilogue::Bias ? static_cast<const T*>(p.desc.bias) : nullptr;
  for (int32_t n = 0; n < p.d.batch; n++) {
    const standin::Matrix<T> a{static_cast<const T*>(p.A) + n * p.a.stride, ta ? p.a.ld : 1, ta ? 1 : p.a.ld};
    const standin::Matrix<T> b{static_cast<const T*>(p.B) + n * p.b.stride, tb ? 1 : p.b.ld, tb ? p.b.ld : 1};
    const O* c = static_cast<const O*>(p.C) + n * p.c.stride;
    O* d = static_cast<O*>(p.D) + n * p.d.stride;
    // Rows of the product here are columns of D: their elements lie together.
    standin::multiply<C>(p.d.columns, p.d.rows, k, b, a, p.depth, [&](int64_t j, int64_t i, C sum) {
      C value = static_cast<C>(p.alpha) * sum;
      if (p.beta != 0) value += static_cast<C>(p.beta) * static_cast<C>(c[j * p.c.ld + i]);
      if (bias) value += static_cast<C>(bias[i]);
      d[j * p.d.ld + i] = static_cast<O>(value);
    });
  }
}

// NaN over both ends of the workspace and into each of its pages: all of it would take longer than most products.
void scribble(char* workspace, size_t bytes) {
  constexpr size_t page = 4096;
  for (size_t at = 0; at + page <= bytes; at += page) memset(workspace + at, 0xff, 16);
  const size_t end = bytes < page ? bytes : page;
  memset(workspace, 0xff, end);
  memset(workspace + bytes - end, 0xff, end);
}

void runProduct(void* data) {
  const Product& p = *static_cast<const Product*>(data);
  if (p.workspace) scribble(static_cast<char*>(p.workspace), p.workspaceBytes);
  if (p.a.type == DataType::F64) return run<double, double>(p);
  if (p.a.type == DataType::F32) return run<float, float>(p);
  p.d.type == DataType::F32 ? run<bf16, float>(p) : run<bf16, bf16>(p);
}

// A captured stream runs its work as often as its graph is launched; otherwise once.
void runOnce(void* data) { runProduct(std::unique_ptr<Product>(static_cast<Product*>(data)).get()); }

double scalar(const void* at, DataType type) {
  return type == DataType::F64 ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}

template <class T, class F>
Status assign(F& field, const void* value, size_t bytes) {
  if (!value || bytes != sizeof(T)) return Status::InvalidValue;
  T read;
  memcpy(&read, value, bytes);
  field = static_cast<F>(read);
  return Status::Success;
}

}  // namespace
}  // namespace kg::cuda::lt

using namespace kg::cuda;
using lt::Status;

#define KG_STANDIN extern "C" __attribute__((visibility("default")))

KG_STANDIN size_t cublasLtGetVersion(void) { return 130000; }

KG_STANDIN const char* cublasLtGetStatusString(Status status) {
  switch (status) {
    case Status::Success:
      return "success";
    case Status::InvalidValue:
      return "an unsupported value or parameter was passed to the function";
    case Status::ArchMismatch:
      return "the function requires a feature absent from the current GPU architecture";
    case Status::ExecutionFailed:
      return "the GPU program failed to execute";
    case Status::NotSupported:
      return "the functionality requested is not supported";
  }
  return "unknown status";
}

KG_STANDIN Status cublasLtCreate(lt::Handle* handle) {
  *handle = new lt::HandleOpaque{};
  return Status::Success;
}
KG_STANDIN Status cublasLtDestroy(lt::Handle handle) {
  delete handle;
  return Status::Success;
}

KG_STANDIN Status cublasLtMatrixLayoutCreate(lt::Layout* layout, lt::DataType type, uint64_t rows, uint64_t columns,
                                             int64_t ld) {
  if (!layout || !lt::knownType(type)) return Status::InvalidValue;
  *layout = new lt::LayoutOpaque{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), ld, 1, 0};
  return Status::Success;
}
KG_STANDIN Status cublasLtMatrixLayoutDestroy(lt::Layout layout) {
  delete layout;
  return Status::Success;
}
KG_STANDIN Status cublasLtMatrixLayoutSetAttribute(lt::Layout layout, lt::LayoutAttribute attribute, const void* value,
                                                   size_t bytes) {
  switch (attribute) {
    case lt::LayoutAttribute::BatchCount:
      return lt::assign<int32_t>(layout->batch, value, bytes);
    case lt::LayoutAttribute::BatchStride:
      return lt::assign<int64_t>(layout->stride, value, bytes);
  }
  return Status::InvalidValue;
}

KG_STANDIN Status cublasLtMatmulDescCreate(lt::Desc* desc, lt::ComputeType compute, lt::DataType scale) {
  *desc = new lt::DescOpaque{compute, scale, lt::Operation::None, lt::Operation::None, lt::Epilogue::Default, nullptr};
  return Status::Success;
}
KG_STANDIN Status cublasLtMatmulDescDestroy(lt::Desc desc) {
  delete desc;
  return Status::Success;
}
KG_STANDIN Status cublasLtMatmulDescSetAttribute(lt::Desc desc, lt::DescAttribute attribute, const void* value,
                                                 size_t bytes) {
  switch (attribute) {
    case lt::DescAttribute::TransA:
      return lt::assign<int32_t>(desc->transA, value, bytes);
    case lt::DescAttribute::TransB:
      return lt::assign<int32_t>(desc->transB, value, bytes);
    case lt::DescAttribute::Epilogue:
      return lt::assign<uint32_t>(desc->epilogue, value, bytes);
    case lt::DescAttribute::BiasPointer:
      return lt::assign<const void*>(desc->bias, value, bytes);
  }
  return Status::InvalidValue;
}

KG_STANDIN Status cublasLtMatmulPreferenceCreate(lt::Preference* preference) {
  *preference = new lt::PreferenceOpaque{0, 7, {256, 256, 256, 256}};
  return Status::Success;
}
KG_STANDIN Status cublasLtMatmulPreferenceDestroy(lt::Preference preference) {
  delete preference;
  return Status::Success;
}
KG_STANDIN Status cublasLtMatmulPreferenceSetAttribute(lt::Preference preference, lt::PreferenceAttribute attribute,
                                                       const void* value, size_t bytes) {
  using Attribute = lt::PreferenceAttribute;
  switch (attribute) {
    case Attribute::MaxWorkspaceBytes:
      return lt::assign<uint64_t>(preference->workspaceBytes, value, bytes);
    case Attribute::ReductionSchemeMask:
      return lt::assign<uint32_t>(preference->reductionSchemes, value, bytes);
    case Attribute::MinAlignmentA:
    case Attribute::MinAlignmentB:
    case Attribute::MinAlignmentC:
    case Attribute::MinAlignmentD:
      return lt::assign<uint32_t>(
          preference->alignment[static_cast<int>(attribute) - static_cast<int>(Attribute::MinAlignmentA)], value,
          bytes);
  }
  return Status::InvalidValue;
}

KG_STANDIN Status cublasLtMatmulAlgoGetHeuristic(lt::Handle handle, lt::Desc desc, lt::Layout a, lt::Layout b,
                                                 lt::Layout c, lt::Layout d, lt::Preference preference, int requested,
                                                 lt::HeuristicResult* results, int* found) {
  if (!handle || !preference || requested < 1 || !results || !found) return Status::InvalidValue;
  *found = 0;
  const Status status = lt::checkProblem(desc, a, b, c, d);
  if (status != Status::Success) return status;
  lt::Algorithm_ content{lt::kMagic,
                         a->type,
                         d->type,
                         desc->scale,
                         desc->transA,
                         desc->transB,
                         desc->epilogue,
                         {},
                         lt::depthFor(d->columns, d->batch),
                         static_cast<uint32_t>(d->columns),
                         0};
  memcpy(content.alignment, preference->alignment, sizeof content.alignment);
  for (; *found < requested && *found <= d->columns % 2; ++*found) {
    lt::HeuristicResult& result = results[*found];
    content.refused = *found < d->columns % 2;
    result = {};
    memcpy(&result.algorithm, &content, sizeof content);
    result.workspaceBytes = preference->workspaceBytes;
    result.state = content.refused ? Status::NotSupported : Status::Success;
  }
  return Status::Success;
}

KG_STANDIN Status cublasLtMatmulAlgoCheck(lt::Handle handle, lt::Desc desc, lt::Layout a, lt::Layout b, lt::Layout c,
                                          lt::Layout d, const lt::Algorithm* algorithm, lt::HeuristicResult* result) {
  if (!handle || !algorithm || !result) return Status::InvalidValue;
  const Status status = lt::checkProblem(desc, a, b, c, d);
  if (status != Status::Success) return status;
  const lt::Algorithm_ content = lt::contentOf(*algorithm);
  if (!lt::matches(content, *desc, *a, *d)) return Status::InvalidValue;
  if (lt::strict() && d->columns > content.columns) return Status::NotSupported;
  const bool greedy = d->rows > lt::kGreedyRows && d->columns > content.columns;
  result->workspaceBytes = greedy ? SIZE_MAX : 0;
  result->state = Status::Success;
  return Status::Success;
}

KG_STANDIN Status cublasLtMatmul(lt::Handle handle, lt::Desc desc, const void* alpha, const void* A, lt::Layout a,
                                 const void* B, lt::Layout b, const void* beta, const void* C, lt::Layout c, void* D,
                                 lt::Layout d, const lt::Algorithm* algorithm, void* workspace, size_t workspaceBytes,
                                 lt::Stream stream) {
  if (!handle || !alpha || !beta || !A || !B || !C || !D || (workspaceBytes && !workspace)) return Status::InvalidValue;
  const Status status = lt::checkProblem(desc, a, b, c, d);
  if (status != Status::Success) return status;
  int depth = standin::kMostDepth;
  if (algorithm) {
    const lt::Algorithm_ content = lt::contentOf(*algorithm);
    depth = static_cast<int>(content.depth);
    if (!lt::matches(content, *desc, *a, *d) || content.refused) return Status::InvalidValue;
    if (d->rows > lt::kGreedyRows && d->columns > content.columns) return Status::InvalidValue;
    const bool sound = lt::aligned(A, *a, content.alignment[0]) && lt::aligned(B, *b, content.alignment[1]) &&
                       lt::aligned(C, *c, content.alignment[2]) && lt::aligned(D, *d, content.alignment[3]);
    if (!sound) return Status::InvalidValue;
  }
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  const bool once = capture == cudaStreamCaptureStatusNone;
  auto* product = new lt::Product{*desc,
                                  *a,
                                  *b,
                                  *c,
                                  *d,
                                  lt::scalar(alpha, desc->scale),
                                  lt::scalar(beta, desc->scale),
                                  A,
                                  B,
                                  C,
                                  D,
                                  depth,
                                  workspace,
                                  workspaceBytes};
  simtEnqueue(stream, once ? lt::runOnce : lt::runProduct, product, "cublasLtMatmul");
  return Status::Success;
}

// Every symbol that the engine resolves is here, with its signature.
#define KG_STANDIN_CHECK(result, name, parameters) \
  static_assert(std::is_same_v<decltype(&cublasLt##name), result(*) parameters>, #name);
KG_CUBLASLT_SYMBOLS(KG_STANDIN_CHECK)

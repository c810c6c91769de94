// cuBLASLt as this project declares it: the few prototypes and enumerators in use, with the library's own values, and
// where the library is found at run time. No header of cuBLAS is needed; test/native/cublas-prototypes.test.ts compares
// this file with the real ones. Never links cuBLAS, never asks the driver for anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace kg::cuda {

// Whether matrix products can run, and if not, why not and what to do about it.
struct CublasStatus {
  bool available;
  std::string reason, remedy;
  std::string path;  // of the library that was loaded
  int version;       // as cublasLtGetVersion reports it: 130002 is 13.0.2
};
// Looks for the library at the first call: KEELGRAD_CUBLAS (a folder or a file, and nothing else where it is set), the
// bare soname (13, then 12), CUDA_HOME and CUDA_PATH, and pip's folders nvidia/*/lib.
const CublasStatus& cublasStatus();

namespace lt {

enum class Status : int32_t {
  Success = 0,
  InvalidValue = 7,
  ArchMismatch = 8,
  ExecutionFailed = 13,
  NotSupported = 15
};
enum class ComputeType : int32_t { F32 = 68, F64 = 70 };  // full float32 products: no TF32
enum class DataType : int32_t { F32 = 0, F64 = 1, BF16 = 14 };
enum class Operation : int32_t { None = 0, Transpose = 1 };
enum class Epilogue : uint32_t { Default = 1, Bias = 4 };
// Split-K is taken only where partial sums are kept in the compute type and reduced by a step of their own.
enum class ReductionScheme : uint32_t { None = 0, ComputeType = 2 };
enum class LayoutAttribute : int32_t { BatchCount = 5, BatchStride = 6 };
enum class DescAttribute : int32_t { TransA = 3, TransB = 4, Epilogue = 7, BiasPointer = 8 };
enum class PreferenceAttribute : int32_t {
  MaxWorkspaceBytes = 1,
  ReductionSchemeMask = 3,
  MinAlignmentA = 5,
  MinAlignmentB = 6,
  MinAlignmentC = 7,
  MinAlignmentD = 8,
};

using Handle = struct HandleOpaque*;
using Layout = struct LayoutOpaque*;
using Desc = struct DescOpaque*;
using Preference = struct PreferenceOpaque*;
using Stream = CUstream_st*;

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspaceBytes;
  Status state;
  float waves;
  int reserved[4];
};

}  // namespace lt

// X(result, name, parameters): every symbol that is resolved, cublasLt<name>. All of them, or the library is rejected.
#define KG_CUBLASLT_SYMBOLS(X)                                                                                        \
  X(size_t, GetVersion, (void))                                                                                       \
  X(const char*, GetStatusString, (lt::Status))                                                                       \
  X(lt::Status, Create, (lt::Handle*))                                                                                \
  X(lt::Status, Destroy, (lt::Handle))                                                                                \
  X(lt::Status, MatrixLayoutCreate, (lt::Layout*, lt::DataType, uint64_t rows, uint64_t columns, int64_t ld))         \
  X(lt::Status, MatrixLayoutDestroy, (lt::Layout))                                                                    \
  X(lt::Status, MatrixLayoutSetAttribute, (lt::Layout, lt::LayoutAttribute, const void*, size_t))                     \
  X(lt::Status, MatmulDescCreate, (lt::Desc*, lt::ComputeType, lt::DataType scale))                                   \
  X(lt::Status, MatmulDescDestroy, (lt::Desc))                                                                        \
  X(lt::Status, MatmulDescSetAttribute, (lt::Desc, lt::DescAttribute, const void*, size_t))                           \
  X(lt::Status, MatmulPreferenceCreate, (lt::Preference*))                                                            \
  X(lt::Status, MatmulPreferenceDestroy, (lt::Preference))                                                            \
  X(lt::Status, MatmulPreferenceSetAttribute, (lt::Preference, lt::PreferenceAttribute, const void*, size_t))         \
  X(lt::Status, MatmulAlgoGetHeuristic,                                                                               \
    (lt::Handle, lt::Desc, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d, lt::Preference, int requested,     \
     lt::HeuristicResult*, int* found))                                                                               \
  X(lt::Status, MatmulAlgoCheck,                                                                                      \
    (lt::Handle, lt::Desc, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d, const lt::Algorithm*,              \
     lt::HeuristicResult*))                                                                                           \
  X(lt::Status, Matmul,                                                                                               \
    (lt::Handle, lt::Desc, const void* alpha, const void* a, lt::Layout, const void* b, lt::Layout, const void* beta, \
     const void* c, lt::Layout, void* d, lt::Layout, const lt::Algorithm*, void* workspace, size_t workspaceBytes,    \
     lt::Stream))

// The loaded library: one function pointer a symbol.
struct Cublas {
#define KG_CUBLASLT_MEMBER(result, name, parameters) result(*name) parameters;
  KG_CUBLASLT_SYMBOLS(KG_CUBLASLT_MEMBER)
#undef KG_CUBLASLT_MEMBER
};
// Throws the status's reason and remedy where the library is not available.
const Cublas& cublas();
// Throws "cuBLAS: <error> in <what>".
void check(lt::Status status, const char* what);

}  // namespace kg::cuda

// Compiles only where native/cuda/cublas.h says what NVIDIA's cublasLt.h says: every prototype, enumerator and
// structure in use. Never linked.
#include <cublasLt.h>

#include <type_traits>

#include "cuda/cublas.h"

using namespace kg::cuda;

// Two types that are passed alike: enumerations of one size, pointers to what is alike (any two opaque structures are),
// otherwise one and the same type.
template <class A, class B>
constexpr bool alike() {
  if constexpr (std::is_enum_v<A> || std::is_enum_v<B>) {
    return std::is_enum_v<A> && std::is_enum_v<B> && sizeof(A) == sizeof(B);
  } else if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
    using P = std::remove_pointer_t<A>;
    using Q = std::remove_pointer_t<B>;
    if constexpr (std::is_const_v<P> != std::is_const_v<Q>) return false;
    if constexpr (std::is_class_v<P> && std::is_class_v<Q>) return true;
    return alike<std::remove_cv_t<P>, std::remove_cv_t<Q>>();
  } else {
    return std::is_same_v<A, B>;
  }
}

template <class A, class B>
struct Alike : std::false_type {};
template <class R, class... P, class S, class... Q>
struct Alike<R (*)(P...), S (*)(Q...)> {
  static constexpr bool compare() {
    if constexpr (sizeof...(P) != sizeof...(Q)) {
      return false;
    } else {
      return alike<R, S>() && (alike<P, Q>() && ...);
    }
  }
  static constexpr bool value = compare();
};

#define CHECK_PROTOTYPE(result, name, parameters) \
  static_assert(Alike<decltype(Cublas::name), decltype(&cublasLt##name)>::value, "cublasLt" #name);
KG_CUBLASLT_SYMBOLS(CHECK_PROTOTYPE)

#define CHECK(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), #theirs)
CHECK(lt::Status::Success, CUBLAS_STATUS_SUCCESS);
CHECK(lt::Status::InvalidValue, CUBLAS_STATUS_INVALID_VALUE);
CHECK(lt::Status::ArchMismatch, CUBLAS_STATUS_ARCH_MISMATCH);
CHECK(lt::Status::ExecutionFailed, CUBLAS_STATUS_EXECUTION_FAILED);
CHECK(lt::Status::NotSupported, CUBLAS_STATUS_NOT_SUPPORTED);
CHECK(lt::ComputeType::F32, CUBLAS_COMPUTE_32F);
CHECK(lt::ComputeType::F64, CUBLAS_COMPUTE_64F);
CHECK(lt::DataType::F32, CUDA_R_32F);
CHECK(lt::DataType::F64, CUDA_R_64F);
CHECK(lt::DataType::BF16, CUDA_R_16BF);
CHECK(lt::Operation::None, CUBLAS_OP_N);
CHECK(lt::Operation::Transpose, CUBLAS_OP_T);
CHECK(lt::Epilogue::Default, CUBLASLT_EPILOGUE_DEFAULT);
CHECK(lt::Epilogue::Bias, CUBLASLT_EPILOGUE_BIAS);
CHECK(lt::ReductionScheme::None, CUBLASLT_REDUCTION_SCHEME_NONE);
CHECK(lt::ReductionScheme::ComputeType, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
CHECK(lt::LayoutAttribute::BatchCount, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
CHECK(lt::LayoutAttribute::BatchStride, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
CHECK(lt::DescAttribute::TransA, CUBLASLT_MATMUL_DESC_TRANSA);
CHECK(lt::DescAttribute::TransB, CUBLASLT_MATMUL_DESC_TRANSB);
CHECK(lt::DescAttribute::Epilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
CHECK(lt::DescAttribute::BiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
CHECK(lt::PreferenceAttribute::MaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
CHECK(lt::PreferenceAttribute::ReductionSchemeMask, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
CHECK(lt::PreferenceAttribute::MinAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
CHECK(lt::PreferenceAttribute::MinAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
CHECK(lt::PreferenceAttribute::MinAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
CHECK(lt::PreferenceAttribute::MinAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);

CHECK(sizeof(lt::Algorithm), sizeof(cublasLtMatmulAlgo_t));
CHECK(alignof(lt::Algorithm), alignof(cublasLtMatmulAlgo_t));
CHECK(sizeof(lt::HeuristicResult), sizeof(cublasLtMatmulHeuristicResult_t));
CHECK(offsetof(lt::HeuristicResult, algorithm), offsetof(cublasLtMatmulHeuristicResult_t, algo));
CHECK(offsetof(lt::HeuristicResult, workspaceBytes), offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
CHECK(offsetof(lt::HeuristicResult, state), offsetof(cublasLtMatmulHeuristicResult_t, state));
CHECK(offsetof(lt::HeuristicResult, waves), offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
static_assert(std::is_same_v<lt::Stream, cudaStream_t>, "cudaStream_t");

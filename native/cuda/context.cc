// How host halves of kernels reach their device, and what its error codes and fault slots say in words.
#include "cuda/context.h"

#include <map>
#include <mutex>

#include "cuda/queue.h"
#include "runtime/stream.h"

namespace kg::cuda {

const Context& context(const Call& call) { return static_cast<Queue&>(call.stream->queue()).context(); }

void* acquire(const Call& call, size_t bytes, const char* what) {
  return static_cast<Queue&>(call.stream->queue()).acquire(bytes, what);
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not the next launch's
  fail("CUDA: %s in %s", cudaGetErrorString(status), what);
}

namespace {

constexpr size_t kSharedUnasked = 48 * 1024;  // static and dynamic bytes of a block together

struct SharedLimit {
  size_t fixed = 0;    // bytes of static arrays
  size_t allowed = 0;  // dynamic ones
};

SharedLimit sharedLimitOf(const void* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const size_t fixed = attributes.sharedSizeBytes;
  return {fixed, fixed < kSharedUnasked ? kSharedUnasked - fixed : 0};
}

}  // namespace

void allowShared(const Context& on, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, SharedLimit> limits;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = limits.find({kernel, on.device});
  SharedLimit& limit = at != limits.end()
                           ? at->second
                           : limits.emplace(std::pair(kernel, on.device), sharedLimitOf(kernel)).first->second;
  if (limit.allowed >= bytes) return;
  if (limit.fixed + bytes > static_cast<size_t>(on.sharedMemoryPerBlock))
    fail("expected at most %d bytes of shared memory a block on this GPU, found %zu", on.sharedMemoryPerBlock,
         limit.fixed + bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  limit.allowed = bytes;
}

namespace {

// The argument that holds the kernel's ids, as the CPU kernels name it.
const char* idsOf(int32_t kernel) {
  switch (static_cast<KernelId>(kernel)) {
    case KernelId::rotary:
      return "positions";
    case KernelId::vocabHead:
    case KernelId::vocabHeadBackward:
    case KernelId::vocabHeadSequences:
    case KernelId::vocabHeadTangent:
      return "targetId";
    case KernelId::rmsNormTangent:
      return "rowSequence";
    default:
      return "ids";
  }
}

const char* rowsOf(int32_t kernel) {
  const auto id = static_cast<KernelId>(kernel);
  return id == KernelId::vocabHead || id == KernelId::vocabHeadBackward ? "targetRow" : "rowMap";
}

bool bySequence(int32_t kernel) {
  const auto id = static_cast<KernelId>(kernel);
  return id == KernelId::vocabHeadSequences || id == KernelId::vocabHeadTangent;
}

std::string outOfRange(const char* name, const FaultSlot& slot) {
  return std::string("expected ") + name + "[" + std::to_string(slot.values[1]) + "] in [0, " +
         std::to_string(slot.values[2]) + "), found " + std::to_string(slot.values[0]);
}

}  // namespace

std::string faultText(const FaultSlot& slot) {
  switch (static_cast<FaultKind>(slot.kind)) {
    case FaultKind::IdOutOfRange:
      return outOfRange(idsOf(slot.kernel), slot);
    case FaultKind::RowOutOfRange:
      return outOfRange(rowsOf(slot.kernel), slot);
    case FaultKind::RowMapOutOfRange:
      return outOfRange("rowMap", slot);
    case FaultKind::ProbeOutOfRange:
      return outOfRange(bySequence(slot.kernel) ? "probeIds" : "probes", slot);
    case FaultKind::BadSegments:
      if (bySequence(slot.kernel))
        return "expected sequences that cover the rows in order, each with its probes; found another at sequence " +
               std::to_string(slot.values[0]);
      return "expected segments that cover the rows in order, each with parent -1 or an earlier segment that has no "
             "parent; found another at segment " +
             std::to_string(slot.values[0]);
    case FaultKind::ZeroDivisor:
      return "expected int32 divisors other than 0, found 0; try dividing in float32";
    case FaultKind::NegativeExponent:
      return "expected int32 exponents of at least 0, found " + std::to_string(slot.values[0]) + "; try float32";
    case FaultKind::None:
      break;
  }
  return "unknown fault " + std::to_string(slot.kind);
}

}  // namespace kg::cuda

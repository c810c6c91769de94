// Prints what the loader found as JSON. With the argument `descriptors` also makes every descriptor and sets every
// attribute that the engine sets, with their sizes: the library takes them without a driver, or says InvalidValue.
#include <cstdio>
#include <cstring>

#include "cuda/cublas.h"

using namespace kg::cuda;

namespace {

int failures = 0;

void expect(lt::Status status, const char* what) {
  if (status == lt::Status::Success) return;
  printf("%s: %s\n", what, cublas().GetStatusString(status));
  failures++;
}

template <class T, class Function, class Object, class Attribute>
void set(Function function, Object object, Attribute attribute, T value, const char* what) {
  expect(function(object, attribute, &value, sizeof(T)), what);
  if (function(object, attribute, &value, sizeof(T) + 1) == lt::Status::Success) {
    printf("%s: a value of another size is taken too\n", what);
    failures++;
  }
}

void descriptors() {
  const Cublas& c = cublas();
  lt::Layout layout;
  expect(c.MatrixLayoutCreate(&layout, lt::DataType::BF16, 64, 32, 72), "MatrixLayoutCreate");
  set<int32_t>(c.MatrixLayoutSetAttribute, layout, lt::LayoutAttribute::BatchCount, 3, "BatchCount");
  set<int64_t>(c.MatrixLayoutSetAttribute, layout, lt::LayoutAttribute::BatchStride, 4096, "BatchStride");
  expect(c.MatrixLayoutDestroy(layout), "MatrixLayoutDestroy");
  lt::Desc desc;
  expect(c.MatmulDescCreate(&desc, lt::ComputeType::F32, lt::DataType::F32), "MatmulDescCreate");
  set(c.MatmulDescSetAttribute, desc, lt::DescAttribute::TransA, lt::Operation::Transpose, "TransA");
  set(c.MatmulDescSetAttribute, desc, lt::DescAttribute::TransB, lt::Operation::None, "TransB");
  set(c.MatmulDescSetAttribute, desc, lt::DescAttribute::Epilogue, lt::Epilogue::Bias, "Epilogue");
  set<const void*>(c.MatmulDescSetAttribute, desc, lt::DescAttribute::BiasPointer, &failures, "BiasPointer");
  expect(c.MatmulDescDestroy(desc), "MatmulDescDestroy");
  lt::Preference preference;
  using Attribute = lt::PreferenceAttribute;
  expect(c.MatmulPreferenceCreate(&preference), "MatmulPreferenceCreate");
  set<uint64_t>(c.MatmulPreferenceSetAttribute, preference, Attribute::MaxWorkspaceBytes, 1 << 20, "MaxWorkspaceBytes");
  set(c.MatmulPreferenceSetAttribute, preference, Attribute::ReductionSchemeMask, lt::ReductionScheme::ComputeType,
      "ReductionSchemeMask");
  for (Attribute a :
       {Attribute::MinAlignmentA, Attribute::MinAlignmentB, Attribute::MinAlignmentC, Attribute::MinAlignmentD})
    set<uint32_t>(c.MatmulPreferenceSetAttribute, preference, a, 16, "MinAlignment");
  expect(c.MatmulPreferenceDestroy(preference), "MatmulPreferenceDestroy");
}

}  // namespace

int main(int count, char** arguments) {
  const CublasStatus& s = cublasStatus();
  printf("{\"available\": %s, \"reason\": \"%s\", \"remedy\": \"%s\", \"path\": \"%s\", \"version\": %d}\n",
         s.available ? "true" : "false", s.reason.c_str(), s.remedy.c_str(), s.path.c_str(), s.version);
  if (count > 1 && strcmp(arguments[1], "descriptors") == 0) descriptors();
  return failures ? 1 : 0;
}

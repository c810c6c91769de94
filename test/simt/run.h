// For programs in C++: the engine's device "cuda" over the SIMT layer, without Node. Tensors are uploaded, kernels are
// called by the names and in the argument order of ops/kernels.def, results come back as vectors.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "runtime/device.h"
#include "runtime/error.h"

namespace simt {

template <class T>
constexpr kg::DType dtypeOf() {
  if constexpr (std::is_same_v<T, float>) return kg::DType::F32;
  if constexpr (std::is_same_v<T, double>) return kg::DType::F64;
  if constexpr (std::is_same_v<T, kg::bf16>) return kg::DType::BF16;
  if constexpr (std::is_same_v<T, int32_t>) return kg::DType::I32;
  if constexpr (std::is_same_v<T, uint8_t>) return kg::DType::U8;
}

// A contiguous tensor of the device, or an absent argument. Copies share the memory, which lives as long as the Device.
struct Tensor {
  kg::TensorView view{};
  kg::Storage* storage = nullptr;
};

class Device {
 public:
  explicit Device(const std::string& name = "cuda:0") {
    const std::string folder = std::filesystem::read_symlink("/proc/self/exe").parent_path().string();
    setenv("KEELGRAD_CUBLAS", folder.c_str(), 0);
    setenv("KEELGRAD_DIRECT_ALLOCATION", "1", 0);
    stream_ = kg::makeStream(name);
  }

  template <class T>
  Tensor empty(const std::vector<int64_t>& shape) {
    Tensor t;
    t.view.dtype = dtypeOf<T>();
    t.view.ndim = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int i = t.view.ndim - 1; i >= 0; i--) {
      t.view.shape[i] = shape[static_cast<size_t>(i)];
      t.view.strides[i] = stride;
      stride *= t.view.shape[i];
    }
    t.storage = &stream_->storages().at(stream_->storages().create(bytesOf(t), kg::Tag::Activation));
    t.view.data = t.storage->data;
    return t;
  }

  template <class T>
  Tensor upload(const std::vector<int64_t>& shape, const std::vector<T>& values) {
    Tensor t = empty<T>(shape);
    if (values.size() * sizeof(T) != bytesOf(t)) kg::fail("expected %zu bytes of values", bytesOf(t));
    stream_->upload(t.storage, 0, values.data(), bytesOf(t));
    return t;
  }

  // Enqueues; a fault shows in the next download or synchronize.
  void call(const char* kernel, std::initializer_list<Tensor> tensors, std::initializer_list<double> attributes = {}) {
    std::vector<kg::TensorView> views;
    std::vector<kg::Storage*> owners;
    for (const Tensor& t : tensors) {
      views.push_back(t.view);
      owners.push_back(t.storage);
    }
    stream_->launch(find(kernel), views.data(), owners.data(), static_cast<int>(views.size()),
                    std::vector<double>(attributes).data(), static_cast<int>(attributes.size()));
  }

  template <class T>
  std::vector<T> download(const Tensor& t) {
    std::vector<T> values(bytesOf(t) / sizeof(T));
    if (kg::Fault fault = stream_->read(t.storage, 0, values.data(), bytesOf(t))) throw kg::Error(*fault);
    return values;
  }

  void synchronize() {
    stream_->synchronize();
    if (kg::Fault fault = stream_->takeFault()) throw kg::Error(*fault);
  }

  kg::Stream& stream() { return *stream_; }

 private:
  static size_t bytesOf(const Tensor& t) { return static_cast<size_t>(t.view.numel()) * kg::dtypeSize(t.view.dtype); }

  static kg::KernelId find(const char* name) {
    for (int i = 0; i < kg::kKernelCount; i++)
      if (strcmp(kg::kernelSignatures()[i].name, name) == 0) return static_cast<kg::KernelId>(i);
    kg::fail("expected the name of a kernel, found %s", name);
  }

  std::unique_ptr<kg::Stream> stream_;
};

}  // namespace simt

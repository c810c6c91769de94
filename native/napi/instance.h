// What belongs to one environment of Node: its streams, the command buffer that it shares with JavaScript, and the
// reads that it waits for.
//
// Command buffer, all numbers doubles: kernel id, stream, number of tensors, number of attributes, then a tensor:
// storage handle (-1: absent), dtype, byte offset, ndim, shape..., strides...; then the attributes.
#pragma once

#include <napi.h>

#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "runtime/device.h"
#include "runtime/error.h"

namespace kg::napi {

constexpr size_t kCommandDoubles = 1 << 17;

struct Completion {
  napi_deferred deferred;
  napi_ref target;  // keeps the destination buffer alive
  Fault fault;
};

// One per environment (main thread or worker). Streams are created on first use of their device.
class Instance {
 public:
  explicit Instance(napi_env env) : env_(env) {
    napi_value name;
    napi_create_string_utf8(env, "keelgrad", NAPI_AUTO_LENGTH, &name);
    napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, deliver, &notify_);
    napi_unref_threadsafe_function(env, notify_);
  }

  ~Instance() {
    streams_.clear();  // joins the executors; nothing calls notify_ afterwards
    napi_release_threadsafe_function(notify_, napi_tsfn_abort);
  }

  double* commands() { return commands_.get(); }
  napi_env env() const { return env_; }

  int open(const std::string& device) {
    streams_.push_back(kg::makeStream(device));
    return static_cast<int>(streams_.size()) - 1;
  }

  Stream& stream(double index) {
    if (!(index >= 0) || index >= static_cast<double>(streams_.size())) kg::fail("unknown stream %g", index);
    return *streams_[static_cast<size_t>(index)];
  }

  void synchronizeAll() {
    for (auto& s : streams_) s->synchronize();
  }

  void submit() {
    const double* p = commands_.get();
    const double* end = p + kCommandDoubles;
    auto id = static_cast<int>(p[0]);
    Stream& target = stream(p[1]);
    if (capturing_ && capturing_ != &target) kg::fail("expected kernels on the device of the captured function");
    auto tensors = static_cast<size_t>(p[2]), attributes = static_cast<size_t>(p[3]);
    p += 4;
    if (id < 0 || id >= kg::kKernelCount) kg::fail("unknown kernel %d", id);
    views_.resize(tensors);
    owners_.resize(tensors);
    for (size_t i = 0; i < tensors; i++) {
      if (p + 4 + 2 * kg::kMaxDims > end) kg::fail("a command with %zu tensors is too long", tensors);
      p = decode(target, p, views_[i], owners_[i]);
    }
    if (p + attributes > end) kg::fail("a command with %zu attributes is too long", attributes);
    target.launch(static_cast<kg::KernelId>(id), views_.data(), owners_.data(), static_cast<int>(tensors), p,
                  static_cast<int>(attributes));
  }

  void beginGraph(Stream& on) {
    if (capturing_) kg::fail("expected no capture inside of a captured function");
    on.beginGraph();
    capturing_ = &on;
  }
  Stream& capturing() {
    if (!capturing_) kg::fail("expected a capture to end, found none");
    return *std::exchange(capturing_, nullptr);
  }

  // Resolves `deferred` on the JavaScript thread once the copy has run.
  void download(Stream& from, Storage* storage, size_t offset, void* to, size_t count, napi_value target,
                napi_deferred deferred) {
    napi_ref keep;
    napi_create_reference(env_, target, 1, &keep);
    if (pending_++ == 0) napi_ref_threadsafe_function(env_, notify_);  // Node must not exit under a pending await
    from.download(storage, offset, to, count, [this, deferred, keep](Fault fault) {
      std::lock_guard<std::mutex> lock(mutex_);
      bool first = completed_.empty();
      completed_.push_back({deferred, keep, std::move(fault)});
      if (first) napi_call_threadsafe_function(notify_, nullptr, napi_tsfn_nonblocking);
    });
  }

 private:
  const double* decode(Stream& target, const double* p, TensorView& view, Storage*& owner) {
    view = {};
    owner = nullptr;
    double handle = p[0];
    view.dtype = static_cast<kg::DType>(static_cast<int>(p[1]));
    auto offset = static_cast<int64_t>(p[2]);
    view.ndim = static_cast<int32_t>(p[3]);
    if (view.ndim < 0 || view.ndim > kg::kMaxDims)
      kg::fail("expected at most %d axes, found %d", kg::kMaxDims, view.ndim);
    if (handle < 0) {
      view.dtype = kg::DType::None;
      return p + 4;
    }
    owner = &target.storages().at(handle);
    auto size = static_cast<int64_t>(kg::dtypeSize(view.dtype));
    int64_t last = 0;
    bool empty = false;
    for (int i = 0; i < view.ndim; i++) {
      view.shape[i] = static_cast<int64_t>(p[4 + i]);
      view.strides[i] = static_cast<int64_t>(p[4 + view.ndim + i]);
      if (view.shape[i] < 0 || view.strides[i] < 0) kg::fail("negative shape or stride");
      if (view.shape[i] == 0) empty = true;
      last += (view.shape[i] - 1) * view.strides[i];
    }
    if (offset < 0 || (!empty && offset + (last + 1) * size > static_cast<int64_t>(owner->bytes)))
      kg::fail("a view of %lld bytes at %lld lies outside of its storage of %zu bytes",
               static_cast<long long>((last + 1) * size), static_cast<long long>(offset), owner->bytes);
    view.data = owner->data + offset;
    return p + 4 + 2 * view.ndim;
  }

  static void deliver(napi_env env, napi_value, void* context, void*) {
    if (!env) return;  // the environment has ended, and the instance with it
    auto* self = static_cast<Instance*>(context);
    std::deque<Completion> done;
    {
      std::lock_guard<std::mutex> lock(self->mutex_);
      done.swap(self->completed_);
    }
    for (Completion& c : done) {
      napi_value value;
      if (c.fault) {
        napi_value text;
        napi_create_string_utf8(env, c.fault->c_str(), NAPI_AUTO_LENGTH, &text);
        napi_create_error(env, nullptr, text, &value);
        napi_reject_deferred(env, c.deferred, value);
      } else {
        napi_get_reference_value(env, c.target, &value);
        napi_resolve_deferred(env, c.deferred, value);
      }
      napi_delete_reference(env, c.target);
    }
    self->pending_ -= done.size();
    if (self->pending_ == 0 && !done.empty()) napi_unref_threadsafe_function(env, self->notify_);
  }

  napi_env env_;
  napi_threadsafe_function notify_ = nullptr;
  std::vector<std::unique_ptr<Stream>> streams_;
  Stream* capturing_ = nullptr;
  std::unique_ptr<double[]> commands_{new double[kCommandDoubles]};
  std::vector<TensorView> views_;
  std::vector<Storage*> owners_;
  std::mutex mutex_;
  std::deque<Completion> completed_;  // guarded by mutex_
  size_t pending_ = 0;
};

}  // namespace kg::napi

// The only file that knows Node. Dispatch is generic: JavaScript writes a command (kernel, tensor views, attributes)
// into a shared buffer and calls submit, so this file does not grow with ops.
//
// Command buffer, all numbers doubles: kernel id, stream, number of tensors, number of attributes, then a tensor:
// storage handle (-1: absent), dtype, byte offset, ndim, shape..., strides...; then the attributes.
#include <napi.h>

#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/threads.h"

namespace {

using kg::Fault;
using kg::Storage;
using kg::Stream;
using kg::TensorView;

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

Instance* instanceOf(napi_env env) {
  void* data = nullptr;
  napi_get_instance_data(env, &data);
  return static_cast<Instance*>(data);
}

// What a function of the boundary does; its result goes to JavaScript, nullptr as undefined.
using Body = napi_value (*)(napi_env env, Instance* self, napi_value* args);

// Raw callbacks: a call costs tens of nanoseconds, and every op makes one. A C++ exception becomes a JavaScript error.
template <int N, Body body>
napi_value guarded(napi_env env, napi_callback_info info) {
  napi_value args[N > 0 ? N : 1];
  size_t count = N;
  napi_get_cb_info(env, info, &count, args, nullptr, nullptr);
  try {
    return body(env, instanceOf(env), args);
  } catch (const std::exception& e) {
    napi_throw_error(env, nullptr, e.what());
    return nullptr;
  }
}

double number(napi_env env, napi_value v) {
  double d = 0;
  if (napi_get_value_double(env, v, &d) != napi_ok) kg::fail("expected a number");
  return d;
}

std::string text(napi_env env, napi_value v) {
  size_t length = 0;
  if (napi_get_value_string_utf8(env, v, nullptr, 0, &length) != napi_ok) kg::fail("expected a string");
  std::string s(length, '\0');
  napi_get_value_string_utf8(env, v, s.data(), length + 1, &length);
  return s;
}

napi_value toValue(napi_env env, double d) {
  napi_value v;
  napi_create_double(env, d, &v);
  return v;
}

napi_value numbers(napi_env env, const std::vector<double>& values) {
  Napi::Array out = Napi::Array::New(env);
  for (uint32_t i = 0; i < values.size(); i++) out.Set(i, values[i]);
  return out;
}

struct Bytes {
  void* data;
  size_t count;
};

Bytes bytesOf(napi_env env, napi_value v) {
  napi_typedarray_type type;
  size_t length, offset;
  napi_value buffer;
  Bytes b{};
  if (napi_get_typedarray_info(env, v, &type, &length, &b.data, &buffer, &offset) != napi_ok ||
      type != napi_uint8_array)
    kg::fail("expected a Uint8Array");
  b.count = length;
  return b;
}

void requireRange(const Storage& s, double offset, size_t count) {
  if (!(offset >= 0) || offset + static_cast<double>(count) > static_cast<double>(s.bytes))
    kg::fail("bytes %.0f to %.0f lie outside of a storage of %zu bytes", offset, offset + static_cast<double>(count),
             s.bytes);
}

napi_value openDevice(napi_env env, Instance* self, napi_value* args) {
  return toValue(env, self->open(text(env, args[0])));
}

napi_value createStorage(napi_env env, Instance* self, napi_value* args) {
  auto tag = static_cast<kg::Tag>(static_cast<int>(number(env, args[2])));
  return toValue(env,
                 self->stream(number(env, args[0])).storages().create(static_cast<size_t>(number(env, args[1])), tag));
}

napi_value retainStorage(napi_env env, Instance* self, napi_value* args) {
  self->stream(number(env, args[0])).storages().retain(number(env, args[1]));
  return nullptr;
}

napi_value releaseStorage(napi_env env, Instance* self, napi_value* args) {
  self->stream(number(env, args[0])).storages().release(number(env, args[1]));
  return nullptr;
}

napi_value mapFile(napi_env env, Instance* self, napi_value* args) {
  return toValue(env, self->stream(number(env, args[0])).storages().map(text(env, args[1]).c_str()));
}

napi_value submit(napi_env, Instance* self, napi_value*) {
  self->submit();
  return nullptr;
}

// upload(stream, storage, byteOffset, bytes)
napi_value upload(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  Storage& to = s.storages().at(number(env, args[1]));
  double offset = number(env, args[2]);
  Bytes from = bytesOf(env, args[3]);
  requireRange(to, offset, from.count);
  if (to.readOnly) kg::fail("a mapped file cannot be written");
  s.upload(&to, static_cast<size_t>(offset), from.data, from.count);
  return nullptr;
}

// uploadMapped(stream, storage, byteOffset, file's stream, file's storage, its byteOffset, bytes): no copy on the host
napi_value uploadMapped(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  Storage& to = s.storages().at(number(env, args[1]));
  Storage& file = self->stream(number(env, args[3])).storages().at(number(env, args[4]));
  double offset = number(env, args[2]), from = number(env, args[5]);
  auto count = static_cast<size_t>(number(env, args[6]));
  requireRange(to, offset, count);
  requireRange(file, from, count);
  if (to.readOnly) kg::fail("a mapped file cannot be written");
  if (!file.mapping) kg::fail("expected a mapped file");
  s.uploadMapped(&to, static_cast<size_t>(offset), file.mapping, static_cast<size_t>(from), count);
  return nullptr;
}

// transfer(stream, storage, source's stream, source's storage, its byteOffset): fills the storage from another device
napi_value transfer(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  Storage& to = s.storages().at(number(env, args[1]));
  Stream& source = self->stream(number(env, args[2]));
  Storage& from = source.storages().at(number(env, args[3]));
  double offset = number(env, args[4]);
  requireRange(from, offset, to.bytes);
  if (&s == &source || to.readOnly) kg::fail("expected two devices, and a storage that can be written");
  if (to.bytes > 0) s.transfer(&to, source, &from, static_cast<size_t>(offset));
  return nullptr;
}

// download(stream, storage, byteOffset, target) -> Promise<target>
napi_value download(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  Storage& from = s.storages().at(number(env, args[1]));
  double offset = number(env, args[2]);
  Bytes to = bytesOf(env, args[3]);
  requireRange(from, offset, to.count);
  napi_deferred deferred;
  napi_value promise;
  napi_create_promise(env, &deferred, &promise);
  self->download(s, &from, static_cast<size_t>(offset), to.data, to.count, args[3], deferred);
  return promise;
}

// downloadSync(stream, storage, byteOffset, target): blocks
napi_value downloadSync(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  Storage& from = s.storages().at(number(env, args[1]));
  double offset = number(env, args[2]);
  Bytes to = bytesOf(env, args[3]);
  requireRange(from, offset, to.count);
  if (Fault fault = s.read(&from, static_cast<size_t>(offset), to.data, to.count)) kg::fail("%s", fault->c_str());
  return nullptr;
}

napi_value synchronize(napi_env env, Instance* self, napi_value* args) {
  Stream& s = self->stream(number(env, args[0]));
  s.synchronize();
  if (Fault fault = s.takeFault()) kg::fail("%s", fault->c_str());
  return nullptr;
}

napi_value setSynchronous(napi_env env, Instance* self, napi_value* args) {
  bool on = false;
  napi_get_value_bool(env, args[1], &on);
  self->stream(number(env, args[0])).setSynchronous(on);
  return nullptr;
}

napi_value beginGraph(napi_env env, Instance* self, napi_value* args) {
  self->beginGraph(self->stream(number(env, args[0])));
  return nullptr;
}

// endGraph(keep) -> graph, or undefined
napi_value endGraph(napi_env env, Instance* self, napi_value* args) {
  bool keep = false;
  napi_get_value_bool(env, args[0], &keep);
  Stream& s = self->capturing();
  if (keep) return toValue(env, s.endGraph());
  s.abandonGraph();
  return nullptr;
}

napi_value replayGraph(napi_env env, Instance* self, napi_value* args) {
  self->stream(number(env, args[0])).replay(static_cast<uint32_t>(number(env, args[1])));
  return nullptr;
}

napi_value dropGraph(napi_env env, Instance* self, napi_value* args) {
  self->stream(number(env, args[0])).dropGraph(static_cast<uint32_t>(number(env, args[1])));
  return nullptr;
}

// graphCounts(stream, graph): launches in a run, runs so far, of them as a graph of the device
napi_value graphCounts(napi_env env, Instance* self, napi_value* args) {
  const kg::GraphCounts c = self->stream(number(env, args[0])).graphCounts(static_cast<uint32_t>(number(env, args[1])));
  return numbers(env, {double(c.launches), double(c.runs), double(c.deviceRuns)});
}

// Kernels size scratch by the thread count, so it may not change under one that runs.
napi_value setThreads(napi_env env, Instance* self, napi_value* args) {
  int threads = static_cast<int>(number(env, args[0]));
  self->synchronizeAll();
  kg::setThreadCount(threads);
  return nullptr;
}

napi_value getThreads(napi_env env, Instance*, napi_value*) { return toValue(env, kg::threadCount()); }

napi_value trim(napi_env env, Instance* self, napi_value* args) {
  return toValue(env, static_cast<double>(self->stream(number(env, args[0])).storages().trim()));
}

napi_value resetPeak(napi_env env, Instance* self, napi_value* args) {
  self->stream(number(env, args[0])).storages().resetPeak();
  return nullptr;
}

// memory(stream): storages, allocated, peak, reserved, scratch, then bytes by tag
napi_value memory(napi_env env, Instance* self, napi_value* args) {
  auto& table = self->stream(number(env, args[0])).storages();
  const kg::MemoryCounters& c = table.counters();
  std::vector<double> values{double(c.storages), double(c.allocated), double(c.peak), double(table.reserved()),
                             double(table.scratch())};
  values.insert(values.end(), std::begin(c.byTag), std::end(c.byTag));
  return numbers(env, values);
}

// adjustExternal(bytes): tells V8 about memory that its objects hold on to
napi_value adjustExternal(napi_env env, Instance*, napi_value* args) {
  int64_t now;
  napi_adjust_external_memory(env, static_cast<int64_t>(number(env, args[0])), &now);
  return nullptr;
}

Napi::Object describeCuda(Napi::Env env) {
  const kg::CudaStatus cuda = kg::cudaStatus();
  Napi::Object out = Napi::Object::New(env);
  out.Set("built", kg::hasCuda());
  out.Set("available", cuda.available);
  if (!cuda.available) {
    out.Set("reason", cuda.reason);
    out.Set("remedy", cuda.remedy);
  }
  out.Set("driver", cuda.driver);
  out.Set("runtime", cuda.runtime);
  out.Set("unplannedProducts", double(cuda.unplannedProducts));
  if (!cuda.cublas.empty()) out.Set("cublas", cuda.cublas);
  Napi::Array devices = Napi::Array::New(env);
  for (const kg::CudaDevice& d : cuda.devices) {
    Napi::Object row = Napi::Object::New(env);
    row.Set("name", d.name);
    row.Set("memory", double(d.memory));
    row.Set("capability", d.capability);
    if (!d.reason.empty()) row.Set("reason", d.reason);
    devices.Set(devices.Length(), row);
  }
  out.Set("devices", devices);
  return out;
}

napi_value describe(napi_env env, Instance*, napi_value*) {
  Napi::Env e(env);
  Napi::Object out = Napi::Object::New(e);
  out.Set("isa", kg::cpuKernels().name);
  Napi::Array features = Napi::Array::New(e);
  for (const auto& f : kg::cpuFeatures()) features.Set(features.Length(), f);
  out.Set("cpuFeatures", features);
  out.Set("cuda", describeCuda(e));
  return out;
}

void define(napi_env env, napi_value exports, const char* name, napi_callback f) {
  napi_value value;
  napi_create_function(env, name, NAPI_AUTO_LENGTH, f, nullptr, &value);
  napi_set_named_property(env, exports, name, value);
}

Napi::Array kernelList(Napi::Env env) {
  Napi::Array list = Napi::Array::New(env, kg::kKernelCount);
  for (uint32_t i = 0; i < kg::kKernelCount; i++) {
    const kg::KernelSignature& s = kg::kernelSignatures()[i];
    Napi::Object row = Napi::Object::New(env);
    row.Set("name", s.name);
    row.Set("outputs", s.outputs);
    row.Set("inputs", s.inputs);
    row.Set("attributes", s.attributes);
    list.Set(i, row);
  }
  return list;
}

}  // namespace

NAPI_MODULE_INIT() {
  auto* instance = new Instance(env);
  napi_set_instance_data(env, instance, nullptr, nullptr);
  // A cleanup hook and not the finalizer of the instance data: it runs while the environment can still release things.
  napi_add_env_cleanup_hook(env, [](void* data) { delete static_cast<Instance*>(data); }, instance);

#define KG_DEFINE(f, arity) define(env, exports, #f, guarded<arity, f>)
  KG_DEFINE(openDevice, 1);
  KG_DEFINE(createStorage, 3);
  KG_DEFINE(retainStorage, 2);
  KG_DEFINE(releaseStorage, 2);
  KG_DEFINE(mapFile, 2);
  KG_DEFINE(submit, 0);
  KG_DEFINE(upload, 4);
  KG_DEFINE(uploadMapped, 7);
  KG_DEFINE(transfer, 5);
  KG_DEFINE(download, 4);
  KG_DEFINE(downloadSync, 4);
  KG_DEFINE(synchronize, 1);
  KG_DEFINE(setSynchronous, 2);
  KG_DEFINE(beginGraph, 1);
  KG_DEFINE(endGraph, 1);
  KG_DEFINE(replayGraph, 2);
  KG_DEFINE(dropGraph, 2);
  KG_DEFINE(graphCounts, 2);
  KG_DEFINE(setThreads, 1);
  KG_DEFINE(getThreads, 0);
  KG_DEFINE(trim, 1);
  KG_DEFINE(resetPeak, 1);
  KG_DEFINE(memory, 1);
  KG_DEFINE(adjustExternal, 1);
  KG_DEFINE(describe, 0);
#undef KG_DEFINE

  napi_value buffer, view;
  if (napi_create_external_arraybuffer(env, instance->commands(), kCommandDoubles * sizeof(double), nullptr, nullptr,
                                       &buffer) == napi_ok) {
    napi_create_typedarray(env, napi_float64_array, kCommandDoubles, buffer, 0, &view);
    napi_set_named_property(env, exports, "commands", view);
  }
  Napi::Env e(env);
  napi_set_named_property(env, exports, "kernels", kernelList(e));
  return exports;
}

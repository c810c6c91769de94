// With instance.h, the only file that knows Node. Dispatch is generic: JavaScript writes a command (kernel, tensor
// views, attributes) into a shared buffer and calls submit, so this file does not grow with ops.
#include <iterator>
#include <vector>

#include "napi/instance.h"
#include "runtime/threads.h"

namespace {

using kg::Fault;
using kg::Storage;
using kg::Stream;
using kg::napi::Instance;
using kg::napi::kCommandDoubles;

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

// Asks of the device cuda what a recorded run asked (recorder.cjs), without Node: for the sanitizers. Answers
// are compared with the recorded ones; an instrumented library may contract other products into fused ones, so a few
// last bits can differ. `simt-replay <trace> [regular expression of labels]`; labels go to stderr as they come, so that
// a sanitizer's report stands under the case it belongs to.
#include <cstdio>
#include <fstream>
#include <map>
#include <regex>

#include "ops/backend.h"
#include "runtime/device.h"
#include "runtime/error.h"

namespace {

enum class Kind { Label, Create, Retain, Release, Submit, Upload, Download };

struct Record {
  Kind kind;
  std::vector<double> numbers;
  std::string bytes;
};

bool read(std::ifstream& file, Record& record) {
  double head[3];
  if (!file.read(reinterpret_cast<char*>(head), sizeof head)) return false;
  record.kind = static_cast<Kind>(static_cast<int>(head[0]));
  record.numbers.resize(static_cast<size_t>(head[1]));
  record.bytes.resize(static_cast<size_t>(head[2]));
  file.read(reinterpret_cast<char*>(record.numbers.data()),
            static_cast<std::streamsize>(record.numbers.size() * sizeof(double)));
  file.read(record.bytes.data(), static_cast<std::streamsize>(record.bytes.size()));
  return true;
}

class Replay {
 public:
  explicit Replay(const char* wanted) : wanted_(wanted), stream_(kg::makeStream("cuda:0")) {}

  void play(const Record& r) {
    const auto& n = r.numbers;
    switch (r.kind) {
      case Kind::Label:
        label(r.bytes);
        break;
      case Kind::Create:
        handles_[n[0]] = stream_->storages().create(static_cast<size_t>(n[1]), static_cast<kg::Tag>(n[2]));
        break;
      case Kind::Retain:
        stream_->storages().retain(handles_.at(n[0]));
        break;
      case Kind::Release:
        stream_->storages().release(handles_.at(n[0]));
        break;
      case Kind::Submit:
        if (playing_) submit(n);
        break;
      case Kind::Upload:  // of every case: some share inputs
        stream_->upload(&at(n[0]), static_cast<size_t>(n[1]), r.bytes.data(), r.bytes.size());
        break;
      case Kind::Download:
        if (playing_) compare(r);
        break;
    }
  }

  int finish() const {
    printf("%d cases, %d answers, %d failed, %d with other bits\n", labels_, answers_, failed_, different_);
    return answers_ > 0 && failed_ == 0 ? 0 : 1;
  }

 private:
  kg::Storage& at(double handle) { return stream_->storages().at(handles_.at(handle)); }

  void label(const std::string& text) {
    label_ = text;
    playing_ = std::regex_search(text, wanted_);
    if (!playing_) return;
    labels_++;
    fprintf(stderr, "case: %s\n", text.c_str());
  }

  // The command buffer of native/napi/instance.h.
  void submit(const std::vector<double>& n) {
    std::vector<kg::TensorView> views(static_cast<size_t>(n[2]));
    std::vector<kg::Storage*> owners(views.size());
    const double* p = n.data() + 4;
    for (size_t i = 0; i < views.size(); i++) p = decode(p, views[i], owners[i]);
    stream_->launch(static_cast<kg::KernelId>(static_cast<int>(n[0])), views.data(), owners.data(),
                    static_cast<int>(views.size()), p, static_cast<int>(n[3]));
  }

  const double* decode(const double* p, kg::TensorView& view, kg::Storage*& owner) {
    view = {};
    owner = nullptr;
    if (p[0] < 0) return p + 4;
    owner = &at(p[0]);
    view.dtype = static_cast<kg::DType>(static_cast<int>(p[1]));
    view.data = owner->data + static_cast<size_t>(p[2]);
    view.ndim = static_cast<int32_t>(p[3]);
    for (int i = 0; i < view.ndim; i++) {
      view.shape[i] = static_cast<int64_t>(p[4 + i]);
      view.strides[i] = static_cast<int64_t>(p[4 + view.ndim + i]);
    }
    return p + 4 + 2 * view.ndim;
  }

  void compare(const Record& r) {
    std::string found(static_cast<size_t>(r.numbers[2]), '\0');
    const kg::Fault fault =
        stream_->read(&at(r.numbers[0]), static_cast<size_t>(r.numbers[1]), found.data(), found.size());
    answers_++;
    if (!fault && found != r.bytes) different_++;
    if (!fault) return;
    failed_++;
    fprintf(stderr, "failed: %s: %s\n", label_.c_str(), fault->c_str());
  }

  std::regex wanted_;
  std::string label_;
  std::unique_ptr<kg::Stream> stream_;
  std::map<double, double> handles_;  // recorded to ours
  bool playing_ = true;
  int labels_ = 0, answers_ = 0, failed_ = 0, different_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  std::ifstream file(count > 1 ? arguments[1] : "", std::ios::binary);
  if (!file) {
    fprintf(stderr, "expected a trace, found %s\n", count > 1 ? arguments[1] : "no argument");
    return 2;
  }
  Replay replay(count > 2 ? arguments[2] : "");
  Record record;
  while (read(file, record)) replay.play(record);
  return replay.finish();
}

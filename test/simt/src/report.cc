#include "report.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>

#include "block.h"
#include "fiber.h"
#include "memory.h"
#include "settings.h"

namespace simt {
namespace {

void write(const std::string& line) {
  const ssize_t ignored = ::write(2, line.data(), line.size());
  (void)ignored;
}

std::string format(const char* text, va_list arguments) {
  va_list again;
  va_copy(again, arguments);
  const int length = vsnprintf(nullptr, 0, text, again);
  va_end(again);
  std::string line(static_cast<size_t>(length), '\0');
  vsnprintf(line.data(), line.size() + 1, text, arguments);
  return line;
}

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string readable = status == 0 && text ? text : name;
  free(text);
  return readable;
}

// Kernels mostly have internal linkage: only the file's own symbol table knows them.
std::string symbolAt(const char* path, uint64_t offset) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() < sizeof(ElfW(Ehdr))) return "";
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[i].sh_offset);
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof(ElfW(Sym)); s++)
      if (symbols[s].st_value <= offset && offset < symbols[s].st_value + symbols[s].st_size)
        return demangled(names + symbols[s].st_name);
  }
  return "";
}

// "void f<int>(char*)" is f<int>.
std::string withoutArguments(std::string name) {
  if (!name.empty() && name.back() == ')') {
    size_t at = name.size();
    int depth = 0;
    do {
      at--;
      if (name[at] == ')') depth++;
      if (name[at] == '(') depth--;
    } while (depth > 0 && at > 0);
    if (at > 0) name.resize(at);
  }
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

struct sigaction earlier[2];
const int kSignals[2] = {SIGSEGV, SIGBUS};

void passOn(int signal, siginfo_t* info, void* context) {
  const struct sigaction& action = earlier[signal == SIGBUS];
  if ((action.sa_flags & SA_SIGINFO) && action.sa_sigaction) return action.sa_sigaction(signal, info, context);
  if (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN && action.sa_handler)
    return action.sa_handler(signal);
  ::signal(signal, SIG_DFL);
  raise(signal);
}

void onFault(int signal, siginfo_t* info, void* context) {
  const void* at = info->si_addr;
  if (inDeviceRange(at)) {
    const std::string what = describeAddress(at);
    if (!inKernel()) finding("host code touched device memory at %p: %s", at, what.c_str());
    const bool freed = what.find("freed") != std::string::npos;
    finding("%s: the kernel touched %p: %s", freed ? "use after free" : "out of bounds", at, what.c_str());
  }
  if (inSharedRange(at)) finding("out of bounds: the kernel touched %p, past its shared memory", at);
  if (inStacks(at)) finding("the stack of a CUDA thread is used up: local arrays are too large");
  if (inKernel()) finding("the kernel touched %p, which is neither device nor shared memory", at);
  passOn(signal, info, context);
}

// A stack overflow leaves no stack for the handler. Threads that have one of their own (a sanitizer's) keep it.
struct SignalStack {
  static constexpr size_t kBytes = 128 * 1024;
  void* memory = nullptr;

  SignalStack() {
    stack_t present{};
    sigaltstack(nullptr, &present);
    if (!(present.ss_flags & SS_DISABLE)) return;
    memory = malloc(kBytes);
    stack_t stack{};
    stack.ss_sp = memory;
    stack.ss_size = kBytes;
    sigaltstack(&stack, nullptr);
  }
  ~SignalStack() {
    if (!memory) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
    free(memory);
  }
};

}  // namespace

void remark(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  write("simt: " + format(text, arguments) + whereNow() + "\n");
  va_end(arguments);
}

void finding(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  write("simt: " + format(text, arguments) + whereNow() + "\n");
  va_end(arguments);
  abort();
}

void waits(const char* call) {
  if (!settings().waits) return;
  std::ofstream(settings().waits, std::ios::app) << call << std::endl;
}

std::string functionName(const void* address) {
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) return "an unknown kernel";
  std::string name = symbolAt(info.dli_fname, static_cast<uint64_t>(static_cast<const char*>(address) -
                                                                    static_cast<const char*>(info.dli_fbase)));
  if (name.empty()) name = info.dli_sname ? demangled(info.dli_sname) : "an unknown kernel";
  return withoutArguments(name);
}

void watchFaults() {
  thread_local const SignalStack stack;
  (void)stack;
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = onFault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; i++) sigaction(kSignals[i], &action, &earlier[i]);
  });
}

}  // namespace simt

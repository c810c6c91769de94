// Finds cuBLASLt, opens it and resolves its symbols; says clearly why it could not. Never falls back in silence from a
// library that the user named.
#include "cuda/cublas.h"

#include <dlfcn.h>
#include <glob.h>
#include <sys/stat.h>

#include <cstdlib>
#include <vector>

#include "runtime/error.h"

namespace kg::cuda {
namespace {

constexpr int kOldestVersion = 120000;
const char* const kSonames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

struct Library {
  CublasStatus status{};
  Cublas functions{};
};

bool isFolder(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

bool exists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

std::string environment(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

std::string versionText(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100);
}

// The name of the first symbol that the library lacks, or null.
const char* resolve(void* library, Cublas& functions) {
#define KG_CUBLASLT_RESOLVE(result, name, parameters)                                        \
  functions.name = reinterpret_cast<result(*) parameters>(dlsym(library, "cublasLt" #name)); \
  if (!functions.name) return "cublasLt" #name;
  KG_CUBLASLT_SYMBOLS(KG_CUBLASLT_RESOLVE)
#undef KG_CUBLASLT_RESOLVE
  return nullptr;
}

std::string pathOf(void* symbol, const std::string& opened) {
  Dl_info info;
  return dladdr(symbol, &info) && info.dli_fname ? info.dli_fname : opened;
}

// Why this file cannot be used; empty where `found` has it.
std::string open(const std::string& path, Library& found) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = dlerror();
    return error ? error : path + ": cannot be opened";
  }
  std::string why;
  Cublas functions{};
  const char* missing = resolve(library, functions);
  if (missing) {
    why = path + " is not a cuBLASLt of CUDA 12 or 13: it lacks " + missing;
  } else {
    const int version = static_cast<int>(functions.GetVersion());
    if (version >= kOldestVersion) {
      found.functions = functions;
      found.status = {true, "", "", pathOf(reinterpret_cast<void*>(functions.GetVersion), path), version};
      return "";
    }
    why = path + " is cuBLAS " + versionText(version) + ", older than " + versionText(kOldestVersion);
  }
  dlclose(library);
  return why;
}

void addFolder(std::vector<std::string>& files, const std::string& folder) {
  for (const char* name : kSonames)
    if (exists(folder + "/" + name)) files.push_back(folder + "/" + name);
}

void addMatching(std::vector<std::string>& files, const std::string& pattern) {
  glob_t folders{};
  if (glob(pattern.c_str(), 0, nullptr, &folders) == 0)
    for (size_t i = 0; i < folders.gl_pathc; i++) addFolder(files, folders.gl_pathv[i]);
  globfree(&folders);
}

// Where a library may lie, in the order of preference. Folders are only looked at where a soname exists in them.
std::vector<std::string> candidates() {
  std::vector<std::string> files(std::begin(kSonames), std::end(kSonames));
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    const std::string home = environment(name);
    if (home.empty()) continue;
    addFolder(files, home + "/lib64");
    addFolder(files, home + "/lib");
    addMatching(files, home + "/../../nvidia/*/lib");  // CUDA_HOME is one of the folders of pip: its neighbours
  }
  addFolder(files, "/usr/local/cuda/lib64");
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    const std::string prefix = environment(name);
    if (prefix.empty()) continue;
    addFolder(files, prefix + "/lib");
    addMatching(files, prefix + "/lib/python3*/site-packages/nvidia/*/lib");
  }
  const std::string home = environment("HOME");
  if (!home.empty()) addMatching(files, home + "/.local/lib/python3*/site-packages/nvidia/*/lib");
  for (const char* kind : {"site-packages", "dist-packages"})
    addMatching(files, std::string("/usr/local/lib/python3*/") + kind + "/nvidia/*/lib");
  return files;
}

void reject(Library& found, const std::string& reason) {
  found.status = {false, reason,
                  "install cuBLAS of CUDA 12 or 13 (with the CUDA toolkit, or `pip install nvidia-cublas`) and set "
                  "KEELGRAD_CUBLAS to the folder that holds libcublasLt.so.13 or libcublasLt.so.12",
                  "", 0};
}

void openNamed(Library& found, const std::string& named) {
  std::vector<std::string> files;
  if (isFolder(named)) {
    addFolder(files, named);
    if (files.empty())
      return reject(found, "KEELGRAD_CUBLAS: " + named + " holds neither libcublasLt.so.13 nor libcublasLt.so.12");
  } else if (exists(named)) {
    files.push_back(named);
  } else {
    return reject(found, "KEELGRAD_CUBLAS: there is no file or folder " + named);
  }
  std::string why;
  for (const std::string& file : files) {
    const std::string problem = open(file, found);
    if (problem.empty()) return;
    why += (why.empty() ? "" : "; ") + problem;
  }
  reject(found, "KEELGRAD_CUBLAS: " + why);
}

void openFirst(Library& found) {
  std::string why;
  for (const std::string& file : candidates()) {
    const std::string problem = open(file, found);
    if (problem.empty()) return;
    // That the dynamic linker knows no such soname is the usual case; that an existing file is no good is news.
    const bool bare = file.find('/') == std::string::npos && problem.find("No such file") != std::string::npos;
    if (!bare) why += (why.empty() ? "" : "; ") + problem;
  }
  reject(found, why.empty() ? "cuBLAS was not found (libcublasLt.so.13, libcublasLt.so.12)" : "cuBLAS: " + why);
}

const Library& library() {
  static const Library found = [] {
    Library result;
    const std::string named = environment("KEELGRAD_CUBLAS");
    if (named.empty()) {
      openFirst(result);
    } else {
      openNamed(result, named);
    }
    return result;
  }();
  return found;
}

}  // namespace

const CublasStatus& cublasStatus() { return library().status; }

const Cublas& cublas() {
  const Library& found = library();
  if (!found.status.available) fail("%s; %s", found.status.reason.c_str(), found.status.remedy.c_str());
  return found.functions;
}

void check(lt::Status status, const char* what) {
  if (status != lt::Status::Success) fail("cuBLAS: %s in %s", cublas().GetStatusString(status), what);
}

}  // namespace kg::cuda

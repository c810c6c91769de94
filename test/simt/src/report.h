// Findings: each is told on stderr with what ran, and ends the process, so that no test can pass over it.
#pragma once

#include <string>

namespace simt {

// "simt: <message>" and the kernel, block and thread that run, if any; then abort().
[[noreturn]] void finding(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The same line without an end: for what CUDA answers with an error code.
void remark(const char* format, ...) __attribute__((format(printf, 1, 2)));
// A call for which a GPU's host waits: a line of the file KEELGRAD_SIMT_WAITS, where that is set.
void waits(const char* call);
// The name of the function at an address of this process, from its file's symbol table.
std::string functionName(const void* address);
// Catches accesses to device memory, shared memory and stacks that the pages' rights forbid.
void watchFaults();

}  // namespace simt

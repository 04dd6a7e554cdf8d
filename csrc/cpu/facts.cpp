// What was built, for `doctor`: a C symbol of the library itself, so that the facts are of the library that serves.
#include <string>
#include <thread>

#include "simd.h"

namespace mixupe {
namespace {

// The clone of a function that this machine runs: resolved by the same mechanism as the kernels' own.
#ifdef MIXUPE_HAS_CLONES
__attribute__((target("default"))) const char* simd_level() { return "x86-64 (SSE2)"; }
__attribute__((target("arch=x86-64-v3"))) const char* simd_level() { return "x86-64-v3 (AVX2)"; }
__attribute__((target("arch=x86-64-v4"))) const char* simd_level() { return "x86-64-v4 (AVX-512)"; }
#else
const char* simd_level() { return "the compiler's default"; }
#endif

std::string facts() {
  const std::string cuda = MIXUPE_CUDA_ARCHITECTURES;
  return std::string("compiler=" MIXUPE_COMPILER "\nsimd_level=") + simd_level() +
         "\nhardware_threads=" + std::to_string(std::thread::hardware_concurrency()) +
         "\nstable_abi_target=torch >= 2.10\ncuda_architectures=" + (cuda.empty() ? "none" : cuda) + "\n";
}

}  // namespace
}  // namespace mixupe

// Lines of name=value.
extern "C" __attribute__((visibility("default"))) const char* mixupe_build_facts() {
  static const std::string text = mixupe::facts();
  return text.c_str();
}

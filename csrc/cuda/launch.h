// The one launch of every kernel.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <cstring>

#include "../operators/checks.h"

namespace mixupe {

// Blocks of a launch in each dimension, of which CUDA allows 2^31 - 1 and twice 65535.
struct Grid {
  int64_t x, y, z;
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}  // a number of blocks is a grid
};

// Whether a kernel may be launched before the one ahead of it on the stream has ended (programmatic dependent launch): where the
// environment had MIXUPE_DEPENDENT_LAUNCH=1 at the first launch, from compute capability 9.0 on. No GPU has timed it, so it is off.
// Kernels wait by themselves: begin_kernel in team.h.
inline bool launches_early(int32_t device) {
  static const char* const asked = std::getenv("MIXUPE_DEPENDENT_LAUNCH");
  static const bool on = asked && !std::strcmp(asked, "1");
  if (!on) return false;
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

// kernel(job) on the device and the current stream of `like`; no blocks, no launch.
template <typename Job>
void launch(void (*kernel)(Job), const Grid& blocks, int threads, const Tensor& like, const Job& job) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  require(blocks.x <= INT32_MAX, "a launch of ", blocks.x, " blocks is past CUDA's limit of 2^31 - 1");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z)};
  config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = launches_early(device) ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, job));
}

}  // namespace mixupe

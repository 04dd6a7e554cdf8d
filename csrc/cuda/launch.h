// The one launch of every kernel.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operators/checks.h"

namespace mixupe {

// kernel(job) on the device and the current stream of `like`; no blocks, no launch.
template <typename Job>
void launch(void (*kernel)(Job), int64_t blocks, int threads, const Tensor& like, const Job& job) {
  if (blocks == 0) return;
  require(blocks <= INT32_MAX, "a launch of ", blocks, " blocks is past CUDA's limit of 2^31 - 1");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks), config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, job));
}

}  // namespace mixupe

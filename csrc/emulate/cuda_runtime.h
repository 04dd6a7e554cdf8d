// CUDA's names on the host: as much of them as csrc/cuda uses, so that its kernels run where there is no GPU. The threads of
// a block are fibers, which blocks.cpp runs.
#pragma once
#include <cstddef>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a thread of the host has one block at a time

using cudaError_t = int;
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;  // what the emulated device can is what sm_90 can
  return 0;
}

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

unsigned __shfl_sync(unsigned mask, unsigned word, int lane);
unsigned __shfl_down_sync(unsigned mask, unsigned word, int offset);
void __syncthreads();
void __syncwarp(unsigned mask);
void cudaGridDependencySynchronize();
inline void cudaTriggerProgrammaticLaunchCompletion() {}

namespace emulated {

// What each thread of a launch does.
struct Kernel {
  void (*call)(const void* arguments);
  const void* arguments;
};

// Returns when all blocks are done; throws what a thread of them threw, or that its threads wait for ever.
void launch(const cudaLaunchConfig_t& config, const Kernel& kernel);

}  // namespace emulated

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  emulated::launch(*config, {[](const void* self) { (*static_cast<decltype(&call)>(self))(); }, &call});
  return 0;
}

// Teams of threads with a row each, and what they hand one another.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace mixupe {

// The first line of every kernel. Launched early (launch.h), it waits here for the kernels ahead of it: what they write may be read
// from here on, and what they read may be written. Then the next one may come.
__device__ __forceinline__ void begin_kernel() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

constexpr unsigned whole_warp = 0xffffffffu;

// Shuffles move 32 bits; a struct goes word by word.
template <typename V, typename F>
__device__ __forceinline__ V by_words(V value, const F& shuffle) {
  static_assert(sizeof(V) % 4 == 0);
  unsigned words[sizeof(V) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned& word : words) word = shuffle(word);
  memcpy(&value, words, sizeof value);
  return value;
}

template <typename V>
__device__ __forceinline__ V shuffle_down(V value, int offset) {
  return by_words(value, [=](unsigned word) { return __shfl_down_sync(whole_warp, word, offset); });
}

template <typename V>
__device__ __forceinline__ V from_first_lane(V value) {
  return by_words(value, [](unsigned word) { return __shfl_sync(whole_warp, word, 0); });
}

// Threads a multiprocessor should hold at once, of at most 2048: enough loads in flight for the memory, and at 85
// registers each no kernel spills, where ptxas left to itself took 64 or 72 and spilled a few.
constexpr int least_threads = 768;

// The threads that share a row: a warp of a block of four, or a whole block. Blocks are one-dimensional.
template <int size>
struct Team {
  static_assert(size == 32 || (size > 32 && size <= 1024 && (size & (size - 1)) == 0));
  static constexpr int threads = size, warps = threads / 32, block = warps == 1 ? 128 : threads;
  static constexpr int rows_per_block = block / threads, blocks_at_once = least_threads / block;

  static __device__ int rank() { return threadIdx.x % threads; }
  static __device__ int64_t row() { return int64_t(blockIdx.x) * rows_per_block + threadIdx.x / threads; }
  static int64_t blocks(int64_t rows) { return (rows + rows_per_block - 1) / rows_per_block; }

  // The values of all threads joined in one order whatever the run, and given to all of them. Every thread of the team
  // must call it.
  template <typename V, typename F>
  static __device__ V reduce(V value, const F& join) {
    value = reduce_lanes<32>(value, join);
    if constexpr (warps > 1) {
      __shared__ V of_warp[warps];
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
      __syncthreads();
      // Each warp joins them all, which spares handing the result round.
      value = reduce_lanes<warps>(of_warp[threadIdx.x % warps], join);
      __syncthreads();  // a second call may write to of_warp
    }
    return from_first_lane(value);
  }

  // What the team's threads wrote before is seen by all of them after. Every thread of the team must call it.
  static __device__ void sync() {
    if constexpr (warps > 1) {
      __syncthreads();
    } else {
      __syncwarp(whole_warp);
    }
  }

 private:
  // Joins the first `lanes` lanes of a warp into lane 0; what the others hold afterwards is of no use.
  template <int lanes, typename V, typename F>
  static __device__ V reduce_lanes(V value, const F& join) {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) value = join(value, shuffle_down(value, offset));
    return value;
  }
};

using WarpTeam = Team<32>;
using BlockTeam = Team<256>;

// A warp's lanes have four to sixteen vectors each at this length; longer rows get a block.
constexpr int64_t longest_warp_row = 1024;

// Calls f with the team for rows of this length.
template <typename F>
void with_team(int64_t length, const F& f) {
  length <= longest_warp_row ? f(WarpTeam{}) : f(BlockTeam{});
}

}  // namespace mixupe

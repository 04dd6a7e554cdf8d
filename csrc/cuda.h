// What the CUDA kernels share: dtypes, vector access to the elements of a row, teams of threads with a row each, and
// launches. Index arithmetic is host + device, so that it can be tested without a GPU.
#pragma once
#undef NDEBUG  // device asserts are how a bad label or partner is reported: release builds keep them
#ifndef USE_CUDA
#define USE_CUDA  // torch's headers declare their CUDA functions under it
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cassert>
#include <cstdint>
#include <cstring>

#include "checks.h"

namespace mixupe {

// Dtypes

template <typename L>
using Accumulate = std::conditional_t<std::is_same_v<L, double>, double, float>;

MIXUPE_FN float widen(float v) { return v; }
MIXUPE_FN double widen(double v) { return v; }
MIXUPE_FN float widen(uint8_t v) { return static_cast<float>(v); }
MIXUPE_FN float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
MIXUPE_FN float widen(__half v) { return __half2float(v); }

template <typename Out, typename T>
MIXUPE_FN Out narrow(T value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(static_cast<int32_t>(value));
  } else if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<Out, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<Out>(value);
  }
}

// Calls f with a value of the C++ type that a floating dtype names.
template <typename F>
void with_float_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: fail("expected a floating dtype, got ", torch::headeronly::toString(dtype));
  }
}

template <typename F>
void with_mixable_type(ScalarType dtype, const F& f) {
  dtype == ScalarType::Byte ? f(uint8_t{}) : with_float_type(dtype, f);
}

__device__ __forceinline__ int64_t checked_row(int64_t row, int64_t rows) {
  assert(row >= 0 && row < rows && "partner, rows and index must be rows of the tensor they point into");
  return row;
}

// Rows as packs: the values of one 16-byte access

constexpr int vector_bytes = 16;

// uint8 is read 8 bytes at a time: what it becomes is two to four times as wide.
template <typename L>
constexpr int pack_of = sizeof(L) == 1 ? 8 : vector_bytes / sizeof(L);

template <typename V, int count>
struct alignas(sizeof(V) * count < vector_bytes ? sizeof(V) * count : vector_bytes) Vec {
  V values[count];
};

template <typename V, int count>
MIXUPE_FN bool is_aligned(const V* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec<V, count>) == 0;
}

// `count` values from anywhere: in 16-byte loads where the address allows it.
template <int count, typename V, typename T>
MIXUPE_FN void load(const V* from, T (&values)[count]) {
  Vec<V, count> pack;
  if (is_aligned<V, count>(from)) {
    pack = *reinterpret_cast<const Vec<V, count>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) pack.values[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = widen(pack.values[i]);
}

template <int count, typename V, typename T>
MIXUPE_FN void store(const T (&values)[count], V* to) {
  Vec<V, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack.values[i] = narrow<V>(values[i]);
  if (is_aligned<V, count>(to)) {
    *reinterpret_cast<Vec<V, count>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = pack.values[i];
  }
}

// The elements of a row as a team takes them: `packs` packs from the first aligned address on, after `head` single
// elements and before as many single ones as are left.
struct Span {
  int64_t size, head, packs;
};

template <typename V, int pack>
MIXUPE_FN Span span_of(const V* row, int64_t size) {
  constexpr int64_t alignment = alignof(Vec<V, pack>);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % alignment);
  const int64_t to_aligned = past == 0 ? 0 : (alignment - past) / static_cast<int64_t>(sizeof(V));
  const int64_t head = to_aligned < size ? to_aligned : size;
  return {size, head, (size - head) / pack};
}

// Where the e-th single element of a row lies.
template <int pack>
MIXUPE_FN int64_t edge_index(const Span& span, int64_t e) {
  return e < span.head ? e : e + span.packs * pack;
}

template <int n>
using Count = std::integral_constant<int, n>;

// Calls body(count, index) for the shares of thread `rank` of `threads` in packs [begin, end) and, with the first pack,
// in the row's single elements: elements index, ..., index + count.value - 1 each time.
template <int pack, typename F>
MIXUPE_FN void for_each_pack(const Span& span, int64_t begin, int64_t end, int rank, int threads, const F& body) {
  if (begin == 0)
    for (int64_t e = rank; e < span.size - span.packs * pack; e += threads) body(Count<1>{}, edge_index<pack>(span, e));
#pragma unroll 1
  for (int64_t p = begin + rank; p < end; p += threads) body(Count<pack>{}, span.head + p * pack);
}

// Teams

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

 private:
  // Joins the first `lanes` lanes of a warp into lane 0; what the others hold afterwards is of no use.
  template <int lanes, typename V, typename F>
  static __device__ V reduce_lanes(V value, const F& join) {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) value = join(value, shuffle_down(value, offset));
    return value;
  }
};

// A warp's lanes have four to sixteen vectors each at this length; longer rows get a block.
constexpr int64_t longest_warp_row = 1024;

// Calls f with the team for rows of this length.
template <typename F>
void with_team(int64_t length, const F& f) {
  length <= longest_warp_row ? f(Team<32>{}) : f(Team<256>{});
}

// Launches

// kernel(job) on the device and the current stream of `like`; no blocks, no launch.
template <typename Job>
void launch(void (*kernel)(Job), int64_t blocks, int threads, const Tensor& like, const Job& job) {
  if (blocks == 0) return;
  require(blocks <= INT32_MAX, "a launch of ", blocks, " blocks is past CUDA's limit of 2^31 - 1");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mixupe

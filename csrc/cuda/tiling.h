// Passes over samples that are flat runs of elements, on CUDA.
//
// Blocks are numbered samples first and tiles second: all samples' first tiles run before their second ones, so that
// when a sample meets its partner the partner's tile is still in the L2 cache, and memory sees one read of x and one
// write of out (the floor) whatever the pairing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../operators/checks.h"
#include "elements.h"
#include "team.h"

namespace mixupe {
namespace {

// Threads of a block and packs for each of them: 16 KB of a sample are a tile.
constexpr int most_threads = 256, packs_per_thread = 4;

// A pass over samples that are flat runs of elements: a block takes one tile of one sample.
struct Tiling {
  int64_t samples, tiles, packs_per_tile;
  int threads;

  // Blocks are of a multiple of `unit` threads.
  Tiling(int64_t sample_count, int64_t sample_size, int pack, int packs_each = packs_per_thread, int unit = 32)
      : samples(sample_count) {
    const int64_t packs = sample_size / pack, share = (packs + packs_each - 1) / packs_each;
    threads = static_cast<int>(std::clamp<int64_t>((share + unit - 1) / unit * unit, unit, most_threads / unit * unit));
    packs_per_tile = int64_t(threads) * packs_each;
    tiles = sample_size == 0 ? 0 : std::max<int64_t>(1, (packs + packs_per_tile - 1) / packs_per_tile);
  }

  int64_t blocks() const { return samples * tiles; }
  MIXUPE_FN int64_t sample_of(int64_t block) const { return block % samples; }

  // The packs of the block's tile, cut to those the sample has.
  MIXUPE_FN int64_t first_pack(int64_t block) const { return block / samples * packs_per_tile; }
  MIXUPE_FN int64_t last_pack(int64_t block, const Span& span) const {
    const int64_t end = first_pack(block) + packs_per_tile;
    return end < span.packs ? end : span.packs;
  }
};

template <int pack, typename F>
__device__ __forceinline__ void for_each_in_tile(const Tiling& tiling, const Span& span, const F& body) {
  const int64_t begin = tiling.first_pack(blockIdx.x), end = tiling.last_pack(blockIdx.x, span);
  for_each_pack<pack>(span, begin, end, threadIdx.x, blockDim.x, body);
}

// Calls f with a pointer of the dtype's type, for a dtype that a kernel learns at run time; kernels branch so once a pack, which spares compiling every kernel for
// every pair of dtypes.
template <typename Pointer, typename F>
__device__ __forceinline__ void with_dtype(ScalarType dtype, Pointer* p, const F& f) {
  using Const = std::is_const<Pointer>;
  const auto as = [p](auto type) {
    using V = decltype(type);
    return reinterpret_cast<std::conditional_t<Const::value, const V, V>*>(p);
  };
  switch (dtype) {
    case ScalarType::Float: return f(as(float{}));
    case ScalarType::Double: return f(as(double{}));
    case ScalarType::BFloat16: return f(as(BFloat16{}));
    case ScalarType::Half: return f(as(Half{}));
    case ScalarType::Byte: return f(as(uint8_t{}));
    default: return;
  }
}

// Where a kernel writes rows of a dtype known at run time.
struct Output {
  char* data;
  int64_t stride, element;  // in bytes
  ScalarType dtype;

  MIXUPE_FN char* at(int64_t row, int64_t k) const { return data + row * stride + k * element; }
};

template <int pack>
__device__ Span span_of_output(const Output& out, int64_t row, int64_t size) {
  Span span{};
  with_dtype(out.dtype, out.at(row, 0),
             [&](auto* p) { span = span_of<std::remove_pointer_t<decltype(p)>, pack>(p, size); });
  return span;
}

template <int count, typename T>
__device__ __forceinline__ void store_output(const T (&values)[count], const Output& out, int64_t row, int64_t k) {
  with_dtype(out.dtype, out.at(row, k), [&](auto* p) { store(values, p); });
}

}  // namespace
}  // namespace mixupe

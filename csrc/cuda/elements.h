// Elements on CUDA: conversion of dtypes and vector access to the elements of a row. Index arithmetic is host + device, so
// that it can be tested without a GPU.
#pragma once
#undef NDEBUG  // device asserts are how a bad label or partner is reported: release builds keep them
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../operators/dtypes.h"
#include "../row.h"

namespace mixupe {

MIXUPE_FN float widen(float v) { return v; }
MIXUPE_FN double widen(double v) { return v; }
MIXUPE_FN float widen(uint8_t v) { return static_cast<float>(v); }
MIXUPE_FN float widen(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
MIXUPE_FN float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }

template <typename Out, typename T>
MIXUPE_FN Out narrow(T value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(static_cast<int32_t>(value));
  } else if constexpr (std::is_same_v<Out, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)))};
  } else if constexpr (std::is_same_v<Out, Half>) {
    return {__half_as_ushort(__float2half_rn(static_cast<float>(value)))};
  } else {
    return static_cast<Out>(value);
  }
}

// As unsigned, a negative row is larger than any: one comparison of 64 bits, which takes a thread two instructions.
__device__ __forceinline__ bool is_row(int64_t row, int64_t rows) {
  return static_cast<uint64_t>(row) < static_cast<uint64_t>(rows);
}

__device__ __forceinline__ int64_t checked_row(int64_t row, int64_t rows) {
  assert(is_row(row, rows) && "partner, rows and index must be rows of the tensor they point into");
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

// Whether a pack's values are taken two at a time, by instructions that the host has not.
template <typename V, int count>
#ifdef __CUDA_ARCH__
constexpr bool in_pairs = std::is_same_v<V, BFloat16> && count % 2 == 0;
template <typename V, int count>
constexpr bool in_words = std::is_same_v<V, uint8_t> && count % 4 == 0;
#else
constexpr bool in_pairs = false;
template <typename V, int count>
constexpr bool in_words = false;
#endif

template <typename V, int count>
MIXUPE_FN bool is_aligned(const V* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec<V, count>) == 0;
}

// 16 bytes of a row as four words: packs of narrow values that are chosen between fall apart into them.
struct alignas(vector_bytes) Words {
  unsigned words[4];
};

template <typename V>
MIXUPE_FN Words words_of(const Vec<V, vector_bytes / sizeof(V)>& pack) {
  Words words;
  memcpy(&words, &pack, sizeof words);
  return words;
}

// A pack's values in the type that is computed in.
template <typename V, int count, typename T>
MIXUPE_FN void widened(const Vec<V, count>& pack, T (&values)[count]) {
  if constexpr (in_pairs<V, count>) {  // a bfloat16 is the upper half of a float: one instruction each
#ifdef __CUDA_ARCH__
    const auto* pairs = reinterpret_cast<const unsigned*>(&pack);
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      values[2 * i] = __uint_as_float(pairs[i] << 16);
      values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = widen(pack.values[i]);
  }
}

// What `biased` adds to a byte: 2^23, of which a float's last eight bits are the byte's; the host has no such instruction.
template <int count>
constexpr float byte_bias = in_words<uint8_t, count> ? 8388608.f : 0.f;

template <int count>
MIXUPE_FN void biased(const Vec<uint8_t, count>& pack, float (&values)[count]) {
  if constexpr (in_words<uint8_t, count>) {
#ifdef __CUDA_ARCH__
    const auto* words = reinterpret_cast<const unsigned*>(&pack);
#pragma unroll
    for (int i = 0; i < count; ++i)
      values[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7540u + i % 4));
#endif
  } else {
    widened(pack, values);
  }
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
  widened(pack, values);
}

template <typename V, int count, typename T>
MIXUPE_FN Vec<V, count> narrowed(const T (&values)[count]) {
  Vec<V, count> pack;
  if constexpr (in_pairs<V, count>) {
#ifdef __CUDA_ARCH__
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&pack);
#pragma unroll
    for (int i = 0; i < count / 2; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
#endif
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) pack.values[i] = narrow<V>(values[i]);
  }
  return pack;
}

template <int count, typename V, typename T>
MIXUPE_FN void store(const T (&values)[count], V* to) {
  const auto pack = narrowed<V>(values);
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

// The greatest of a pack's values and `least`; NaNs are left out.
template <typename V, int count, typename T>
MIXUPE_FN T max_of(const Vec<V, count>& pack, T least) {
  if constexpr (in_pairs<V, count>) {
#ifdef __CUDA_ARCH__
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&pack);
    __nv_bfloat162 most = pairs[0];
#pragma unroll
    for (int i = 1; i < count / 2; ++i) most = __hmax2(most, pairs[i]);
    return fmaxf(least, fmaxf(__low2float(most), __high2float(most)));
#endif
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) least = fmax(least, T(widen(pack.values[i])));
  }
  return least;
}

// Packs that a thread asks for before it uses the first.
constexpr int packs_in_flight = 4;

template <typename V, int count>
struct Flight {
  Vec<V, count> packs[packs_in_flight];
};

// Calls body(flight, index of its first pack, whether all are there) for the share of a team's thread in the `packs` from an aligned
// address on; a flight's packs lie `threads` apart. `other` is in place of packs past the end.
template <typename Team, int count, typename V, typename F>
MIXUPE_FN void for_each_flight(const V* aligned, int packs, V other, const F& body) {
  const auto* from = reinterpret_cast<const Vec<V, count>*>(aligned);
  constexpr int step = packs_in_flight * Team::threads;
  Flight<V, count> flight;
  int begin = 0;
#pragma unroll 1
  for (; begin + step <= packs; begin += step) {
    const int first = begin + Team::rank();
#pragma unroll
    for (int d = 0; d < packs_in_flight; ++d) flight.packs[d] = from[first + d * Team::threads];
    body(flight, first, std::true_type{});
  }
  if (begin == packs) return;
  const int first = begin + Team::rank();
#pragma unroll
  for (int d = 0; d < packs_in_flight; ++d) {
    if (first + d * Team::threads < packs) {
      flight.packs[d] = from[first + d * Team::threads];
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) flight.packs[d].values[i] = other;
    }
  }
  body(flight, first, std::false_type{});
}

template <int n>
using Count = std::integral_constant<int, n>;

// Calls body(index) for the share of thread `rank` of `threads` in the row's single elements.
template <int pack, typename F>
MIXUPE_FN void for_each_edge(const Span& span, int rank, int threads, const F& body) {
#pragma unroll 1
  for (int64_t e = rank; e < span.size - span.packs * pack; e += threads) body(edge_index<pack>(span, e));
}

// Calls body(count, index) for the shares of thread `rank` of `threads` in packs [begin, end) and, with the first pack,
// in the row's single elements: elements index, ..., index + count.value - 1 each time.
template <int pack, typename F>
MIXUPE_FN void for_each_pack(const Span& span, int64_t begin, int64_t end, int rank, int threads, const F& body) {
  if (begin == 0) for_each_edge<pack>(span, rank, threads, [&](int64_t k) { body(Count<1>{}, k); });
#pragma unroll 1
  for (int64_t p = begin + rank; p < end; p += threads) body(Count<pack>{}, span.head + p * pack);
}

}  // namespace mixupe

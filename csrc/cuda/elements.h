// Elements on CUDA: conversion of dtypes and vector access to the elements of a row. Index arithmetic is host + device, so
// that it can be tested without a GPU.
#pragma once
#undef NDEBUG  // device asserts are how a bad label or partner is reported: release builds keep them
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
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

}  // namespace mixupe

// Elements on the CPU: conversion of dtypes, blocks of a row.
#pragma once
#include <cstdint>
#include <cstring>

#include "../operators/dtypes.h"
#include "../row.h"
#include "simd.h"

namespace mixupe {

// Conversions as integer arithmetic, which vectorizes on every level (F16C and AVX512-BF16 are not on all).

MIXUPE_FN float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MIXUPE_FN uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MIXUPE_FN float widen(float v) { return v; }
MIXUPE_FN double widen(double v) { return v; }
MIXUPE_FN float widen(uint8_t v) { return static_cast<float>(static_cast<int32_t>(v)); }
MIXUPE_FN float widen(BFloat16 v) { return float_of_bits(static_cast<uint32_t>(v.bits) << 16); }

MIXUPE_FN float widen(Half v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  const uint32_t exponent = rest & 0x7c00u;
  const uint32_t rebias = exponent == 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (rest << 13) + rebias;
  const uint32_t subnormal = bits_of(float_of_bits(0x3f000000u | rest) - 0.5f);  // 0.5 + m·2^-24, exact
  return float_of_bits(sign | (exponent == 0 ? subnormal : normal));
}

// The bits of a value whose upper half is the value rounded to bfloat16: to nearest, ties to even. The carry of a NaN whose
// low bits are set would make another number of it; the short form is for values whose NaN have none, being a bfloat16's or
// short_nan's (a fifth less time).
MIXUPE_FN uint32_t round_short_bits(float value) {
  const uint32_t bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

MIXUPE_FN uint32_t round_bits(float value) { return value != value ? 0x7fc00000u : round_short_bits(value); }

// A NaN of ours for a caller's. Arithmetic hands on a NaN's bits.
template <typename T>
MIXUPE_FN T short_nan(T value) {
  return value != value ? T(NAN) : value;
}

template <typename T>
MIXUPE_FN SoftmaxGradient<T> short_nans(const SoftmaxGradient<T>& g) {
  return {short_nan(g.shift), short_nan(g.level), short_nan(g.slope), g.ce};
}

template <typename Out, typename T>
MIXUPE_FN Out narrow(T value) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    return static_cast<uint8_t>(static_cast<int32_t>(value));
  } else if constexpr (std::is_same_v<Out, BFloat16>) {
    return {static_cast<uint16_t>(round_bits(static_cast<float>(value)) >> 16)};
  } else if constexpr (std::is_same_v<Out, Half>) {
    const uint32_t bits = bits_of(static_cast<float>(value)), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    const uint32_t subnormal = bits_of(float_of_bits(rest) + 0.5f) - 0x3f000000u;  // the addition rounds to m·2^-24
    const uint32_t normal = (rest - ((127u - 15u) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    const uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t half = rest >= 0x47800000u ? large : rest < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>(sign | half)};
  } else {
    return static_cast<Out>(value);
  }
}

// Rows are processed in blocks that stay in the first-level cache: each element comes from memory once, in its own
// dtype, and every loop over a block runs on the accumulation dtype. Lanes pads a block so that loops have no tail.
constexpr int64_t block_size = 2048, lanes = 16;

MIXUPE_FN int64_t padded(int64_t n) { return (n + lanes - 1) & ~(lanes - 1); }

// A sum in as many parts as rows are padded to, whatever this machine's vectors hold: the fewer lanes an instruction has, the
// more often each of them would be rounded, and without any vectors (sanitizers, say) all terms would be in one sum.
template <typename T>
struct Parts {
  alignas(64) T of[lanes] = {};

  MIXUPE_FN T total() {
    for (int64_t half = lanes / 2; half > 0; half /= 2)
#pragma omp simd
      for (int64_t lane = 0; lane < half; ++lane) of[lane] += of[lane + half];
    return of[0];
  }
};

// Reads a block of logits, padded with -∞, which adds 0 to every sum; returns their maximum.
template <typename L, typename T>
MIXUPE_FN T load_logits(const L* z, int64_t n, T* block) {
  const int64_t whole = n & ~(lanes - 1);
  T max = T(-INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < whole; ++i) {
    const T value = widen(z[i]);
    block[i] = value;
    max = value > max ? value : max;
  }
  if (whole < n) {
    // One masked load: padding first and filling in after it made the loop below wait for the stores (20 ns a row).
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < lanes; ++i) {
      const T value = i < n - whole ? widen(z[whole + i]) : T(-INFINITY);
      block[whole + i] = value;
      max = value > max ? value : max;
    }
  }
  return max;
}

template <typename L, typename T>
MIXUPE_FN void store_block(const T* block, int64_t n, L* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<L>(block[i]);
}

// The same as a function of its own.
template <typename L, typename T>
MIXUPE_SIMD void write_block(const T* block, int64_t n, L* out) {
  store_block(block, n, out);
}

}  // namespace mixupe

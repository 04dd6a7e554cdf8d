// bfloat16 rows on the CPU, two neighbours at a time: the halves of a 32-bit word of memory. With lanes of one width, to
// widen is one instruction a half and nothing is shuffled. In a block of halves the first of every word come before all the
// second; sums do not mind, and the gradient goes back to its order when it is rounded.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cpu.h"
#ifdef MIXUPE_SIMD_BFLOAT16
#include <immintrin.h>
#endif

namespace mixupe {
namespace {

MIXUPE_FN uint32_t word_of(const BFloat16* values, int64_t i) {
  uint32_t word;
  std::memcpy(&word, values + 2 * i, sizeof word);
  return word;
}

MIXUPE_FN float first_of(uint32_t word) { return float_of_bits(word << 16); }
MIXUPE_FN float second_of(uint32_t word) { return float_of_bits(word & 0xffff0000u); }

// Words of a row of n values that are in halves; the last few, and all values of other dtypes, are in order.
template <typename L>
MIXUPE_FN int64_t words_of(int64_t n) {
  return std::is_same_v<L, BFloat16> ? n / (2 * lanes) * lanes : 0;
}

// Where a column's value is.
template <typename L>
MIXUPE_FN int64_t place_in_halves(int64_t column, int64_t n) {
  const int64_t words = words_of<L>(n);
  return column < 2 * words ? column / 2 + column % 2 * words : column;
}

// load_logits in halves.
template <typename L, typename T>
MIXUPE_FN T load_halves(const L* z, int64_t n, T* block) {
  return load_logits(z, n, block);
}

MIXUPE_FN float load_halves(const BFloat16* z, int64_t n, float* block) {
  const int64_t words = words_of<BFloat16>(n);
  float max = load_logits(z + 2 * words, n - 2 * words, block + 2 * words);
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < words; ++i) {
    const uint32_t word = word_of(z, i);
    const float first = first_of(word), second = second_of(word), larger = first > second ? first : second;
    block[i] = first;
    block[words + i] = second;
    max = larger > max ? larger : max;
  }
  return max;
}

// Round `count` words, a multiple of lanes, from halves: factor times first[i] to out[2i], times second[i] to out[2i + 1].
// The instruction takes subnormal numbers for 0.

struct RoundAsIntegers {
  MIXUPE_FN static void words(const float* first, const float* second, int64_t count, float factor, BFloat16* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = round_bits(first[i] * factor) >> 16 | (round_bits(second[i] * factor) & 0xffff0000u);
      std::memcpy(out + 2 * i, &word, sizeof word);
    }
  }
};

#ifdef MIXUPE_SIMD_BFLOAT16
struct RoundByInstruction {
  MIXUPE_SIMD_BFLOAT16 static inline void words(
      const float* first, const float* second, int64_t count, float factor, BFloat16* out) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 factors = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < count; i += lanes) {
      const __m512 low = _mm512_loadu_ps(first + i) * factors, high = _mm512_loadu_ps(second + i) * factors;
      const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(order, halves));
    }
  }
};
#endif

// A row's softmax gradient: dz = p (level - slope·log p) - ce·y, log p = z - lse.
struct SoftmaxGradient {
  float lse, level, slope, ce;
};

constexpr int64_t shortest_in_halves = 2 * lanes;

// For rows of shortest_in_halves or more; `out` may be the logits. A few words at a time go from widening to rounding without
// a pass over the row for each: 0.88 of the time, 0.74 with the instruction.
template <typename Round>
MIXUPE_FN void gradient_in_halves(
    const BFloat16* z, int64_t classes, const Labels<float>& l, const SoftmaxGradient& gradient, BFloat16* out) {
  constexpr int64_t most = 4 * lanes;
  alignas(64) float dz[2 * most];
  const SoftmaxGradient g = gradient;
  const auto step = [&](auto count, const BFloat16* from, int64_t start) __attribute__((always_inline)) {
    constexpr int words = count.value;
#pragma omp simd
    for (int i = 0; i < words; ++i) {
      const uint32_t word = word_of(from, i);
      dz[i] = softmax_gradient(first_of(word), g.lse, g.level, g.slope);
      dz[words + i] = softmax_gradient(second_of(word), g.lse, g.level, g.slope);
    }
    Round::words(dz, dz + words, words, 1.f, out + start);
    // The labels' columns once more: to change dz itself made the rounding wait for the stores.
    for (const int64_t column : {l.own, l.partner}) {
      const int64_t i = column - start;
      if (i < 0 || i >= 2 * words) continue;
      const float y = (column == l.own ? l.own_weight : 0.f) + (column == l.partner ? l.partner_weight : 0.f);
      out[column] = narrow<BFloat16>(dz[place_in_halves<BFloat16>(i, 2 * words)] - g.ce * y);
    }
  };
  // What is left after the last whole step is done with its neighbours before it, from logits kept before `out` is written.
  BFloat16 last[shortest_in_halves];
  std::copy_n(z + classes - shortest_in_halves, shortest_in_halves, last);
  int64_t start = 0;
  for (; start + 2 * most <= classes; start += 2 * most) step(std::integral_constant<int, most>(), z + start, start);
  for (; start + 2 * lanes <= classes; start += 2 * lanes) step(std::integral_constant<int, lanes>(), z + start, start);
  if (start < classes) step(std::integral_constant<int, lanes>(), last, classes - shortest_in_halves);
}

// Rows of n values in halves, times a factor.
template <typename Round>
MIXUPE_FN void scale_halves(const float* values, int64_t rows, int64_t n, float factor, BFloat16* out) {
  const int64_t words = words_of<BFloat16>(n);
  for (int64_t row = 0; row < rows; ++row, values += n, out += n) {
    Round::words(values, values + words, words, factor, out);
    for (int64_t i = 2 * words; i < n; ++i) out[i] = narrow<BFloat16>(values[i] * factor);
  }
}

MIXUPE_SIMD void gradient_rounded_as_integers(
    const BFloat16* z, int64_t classes, const Labels<float>& l, const SoftmaxGradient& g, BFloat16* out) {
  gradient_in_halves<RoundAsIntegers>(z, classes, l, g, out);
}

MIXUPE_SIMD void scale_rounded_as_integers(
    const float* values, int64_t rows, int64_t n, float factor, BFloat16* out) {
  scale_halves<RoundAsIntegers>(values, rows, n, factor, out);
}

#ifdef MIXUPE_SIMD_BFLOAT16
MIXUPE_SIMD_BFLOAT16 void gradient_rounded_by_instruction(
    const BFloat16* z, int64_t classes, const Labels<float>& l, const SoftmaxGradient& g, BFloat16* out) {
  gradient_in_halves<RoundByInstruction>(z, classes, l, g, out);
}

MIXUPE_SIMD_BFLOAT16 void scale_rounded_by_instruction(
    const float* values, int64_t rows, int64_t n, float factor, BFloat16* out) {
  scale_halves<RoundByInstruction>(values, rows, n, factor, out);
}

// As with torch's own kernels, the variable ATEN_CPU_CAPABILITY holds this back to a lower level.
bool rounds_by_instruction() {
  const char* level = std::getenv("ATEN_CPU_CAPABILITY");
  const bool allowed = !level || std::string_view(level).substr(0, 6) == "avx512";
  return allowed && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
}
#endif

// What this machine takes.
struct Bfloat16Rows {
  decltype(&gradient_rounded_as_integers) gradient = gradient_rounded_as_integers;
  decltype(&scale_rounded_as_integers) scale = scale_rounded_as_integers;
};

const Bfloat16Rows& bfloat16_rows() {
  static const Bfloat16Rows chosen = [] {
#ifdef MIXUPE_SIMD_BFLOAT16
    if (rounds_by_instruction()) return Bfloat16Rows{gradient_rounded_by_instruction, scale_rounded_by_instruction};
#endif
    return Bfloat16Rows{};
  }();
  return chosen;
}

}  // namespace
}  // namespace mixupe

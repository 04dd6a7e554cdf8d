// bfloat16 rows on the CPU, two neighbours at a time: the halves of a 32-bit word of memory. With lanes of one width, to
// widen is one instruction a half and nothing is shuffled. In a block of halves the first of every word come before all the
// second; sums do not mind, and the gradient goes back to its order when it is rounded.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "order.h"
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

MIXUPE_FN void set_word(BFloat16* values, int64_t i, uint32_t word) { std::memcpy(values + 2 * i, &word, sizeof word); }

MIXUPE_FN float first_of(uint32_t word) { return float_of_bits(word << 16); }
MIXUPE_FN float second_of(uint32_t word) { return float_of_bits(word & 0xffff0000u); }

MIXUPE_FN int64_t half_span(int64_t n) { return padded((n + 1) / 2); }

// load_logits in halves.
MIXUPE_FN float load_halves(const BFloat16* z, int64_t n, float* block) {
  const int64_t words = n / 2, whole = words & ~(lanes - 1), half = half_span(n);
  float max_first = -INFINITY, max_second = -INFINITY;
#pragma omp simd reduction(max : max_first, max_second)
  for (int64_t i = 0; i < whole; ++i) {
    const uint32_t word = word_of(z, i);
    const float first = first_of(word), second = second_of(word);
    block[i] = first;
    block[half + i] = second;
    max_first = first > max_first ? first : max_first;
    max_second = second > max_second ? second : max_second;
  }
  if (whole < half) {
    // The last words, masked (see load_logits); of an odd row's last there is only one half.
    constexpr uint32_t none = 0xff80ff80u;  // -∞ twice
    const uint32_t last = n % 2 ? (none & 0xffff0000u) | z[n - 1].bits : none;
#pragma omp simd reduction(max : max_first, max_second)
    for (int64_t i = 0; i < lanes; ++i) {
      const uint32_t word = i < words - whole ? word_of(z, whole + i) : i == words - whole ? last : none;
      const float first = first_of(word), second = second_of(word);
      block[whole + i] = first;
      block[half + whole + i] = second;
      max_first = first > max_first ? first : max_first;
      max_second = second > max_second ? second : max_second;
    }
  }
  return max_first > max_second ? max_first : max_second;
}

// Round `count` words from halves: factor times first[i] to out[2i], times the float in word i of
// `second`, which may be `out`, to out[2i + 1]. The instruction takes subnormal numbers for 0.

struct RoundAsIntegers {
  MIXUPE_FN static void words(const float* first, const BFloat16* second, int64_t count, float factor, BFloat16* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float lower = first[i] * factor, upper = float_of_bits(word_of(second, i)) * factor;
      set_word(out, i, round_short_bits(lower) >> 16 | (round_short_bits(upper) & 0xffff0000u));
    }
  }
};

#ifdef MIXUPE_SIMD_BFLOAT16
struct RoundByInstruction {
  MIXUPE_SIMD_BFLOAT16 static inline void words(const float* first, const BFloat16* second, int64_t count, float factor,
                                                BFloat16* out) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 factors = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < count; i += lanes) {
      const __mmask16 some = count - i < lanes ? static_cast<__mmask16>((1u << (count - i)) - 1) : 0xffff;
      const __m512 low = _mm512_maskz_loadu_ps(some, first + i) * factors,
                   high = _mm512_maskz_loadu_ps(some, second + 2 * i) * factors;
      const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      _mm512_mask_storeu_epi32(out + 2 * i, some, _mm512_permutexvar_epi16(order, halves));
    }
  }
};
#endif

constexpr int64_t shortest_in_halves = 2 * lanes;

// For rows of shortest_in_halves or more; `out` may be the logits. A few words at a time go from widening to rounding without
// a pass over the row for each: 0.88 of the time, 0.74 with the instruction.
template <typename Round>
MIXUPE_FN void gradient_in_halves(const BFloat16* z, int64_t classes, const Labels<float>& l,
                                  const SoftmaxGradient<float>& gradient, BFloat16* out) {
  constexpr int64_t most = 4 * lanes;
  alignas(64) float dz[2 * most];
  const SoftmaxGradient<float> g = short_nans(gradient);
  const auto step = [&](auto count, const BFloat16* from, int64_t start) __attribute__((always_inline)) {
    constexpr int words = count.value;
#pragma omp simd
    for (int i = 0; i < words; ++i) {
      const uint32_t word = word_of(from, i);
      dz[i] = softmax_gradient(first_of(word), g.shift, g.level, g.slope);
      dz[words + i] = softmax_gradient(second_of(word), g.shift, g.level, g.slope);
    }
    Round::words(dz, reinterpret_cast<const BFloat16*>(dz + words), words, 1.f, out + start);
    // The labels' columns once more: to change dz itself made the rounding wait for the stores.
    for (const int64_t column : {l.own, l.partner}) {
      const int64_t i = column - start;
      if (i < 0 || i >= 2 * words) continue;
      const float y = (column == l.own ? l.own_weight : 0.f) + (column == l.partner ? l.partner_weight : 0.f);
      out[column] = narrow<BFloat16>(dz[i / 2 + i % 2 * words] - g.ce * y);
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

// Rows that wait, times their factor.
template <typename Round>
MIXUPE_FN void scale_halves(const float* kept, int64_t rows, int64_t n, float factor, BFloat16* out) {
  factor = short_nan(factor);
  if (n % 2 == 0) return Round::words(kept, out, rows * n / 2, factor, out);
  for (int64_t row = 0; row < rows; ++row, kept += (n + 1) / 2, out += n) {
    Round::words(kept, out, n / 2, factor, out);
    out[n - 1] = narrow<BFloat16>(kept[n / 2] * factor);
  }
}

MIXUPE_SIMD void gradient_rounded_as_integers(const BFloat16* z, int64_t classes, const Labels<float>& l,
                                              const SoftmaxGradient<float>& g, BFloat16* out) {
  gradient_in_halves<RoundAsIntegers>(z, classes, l, g, out);
}

MIXUPE_SIMD void scale_rounded_as_integers(const float* kept, int64_t rows, int64_t n, float factor, BFloat16* out) {
  scale_halves<RoundAsIntegers>(kept, rows, n, factor, out);
}

#ifdef MIXUPE_SIMD_BFLOAT16
MIXUPE_SIMD_BFLOAT16 void gradient_rounded_by_instruction(const BFloat16* z, int64_t classes, const Labels<float>& l,
                                                          const SoftmaxGradient<float>& g, BFloat16* out) {
  gradient_in_halves<RoundByInstruction>(z, classes, l, g, out);
}

MIXUPE_SIMD_BFLOAT16 void scale_rounded_by_instruction(const float* kept, int64_t rows, int64_t n, float factor,
                                                       BFloat16* out) {
  scale_halves<RoundByInstruction>(kept, rows, n, factor, out);
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

// The seconds' part of keep_gradient, as bits in the places of their words.
MIXUPE_SIMD void keep_second_gradients(const float* e, const float* z, int words,
                                       const SoftmaxGradient<float>& gradient, BFloat16* out) {
  const SoftmaxGradient<float> g = gradient;
  const int end = static_cast<int>(padded(words));
#pragma omp simd
  for (int i = 0; i < end; ++i)
    if (i < words) set_word(out, i, bits_of(probability_gradient(e[i], z[i] - g.shift, g.level, g.slope)));
}

// The firsts of a block before all its seconds (see InOrder). Kept numbers are the firsts; the seconds wait in the places of
// their words in `out`: with all of them kept, the two passes went through a third more memory (512 rows of 1000: 1.12 of the
// time).
struct InHalves {
  MIXUPE_FN static int64_t span(int64_t n) { return 2 * half_span(n); }
  MIXUPE_FN static int64_t kept_length(int64_t n) { return (n + 1) / 2; }

  MIXUPE_FN static float load(const BFloat16* z, int64_t n, float* block) { return load_halves(z, n, block); }

  // In two loops: one for both took 1.6 times as long.
  static void keep(const float* e, const float* z, int n, const SoftmaxGradient<float>& g, float* kept, BFloat16* out) {
    keep_gradient(e, z, static_cast<int>(kept_length(n)), g, kept);
    keep_second_gradients(e + half_span(n), z + half_span(n), n / 2, g, out);
  }

  MIXUPE_FN static void subtract(int64_t column, float subtrahend, float* kept, BFloat16* out) {
    const int64_t word = column / 2;
    if (column % 2 == 0)
      kept[word] = short_nan(kept[word] - subtrahend);
    else
      set_word(out, word, bits_of(short_nan(float_of_bits(word_of(out, word)) - subtrahend)));
  }

  static void scale(const float* kept, int64_t rows, int64_t n, float factor, BFloat16* out) {
    bfloat16_rows().scale(kept, rows, n, factor, out);
  }

  // A row's whole gradient, for rows of shortest_in_halves or more; `out` may be the logits.
  static void gradient(const BFloat16* z, int64_t classes, const Labels<float>& l, const SoftmaxGradient<float>& g,
                       BFloat16* out) {
    bfloat16_rows().gradient(z, classes, l, g, out);
  }
};

template <typename L>
using Order = std::conditional_t<std::is_same_v<L, BFloat16>, InHalves, InOrder<L>>;

}  // namespace
}  // namespace mixupe

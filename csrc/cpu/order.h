// Where the values of a row lie while it is worked on: in a block, and in the memory of a gradient that waits for its factor.
#pragma once
#include "elements.h"

namespace mixupe {
namespace {

// `out` may be `values`.
template <typename L, typename T>
MIXUPE_SIMD void scale_values(const T* values, int64_t n, T factor, L* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<L>(values[i] * factor);
}

// softmax_gradient, but for the labels, of exponentials that are known.
template <typename T>
MIXUPE_SIMD void keep_gradient(const T* e, const T* z, int length, const SoftmaxGradient<T>& gradient, T* kept) {
  const SoftmaxGradient<T> g = gradient;
  const int end = static_cast<int>(padded(length));
#pragma omp simd
  for (int i = 0; i < end; ++i)
    if (i < length) kept[i] = probability_gradient(e[i], z[i] - g.shift, g.level, g.slope);
}

// In their own order: what every dtype may take, and what another order is tested against.
template <typename L>
struct InOrder {
  using T = Accumulate<L>;

  // Numbers of a block that a row of n values takes, and numbers kept of it until its factor is known.
  MIXUPE_FN static int64_t span(int64_t n) { return padded(n); }
  MIXUPE_FN static int64_t kept_length(int64_t n) { return n; }

  MIXUPE_FN static T load(const L* z, int64_t n, T* block) { return load_logits(z, n, block); }

  // A row's gradient without its labels' part and its factor; z and e = e^{z-m} are blocks.
  static void keep(const T* e, const T* z, int n, const SoftmaxGradient<T>& g, T* kept, L*) {
    keep_gradient(e, z, n, g, kept);
  }

  MIXUPE_FN static void subtract(int64_t column, T subtrahend, T* kept, L*) {
    kept[column] = short_nan(kept[column] - subtrahend);
  }

  // Rows that were kept, times their factor.
  static void scale(const T* kept, int64_t rows, int64_t n, T factor, L* out) {
    scale_values(kept, rows * n, factor, out);
  }
};

}  // namespace
}  // namespace mixupe

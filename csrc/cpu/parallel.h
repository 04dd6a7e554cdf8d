// Work shared out among torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace mixupe {

// Elements that pay for waking a thread (about 2 µs at 0.25 ns an element).
constexpr int64_t elements_per_thread = 16384;

template <typename F>
void parallel_rows(int64_t rows, int64_t elements_per_row, const F& body) {
  const int64_t grain = elements_per_thread / (elements_per_row > 0 ? elements_per_row : 1);
  torch::stable::parallel_for(0, rows, grain > 0 ? grain : 1, body);
}

}  // namespace mixupe

// Elements of tensors as both backends name them, and the dtype sums over them are made in. Conversions are each backend's.
#pragma once
#include <cstdint>
#include <type_traits>

namespace mixupe {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename L>
using Accumulate = std::conditional_t<std::is_same_v<L, double>, double, float>;

}  // namespace mixupe

// mixupe_kernels._build: row.h and the orders of bfloat16 rows, for tests. Editable installs have it, wheels do not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/bfloat16.h"
#include "row.h"

namespace py = pybind11;

namespace mixupe {
namespace {

template <typename T>
using Triple = std::tuple<T, T, T>;

template <typename T>
Stats<T> of_triple(Triple<T> t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}

template <typename T>
Triple<T> to_triple(Stats<T> s) {
  return {s.max, s.sum, s.weighted};
}

template <typename T>
Triple<T> row_stats(const std::vector<T>& z) {
  Stats<T> s = empty_stats<T>();
  for (T v : z) s.max = v > s.max ? v : s.max;
  for (T v : z) add_logit(v, finite_shift(s.max), s.sum, s.weighted);
  return to_triple(s);
}

template <typename T>
void bind(py::module_ module) {
  module.def("exp", [](T x) { return exp_fast(x); }, "e^x of x <= 0");
  module.def("log", [](T x) { return log_fast(x); }, "log x of x >= 1");
  module.def("log1p_unit", [](T x) { return log1p_unit(x); }, "log(1 + x) of x in [0, 1]");
  module.def("stats", &row_stats<T>, "(max, sum, weighted sum) of a row's logits");
  module.def("merge", [](Triple<T> a, Triple<T> b) { return to_triple(merge(of_triple(a), of_triple(b))); });
  module.def("log_sum", [](Triple<T> s) { return log_sum(of_triple(s)); });
  module.def("entropy", [](Triple<T> s) { return entropy(of_triple(s), log_sum(of_triple(s))); });
  module.def(
      "softmax_gradient",
      [](T z, T lse, T mass, T entropy, Triple<T> g) {
        const RowGradient<T> gradient{std::get<0>(g), std::get<1>(g), std::get<2>(g)};
        return softmax_gradient(z, lse, gradient_level(gradient, mass, entropy), gradient.entropy);
      },
      "p_k [g_ce·mass + g_lse - g_H (log p_k + H)]: the gradient but for the label's own term");
  module.def("sigmoid_gradient", [](T z, T y, Triple<T> g) {
    return sigmoid_gradient(z, y, RowGradient<T>{std::get<0>(g), std::get<1>(g), std::get<2>(g)});
  });
  module.def(
      "sigmoid_terms",
      [](T z) {
        T softplus = 0, entropy = 0;
        add_sigmoid_logit(z, softplus, entropy);
        return std::make_tuple(softplus, entropy);
      },
      "(softplus(z), entropy of a Bernoulli with logit z)");
  module.def(
      "penalty",
      [](int number, T q, T threshold) {
        const Penalty<T> penalty = penalty_of(number, q, threshold);
        return std::make_tuple(penalty.value, penalty.slope, penalty.moves_entropy);
      },
      "(value, slope, whether H moves it) of a penalty of q");
  module.def("sign_entropy", [](T entropy, T slope) { return sign_entropy(entropy, slope); });
  module.def("split_sign", [](T signed_entropy) {
    const SignedEntropy<T> h = split_sign(signed_entropy);
    return std::make_tuple(h.entropy, h.slope);
  });
  module.def("mix", [](T own, T other, T lam) { return mix(own, other, lam); });
}

// A bfloat16 row as the loss with its gradient works on it, in one order or the other: (max, the values of its block, sorted,
// the bits of its gradient).
template <typename Rows>
std::tuple<float, std::vector<float>, std::vector<uint16_t>> bfloat16_row(const std::vector<uint16_t>& bits,
                                                                          const std::vector<int64_t>& columns,
                                                                          float subtrahend, float factor) {
  const auto n = static_cast<int64_t>(bits.size());
  std::vector<BFloat16> z(n), out(n);
  for (int64_t i = 0; i < n; ++i) z[i] = {bits[i]};
  std::vector<float> block(Rows::span(n)), kept(Rows::kept_length(n));
  const float max = Rows::load(z.data(), n, block.data());
  // With e = z, level 1 and slope 0 what is kept is z itself: no rounding, so that the orders are the same bits.
  Rows::keep(block.data(), block.data(), static_cast<int>(n), {0, 1, 0, 0}, kept.data(), out.data());
  for (const int64_t column : columns) Rows::subtract(column, subtrahend, kept.data(), out.data());
  Rows::scale(kept.data(), 1, n, factor, out.data());
  std::vector<uint16_t> gradient(n);
  for (int64_t i = 0; i < n; ++i) gradient[i] = out[i].bits;
  std::sort(block.begin(), block.end());
  return {max, block, gradient};
}

// A bfloat16 row's softmax gradient, element by element or in halves.
std::vector<uint16_t> bfloat16_gradient(bool halves, const std::vector<uint16_t>& bits,
                                        std::pair<int64_t, int64_t> columns, std::vector<float> numbers) {
  const auto n = static_cast<int64_t>(bits.size());
  const Labels<float> l{columns.first, columns.second, numbers[0], numbers[1], 0, 1};
  const SoftmaxGradient<float> g{numbers[2], numbers[3], numbers[4], numbers[5]};
  std::vector<BFloat16> z(n);
  for (int64_t i = 0; i < n; ++i) z[i] = {bits[i]};
  if (halves) {
    InHalves::gradient(z.data(), n, l, g, z.data());
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float y = (i == l.own ? l.own_weight : 0) + (i == l.partner ? l.partner_weight : 0);
      z[i] = narrow<BFloat16>(softmax_gradient(widen(z[i]), g.shift, g.level, g.slope) - g.ce * y);
    }
  }
  std::vector<uint16_t> gradient(n);
  for (int64_t i = 0; i < n; ++i) gradient[i] = z[i].bits;
  return gradient;
}

void bind_bfloat16(py::module_ module) {
  module.def("row_in_order", &bfloat16_row<InOrder<BFloat16>>);
  module.def("row_in_halves", &bfloat16_row<InHalves>);
  module.def("gradient", &bfloat16_gradient);
  module.attr("shortest_in_halves") = shortest_in_halves;
}

}  // namespace
}  // namespace mixupe

PYBIND11_MODULE(_build, module) {
  module.doc() = "row.h for tests.";
  module.attr("penalty_count") = mixupe::penalty_count;
  module.attr("lse_is_exact_to") =
      std::make_pair(mixupe::lse_is_exact_to<float>, mixupe::lse_is_exact_to<mixupe::BFloat16>);
  mixupe::bind<float>(module.def_submodule("float32"));
  mixupe::bind<double>(module.def_submodule("float64"));
  mixupe::bind_bfloat16(module.def_submodule("bfloat16"));
}

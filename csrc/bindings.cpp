// mixupe_kernels._build: what was built, for `doctor`, and the functions of row.h, for the property tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "row.h"

namespace py = pybind11;

namespace mixupe {
namespace {

// The clone of a function that this machine runs: resolved by the same mechanism as the kernels' own.
#ifdef MIXUPE_HAS_CLONES
__attribute__((target("default"))) const char* simd_level() { return "x86-64 (SSE2)"; }
__attribute__((target("arch=x86-64-v3"))) const char* simd_level() { return "x86-64-v3 (AVX2)"; }
__attribute__((target("arch=x86-64-v4"))) const char* simd_level() { return "x86-64-v4 (AVX-512)"; }
#else
const char* simd_level() { return "the compiler's default"; }
#endif

py::dict facts() {
  py::dict found;
  found["compiler"] = MIXUPE_COMPILER;
  found["simd_level"] = simd_level();
  found["hardware_threads"] = std::thread::hardware_concurrency();
  found["stable_abi_target"] = MIXUPE_TORCH_TARGET;
  found["cuda_architectures"] = std::string(MIXUPE_CUDA_ARCHITECTURES).empty() ? "none" : MIXUPE_CUDA_ARCHITECTURES;
  return found;
}

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
  module.def("log1p_unit", [](T x) { return log1p_unit(x); }, "log(1 + x) of x in [0, 1]");
  module.def("stats", &row_stats<T>, "(max, sum, weighted sum) of a row's logits");
  module.def("merge", [](Triple<T> a, Triple<T> b) { return to_triple(merge(of_triple(a), of_triple(b))); });
  module.def("log_sum", [](Triple<T> s) { return log_sum(of_triple(s)); });
  module.def("entropy", [](Triple<T> s) { return entropy(of_triple(s), log_sum(of_triple(s))); });
  module.def("softmax_gradient", [](T z, T lse, T mass, T entropy, Triple<T> g) {
    const RowGradient<T> gradient{std::get<0>(g), std::get<1>(g), std::get<2>(g)};
    return softmax_gradient(z, lse, gradient_level(gradient, mass, entropy), gradient.entropy);
  }, "p_k [g_ce·mass + g_lse - g_H (log p_k + H)]: the gradient but for the label's own term");
  module.def("sigmoid_gradient", [](T z, T y, Triple<T> g) {
    return sigmoid_gradient(z, y, RowGradient<T>{std::get<0>(g), std::get<1>(g), std::get<2>(g)});
  });
  module.def("sigmoid_terms", [](T z) {
    T softplus = 0, entropy = 0;
    add_sigmoid_logit(z, softplus, entropy);
    return std::make_tuple(softplus, entropy);
  }, "(softplus(z), entropy of a Bernoulli with logit z)");
  module.def("penalty", [](int number, T q, T threshold) {
    const Penalty<T> penalty = penalty_of(number, q, threshold);
    return std::make_tuple(penalty.value, penalty.slope, penalty.moves_entropy);
  }, "(value, slope, whether H moves it) of a penalty of q");
  module.def("sign_entropy", [](T entropy, T slope) { return sign_entropy(entropy, slope); });
  module.def("split_sign", [](T signed_entropy) {
    const SignedEntropy<T> h = split_sign(signed_entropy);
    return std::make_tuple(h.entropy, h.slope);
  });
  module.def("mix", [](T own, T other, T lam) { return mix(own, other, lam); });
}

}  // namespace
}  // namespace mixupe

PYBIND11_MODULE(_build, module) {
  module.doc() = "What was built, and row.h for tests.";
  module.def("facts", &mixupe::facts);
  module.attr("penalty_count") = mixupe::penalty_count;
  mixupe::bind<float>(module.def_submodule("float32"));
  mixupe::bind<double>(module.def_submodule("float64"));
}

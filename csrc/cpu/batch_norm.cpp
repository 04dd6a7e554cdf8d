// Training-mode batch norm of two kinds of rows, each by its own statistics, and its backward, on the CPU.
//
// PyTorch's own kernels for float32 take about 2 ns an element forward (torch 2.13), and backward parts of one gradient would
// have to be joined. Here a thread has a group of channels to itself: the same bits for any number of threads.
#include <cmath>

#include "../operators/layout.h"
#include "elements.h"
#include "parallel.h"

namespace mixupe {
namespace {

// How a group of channels lies in memory: `count` runs of `length` elements, `stride` apart. Samples in channel order give a
// channel to a group, and every lane is of it; where channels are the dense dimension, a lane is a channel of its own.
struct Runs {
  int64_t samples, channels, spatial;
  bool a_lane_each;

  Runs(const Tensor& x, MemoryFormat format)
      : samples(x.size(0)), channels(x.size(1)), spatial(channels ? sample_size(x) / channels : 0) {
    a_lane_each = format != MemoryFormat::Contiguous || spatial == 1;
  }

  int64_t groups() const { return a_lane_each ? (channels + lanes - 1) / lanes : channels; }
  int64_t first_channel(int64_t group) const { return a_lane_each ? group * lanes : group; }
  int64_t width(int64_t group) const { return a_lane_each ? std::min(lanes, channels - group * lanes) : 1; }
  int64_t offset(int64_t group) const { return a_lane_each ? group * lanes : group * spatial; }
  int64_t length(int64_t group) const { return a_lane_each ? width(group) : spatial; }
  int64_t stride() const { return a_lane_each ? channels : channels * spatial; }
  int64_t runs_per_sample() const { return a_lane_each ? spatial : 1; }

  template <typename F>
  void parallel(const F& body) const {
    parallel_rows(groups(), (a_lane_each ? lanes : 1) * samples * spatial, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) body(group);
    });
  }
};

// The rows of one kind in one group.
struct Block {
  int64_t offset, count, length, stride;
  int64_t values;  // of a channel

  Block(const Runs& runs, int64_t group, int64_t first, int64_t last)
      : offset(runs.offset(group) + first * runs.runs_per_sample() * runs.stride()),
        count((last - first) * runs.runs_per_sample()),
        length(runs.length(group)),
        stride(runs.stride()),
        values((last - first) * runs.spatial) {}
};

// A number for each lane.
template <typename T>
struct Lanes {
  alignas(64) T of[lanes] = {};
  T& operator[](int64_t lane) { return of[lane]; }
  const T& operator[](int64_t lane) const { return of[lane]; }
};

// Calls `whole` or `rest` with (element, lane) along the block: whole packs, and what is left of a run.
template <typename Whole, typename Rest>
MIXUPE_FN void along(const Block& block, const Whole& whole, const Rest& rest) {
  const int64_t in_packs = block.length / lanes * lanes;
  for (int64_t run = 0; run < block.count; ++run) {
    const int64_t start = block.offset + run * block.stride;
    for (int64_t i = 0; i < in_packs; i += lanes) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) whole(start + i + lane, lane);
    }
    for (int64_t i = in_packs; i < block.length; ++i) rest(start + i, i - in_packs);
  }
}

template <typename F>
MIXUPE_FN void along(const Block& block, const F& f) {
  along(block, f, f);
}

// Calls f(element, lane, sums) along the block. Whole packs have sums of their own, which stay in registers.
template <int count, typename F>
MIXUPE_FN void sum_along(const Block& block, const F& f, Lanes<double> (&sums)[count]) {
  Lanes<double> packed[count], rest[count];
  along(block, [&](int64_t i, int lane) { f(i, lane, packed); }, [&](int64_t i, int lane) { f(i, lane, rest); });
  for (int sum = 0; sum < count; ++sum)
    for (int lane = 0; lane < lanes; ++lane) sums[sum][lane] = packed[sum][lane] + rest[sum][lane];
}

// Sums of squares lose what is far from the mean, so the mean comes first. In float64: a sum of 2^20 floats of one sign
// would have lost three digits.
template <typename In>
MIXUPE_SIMD void sum_values(const In* x, const Block& block, Lanes<double> (&sums)[1]) {
  sum_along(block, [=](int64_t i, int lane, auto& into) { into[0][lane] += double(widen(x[i])); }, sums);
}

template <typename In>
MIXUPE_SIMD void sum_squares(const In* x, const Block& block, const Lanes<double>& mean, Lanes<double> (&sums)[1]) {
  const auto add = [=, &mean](int64_t i, int lane, auto& into) {
    const double distance = double(widen(x[i])) - mean[lane];
    into[0][lane] += distance * distance;
  };
  sum_along(block, add, sums);
}

template <typename In, typename T>
MIXUPE_SIMD void normalise(const In* x, const Block& block, const Lanes<T>& mean, const Lanes<T>& scale,
                           const Lanes<T>& shift, In* out) {
  along(block,
        [&](int64_t i, int lane) { out[i] = narrow<In>((widen(x[i]) - mean[lane]) * scale[lane] + shift[lane]); });
}

// Σ dy and Σ dy (x - mean).
template <typename In, typename T>
MIXUPE_SIMD void sum_gradients(const In* grad, const In* x, const Block& block, const Lanes<T>& mean,
                               Lanes<double> (&sums)[2]) {
  const auto add = [=, &mean](int64_t i, int lane, auto& into) {
    into[0][lane] += double(widen(grad[i]));
    into[1][lane] += double(widen(grad[i]) * (widen(x[i]) - mean[lane]));
  };
  sum_along(block, add, sums);
}

template <typename In, typename T>
MIXUPE_SIMD void input_gradient(const In* grad, const In* x, const Block& block, const Lanes<T>& mean,
                                const Lanes<T>& mean_grad, const Lanes<T>& slope, const Lanes<T>& scale, In* out) {
  along(block, [&](int64_t i, int lane) {
    const T centred = widen(x[i]) - mean[lane];
    out[i] = narrow<In>((widen(grad[i]) - mean_grad[lane] - centred * slope[lane]) * scale[lane]);
  });
}

// Where all lanes are of one channel, each gets the sum of all.
void join(const Runs& runs, Lanes<double>& sums) {
  if (runs.a_lane_each) return;
  double total = 0;
  for (const double sum : sums.of) total += sum;
  for (double& sum : sums.of) sum = total;
}

// The channels' numbers, one for each lane of a group.
template <typename T, typename V>
Lanes<T> of_group(const Runs& runs, int64_t group, const Vector<V>& values, V otherwise) {
  Lanes<T> result;
  const int64_t first = runs.first_channel(group), width = runs.width(group);
  for (int64_t lane = 0; lane < lanes; ++lane)
    result[lane] = T(values ? values[first + std::min(lane, width - 1)] : otherwise);
  return result;
}

// A (channels,) tensor that is written where it lies.
template <typename T>
struct Written {
  T* data = nullptr;
  int64_t stride = 0;
};

template <typename In>
struct Normalisation {
  using T = Accumulate<In>;
  Runs runs;
  int64_t num_mixed;
  const In* x;
  Vector<T> weight, bias;
  double momentum, eps;
  In* out;
  T *mean, *inverse;  // mean and inverse (2, C): of mixed rows, of clean rows
  Written<T> running_mean, running_var;

  void track(int64_t group, const Lanes<double>& means, const Lanes<double>& squares, int64_t values) const {
    const auto move = [this](const Written<T>& running, int64_t channel, double value) {
      if (!running.data) return;
      T& kept = running.data[channel * running.stride];
      kept = T(momentum * value + (1 - momentum) * double(kept));
    };
    for (int64_t lane = 0; lane < runs.width(group); ++lane) {
      const int64_t channel = runs.first_channel(group) + lane;
      move(running_mean, channel, means[lane]);
      move(running_var, channel, squares[lane] / double(values - 1));
    }
  }

  void kind(int64_t group, bool clean) const {
    const Block block(runs, group, clean ? num_mixed : 0, clean ? runs.samples : num_mixed);
    Lanes<double> sums[1], means;
    sum_values(x, block, sums);
    join(runs, sums[0]);
    for (int lane = 0; lane < lanes; ++lane) means[lane] = sums[0][lane] / double(block.values);
    sum_squares(x, block, means, sums);
    join(runs, sums[0]);
    if (clean) track(group, means, sums[0], block.values);
    const Lanes<T> shift = of_group<T>(runs, group, bias, T(0));
    Lanes<T> mean_lanes, scale = of_group<T>(runs, group, weight, T(1));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double inverse_std = 1 / std::sqrt(sums[0][lane] / double(block.values) + eps);
      mean_lanes[lane] = T(means[lane]);
      scale[lane] = T(double(scale[lane]) * inverse_std);
      if (lane >= runs.width(group)) continue;
      const int64_t at = clean * runs.channels + runs.first_channel(group) + lane;
      mean[at] = mean_lanes[lane];
      inverse[at] = T(inverse_std);
    }
    normalise(x, block, mean_lanes, scale, shift, out);
  }
};

template <typename In>
struct NormalisationBackward {
  using T = Accumulate<In>;
  Runs runs;
  int64_t num_mixed;
  const In *grad, *x;
  Vector<T> weight, mean, inverse;  // mean and inverse (2·C,)
  In* grad_x;
  T *grad_weight, *grad_bias;

  void kind(int64_t group, bool clean) const {
    const Block block(runs, group, clean ? num_mixed : 0, clean ? runs.samples : num_mixed);
    const int64_t first = runs.first_channel(group);
    const auto of_kind = [&](const Vector<T>& values) {
      return of_group<T>(runs, group, Vector<T>{values.data + clean * runs.channels, 1}, T(0));
    };
    const Lanes<T> means = of_kind(mean), inverses = of_kind(inverse);
    Lanes<double> sums[2];
    sum_gradients(grad, x, block, means, sums);
    for (auto& sum : sums) join(runs, sum);
    Lanes<T> mean_grad, slope, scale = of_group<T>(runs, group, weight, T(1));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double inverse_std = inverses[lane], dot = sums[1][lane] * inverse_std;
      mean_grad[lane] = T(sums[0][lane] / double(block.values));
      slope[lane] = T(dot * inverse_std / double(block.values));
      scale[lane] = T(double(scale[lane]) * inverse_std);
      if (lane >= runs.width(group)) continue;
      grad_weight[first + lane] = T(dot + (clean ? double(grad_weight[first + lane]) : 0));
      grad_bias[first + lane] = T(sums[0][lane] + (clean ? double(grad_bias[first + lane]) : 0));
    }
    input_gradient(grad, x, block, means, mean_grad, slope, scale, grad_x);
  }
};

template <typename Job>
void run_kinds(const Job& job) {
  job.runs.parallel([&](int64_t group) {
    for (const bool clean : {false, true}) job.kind(group, clean);
  });
}

Tensor dense(const Tensor& tensor, MemoryFormat format) {
  const bool samples_follow = tensor.size(0) <= 1 || tensor.stride(0) == sample_size(tensor);
  return samples_follow && samples_are(tensor, format) ? tensor : torch::stable::contiguous(tensor, format);
}

void check_rows_of_kinds(const Tensor& x, int64_t num_mixed) {
  require_float("x", x.scalar_type());
  require(x.dim() >= 2, "x must have shape (N, C, ...), got ", shape_text(x.sizes()));
  require(0 < num_mixed && num_mixed < x.size(0), "num_mixed must be in [1, ", x.size(0) - 1, "], got ", num_mixed);
  require(x.numel() > 0, "x must have at least one value, got shape ", shape_text(x.sizes()));
}

std::tuple<Tensor, Tensor, Tensor> normalise_apart(const Tensor& x_argument, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, int64_t num_mixed, double momentum,
                                                   double eps, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var) {
  check_rows_of_kinds(x_argument, num_mixed);
  const MemoryFormat format = row_format(x_argument);
  const Tensor x = dense(x_argument, format);
  const int64_t channels = x.size(1);
  const std::vector<int64_t> sizes = sizes_of(x);
  const Tensor out = allocate(x, x.scalar_type(), sizes, dense_strides(sizes, format));
  const ScalarType compute = accumulate_dtype(x.scalar_type());
  const Tensor mean = allocate(x, compute, {2, channels}), inverse = allocate(x, compute, {2, channels});
  with_float_type(x.scalar_type(), [&](auto type) {
    using In = decltype(type);
    using T = Accumulate<In>;
    const Beside beside{"x", x};
    const auto written = [&](const char* name, const OptionalTensor& running) {
      const Vector<T> read = vector_of<T>(name, running, channels, beside);
      return Written<T>{read ? data<T>(*running) : nullptr, read.stride};
    };
    run_kinds(Normalisation<In>{Runs(x, format), num_mixed, static_cast<const In*>(x.const_data_ptr()),
                                vector_of<T>("weight", weight, channels, beside),
                                vector_of<T>("bias", bias, channels, beside), momentum, eps, data<In>(out),
                                data<T>(mean), data<T>(inverse), written("running_mean", running_mean),
                                written("running_var", running_var)});
  });
  return {out, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> normalise_apart_backward(const Tensor& grad_argument, const Tensor& x_argument,
                                                            const OptionalTensor& weight, const Tensor& mean,
                                                            const Tensor& inverse, int64_t num_mixed) {
  check_rows_of_kinds(x_argument, num_mixed);
  const MemoryFormat format = row_format(x_argument);
  const Beside beside{"x", x_argument};
  require_dtype("grad", grad_argument, x_argument.scalar_type());
  require_device("grad", grad_argument, beside);
  const std::vector<int64_t> sizes = sizes_of(x_argument);
  const auto of_grad = grad_argument.sizes();
  if (!std::equal(of_grad.begin(), of_grad.end(), sizes.begin(), sizes.end()))
    fail("grad must have shape ", shape_text(sizes), ", got ", shape_text(of_grad));
  const Tensor x = dense(x_argument, format), grad = dense(grad_argument, format);
  const int64_t channels = x.size(1);
  const Tensor grad_x = allocate(x, x.scalar_type(), sizes, dense_strides(sizes, format));
  const ScalarType compute = accumulate_dtype(x.scalar_type());
  const Tensor grad_weight = allocate(x, compute, {channels}), grad_bias = allocate(x, compute, {channels});
  with_float_type(x.scalar_type(), [&](auto type) {
    using In = decltype(type);
    using T = Accumulate<In>;
    const auto kinds = [&](const char* name, const Tensor& tensor) {
      require_dtype(name, tensor, compute);
      require_device(name, tensor, beside);
      require_shape(name, tensor, {2, channels});
      require(samples_are(tensor, MemoryFormat::Contiguous) && tensor.stride(0) == channels, name,
              " must be contiguous, got strides ", shape_text(tensor.strides()));
      return Vector<T>{static_cast<const T*>(tensor.const_data_ptr()), 1};
    };
    run_kinds(NormalisationBackward<In>{Runs(x, format), num_mixed, static_cast<const In*>(grad.const_data_ptr()),
                                        static_cast<const In*>(x.const_data_ptr()),
                                        vector_of<T>("weight", weight, channels, beside), kinds("mean", mean),
                                        kinds("inverse_std", inverse), data<In>(grad_x), data<T>(grad_weight),
                                        data<T>(grad_bias)});
  });
  return {grad_x, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(mixupe, MIXUPE_KEY, m) {
  m.impl("normalise_apart", TORCH_BOX(&normalise_apart));
  m.impl("normalise_apart_backward", TORCH_BOX(&normalise_apart_backward));
}

}  // namespace
}  // namespace mixupe

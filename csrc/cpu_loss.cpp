// ce_entropy, mixupe_loss and their backwards on the CPU: the operators, and the loss's few numbers. Rows are in cpu_rows.h.
#include <cstddef>
#include <memory>
#include <vector>

#include "cpu_rows.h"

namespace mixupe {
namespace {

void check_labels(const Vector<int64_t>& labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; labels && i < rows; ++i)
    if ((labels[i] < 0 || labels[i] >= classes) && labels[i] != ignore_index)
      fail("target must be a class in [0, ", classes - 1, "], got ", labels[i]);
}

template <typename T>
Targets<T> cpu_targets(
    TargetTensors& keep, const Tensor& logits, const OptionalTensor& partner, const OptionalTensor& lam,
    double label_smoothing, int64_t ignore_index) {
  const Targets<T> t = check_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index);
  check_labels(t.own, logits.size(0), t.classes, ignore_index);
  check_labels(t.partner, logits.size(0), t.classes, ignore_index);
  return t;
}

template <typename L>
void run(const Forward<L>& job, int64_t rows) {
  parallel_rows(rows, job.targets.classes, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
}

template <typename L>
void run(const Backward<L>& job, int64_t rows) {
  parallel_rows(rows, job.targets.classes, [&](int64_t begin, int64_t end) { backward_rows(job, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> ce_entropy(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor ce = allocate(logits, dtype, {rows}), entropy = allocate(logits, dtype, {rows}),
         lse = allocate(logits, dtype, {rows});
  TargetTensors keep{target, class_weight};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    Forward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0),
                   cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index), sigmoid,
                   data<T>(ce), data<T>(entropy), data<T>(lse)};
    run(job, rows);
  });
  return {ce, entropy, lse};
}

// The fields of a backward job that both backward operators have.
template <typename L>
Backward<L> backward_job(
    const Tensor& logits, const Tensor& out, const Targets<Accumulate<L>>& targets, bool sigmoid,
    Vector<Accumulate<L>> entropy, Vector<Accumulate<L>> lse) {
  using T = Accumulate<L>;
  Backward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), data<L>(out), out.stride(0)};
  job.targets = targets;
  job.sigmoid = sigmoid;
  job.class_weight_sum = T(targets.classes);
  if (targets.class_weight) {
    job.class_weight_sum = 0;
    for (int64_t k = 0; k < targets.classes; ++k) job.class_weight_sum += targets.class_weight[k];
  }
  job.entropy = entropy;
  job.lse = lse;
  return job;
}

Tensor ce_entropy_backward(
    const OptionalTensor& grad_ce, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
    const Tensor& logits_argument, const Tensor& entropy, const Tensor& lse, const Tensor& target,
    const OptionalTensor& partner, const OptionalTensor& lam, const OptionalTensor& class_weight,
    double label_smoothing, int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  Tensor out = allocate(logits, logits.scalar_type(), {rows, logits.size(1)});
  TargetTensors keep{target, class_weight};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const Targets<T> targets = cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index);
    Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, vector_of<T>("entropy", entropy, rows, logits),
                                      vector_of<T>("lse", lse, rows, logits));
    job.grad_ce = vector_of<T>("grad_ce", grad_ce, rows, logits);
    job.grad_entropy = vector_of<T>("grad_entropy", grad_entropy, rows, logits);
    job.grad_lse = vector_of<T>("grad_lse", grad_lse, rows, logits);
    run(job, rows);
  });
  return out;
}

constexpr int64_t ignored_label = -100;  // reference.IGNORE_INDEX

// Of a loss's sums, what the targets alone tell.
template <typename T>
LossSums count_rows(const Targets<T>& targets, const LossShape<T>& shape) {
  LossSums counts{};
  for (int64_t row = 0; row < shape.rows; ++row) {
    const T kept = targets.row_labels(row).kept;
    counts.rows_mix += row < shape.num_mixed ? kept : T(0);
    counts.rows_reg += shape.regularizes(row, kept);
  }
  return counts;
}

// Summed serially in float64: the same bits for any number of threads.
template <typename L>
LossSums sum_rows(const Forward<L>& job, LossSums sums) {
  const auto& shape = job.shape;
  for (int64_t row = 0; row < shape.num_mixed; ++row) sums.mix += job.ce[row];
  for (int64_t row = shape.rows - shape.num_reg; row < shape.rows; ++row) sums.reg += job.value[row];
  return sums;
}

// The loss and its gradient ------------------------------------------------------------------------------------------

// Where the forward leaves what it found: the loss, its five parts, and signed H and lse of each row.
template <typename T>
struct LossOutput {
  T *loss, *parts, *signed_entropy, *lse;
};

template <typename L, typename T>
void forward_loss(
    const Tensor& logits, const Targets<T>& targets, const Tensor& eta, const Tensor& reg_weight,
    const LossShape<T>& shape, bool rescale, bool sigmoid, const LossOutput<T>& out,
    const WaitingGradient<L>& gradient = {}) {
  const int64_t rows = shape.rows;
  const T eta_value = *scalar_of<T>("eta", eta, logits), weight = *scalar_of<T>("reg_weight", reg_weight, logits);
  const LossSums counts = count_rows(targets, shape);
  const std::unique_ptr<T[]> scratch(new T[2 * rows]);
  Forward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), targets, sigmoid,
                 scratch.get(), out.signed_entropy, out.lse, scratch.get() + rows, shape};
  if (gradient) {
    job.gradient = gradient;
    loss_of_sums(counts, eta_value, weight, false, out.parts);
    job.mix = out.parts[3], job.reg = out.parts[4];
  }
  run(job, rows);
  *out.loss = loss_of_sums(sum_rows(job, counts), eta_value, weight, rescale, out.parts);
}

template <typename L, typename T>
void backward_loss(
    const Tensor& logits, const Targets<T>& targets, T grad, Vector<T> parts, Vector<T> signed_entropy, Vector<T> lse,
    int64_t num_mixed, int64_t penalty, bool sigmoid, const Tensor& out) {
  Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, signed_entropy, lse);
  job.loss = true;
  job.num_mixed = num_mixed;
  job.mix = grad * parts[3];
  job.reg = grad * parts[4];
  job.penalty = static_cast<int>(penalty);
  run(job, logits.size(0));
}

template <typename L, typename T>
void scale_gradient(const WaitingGradient<L>& gradient, T factor, int64_t classes, int64_t rows) {
  parallel_rows(rows, classes, [=](int64_t begin, int64_t end) {
    const auto [out, kept] = gradient.from_row(begin, classes);
    if constexpr (std::is_same_v<L, BFloat16>)
      bfloat16_rows().scale(kept, end - begin, classes, factor, out);
    else
      scale_values(kept, (end - begin) * classes, factor, out);
  });
}

// Bytes of a gradient that stays in the last-level cache until it is scaled, and of what is kept apart until then: that
// memory stays with the thread, since its page faults would cost more than the exponentials it spares.
constexpr int64_t cached_gradient = 8 << 20, most_kept = 4 << 20;

// Where forward_rows may leave the gradient without η̂: nowhere if these targets or this size do not allow it.
template <typename L, typename T>
WaitingGradient<L> waiting_gradient(const Targets<T>& targets, bool sigmoid, const Tensor& out) {
  constexpr bool apart = !std::is_same_v<L, T>;
  const int64_t size = out.size(0) * kept_length<L>(targets.classes), bytes = size * int64_t(sizeof(T));
  if (sigmoid || targets.everywhere() || targets.classes > block_size) return {};
  if (bytes > (apart ? most_kept : cached_gradient)) return {};
  if constexpr (apart) {
    struct alignas(64) Line {
      std::byte bytes[64];
    };
    static thread_local std::vector<Line> memory;
    if (int64_t(memory.size() * sizeof(Line)) < bytes) memory.resize(bytes / sizeof(Line) + 1);
    return {data<L>(out), reinterpret_cast<T*>(memory.data())};
  } else {
    return {data<L>(out), data<T>(out)};
  }
}

// Calls f with a value of the logits' C++ type and the targets, checked.
template <typename F>
void with_targets(
    const Tensor& logits, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    double label_smoothing, const F& f) {
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using T = Accumulate<decltype(type)>;
    f(type, cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixupe_loss(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const Tensor loss = allocate(logits, dtype, {}), parts = allocate(logits, dtype, {5}),
               signed_entropy = allocate(logits, dtype, {rows}), lse = allocate(logits, dtype, {rows});
  with_targets(logits, target, partner, lam, label_smoothing, [&](auto type, const auto& targets) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const auto shape = check_loss_shape<T>(logits, num_mixed, num_reg, penalty, threshold);
    forward_loss<L, T>(logits, targets, eta, reg_weight, shape, rescale, sigmoid,
                       {data<T>(loss), data<T>(parts), data<T>(signed_entropy), data<T>(lse)});
  });
  return {loss, parts, signed_entropy, lse};
}

std::tuple<Tensor, Tensor, Tensor> mixupe_loss_with_gradient(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const Tensor loss = allocate(logits, dtype, {}), parts = allocate(logits, dtype, {5}),
               gradient = allocate(logits, logits.scalar_type(), sizes_of(logits));
  with_targets(logits, target, partner, lam, label_smoothing, [&](auto type, const auto& targets) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const auto shape = check_loss_shape<T>(logits, num_mixed, num_reg, penalty, threshold);
    const std::unique_ptr<T[]> rows(new T[2 * shape.rows]);
    const LossOutput<T> out{data<T>(loss), data<T>(parts), rows.get(), rows.get() + shape.rows};
    const WaitingGradient<L> waiting = waiting_gradient<L>(targets, sigmoid, gradient);
    forward_loss(logits, targets, eta, reg_weight, shape, rescale, sigmoid, out, waiting);
    if (!waiting)
      backward_loss<L, T>(logits, targets, 1, {out.parts, 1}, {out.signed_entropy, 1}, {out.lse, 1}, num_mixed, penalty,
                          sigmoid, gradient);
    else if (rescale || !std::is_same_v<L, T>)
      scale_gradient(waiting, out.parts[2], targets.classes, shape.rows);
  });
  return {loss, parts, gradient};
}

void mixupe_loss_backward_out(
    const Tensor& grad, const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& parts, const Tensor& signed_entropy, const Tensor& lse, int64_t num_mixed,
    int64_t penalty, double label_smoothing, bool sigmoid, Tensor out) {
  const Tensor logits = check_logits(logits_argument);
  const GradientOutput result = check_gradient_output(logits, out);
  with_targets(logits, target, partner, lam, label_smoothing, [&](auto type, const auto& targets) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const auto shape = check_loss_shape<T>(logits, num_mixed, 0, penalty, 0);
    backward_loss<L>(logits, targets, *scalar_of<T>("grad", grad, logits), vector_of<T>("parts", parts, 5, logits),
                     vector_of<T>("signed_entropy", signed_entropy, shape.rows, logits),
                     vector_of<T>("lse", lse, shape.rows, logits), num_mixed, penalty, sigmoid, result.buffer);
  });
  if (result.apart) torch::stable::copy_(out, result.buffer);
}

Tensor mixupe_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& parts, const Tensor& signed_entropy, const Tensor& lse, int64_t num_mixed,
    int64_t penalty, double label_smoothing, bool sigmoid) {
  const Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  mixupe_loss_backward_out(grad, logits, target, partner, lam, parts, signed_entropy, lse, num_mixed, penalty,
                           label_smoothing, sigmoid, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixupe, CPU, m) {
  m.impl("ce_entropy", TORCH_BOX(&ce_entropy));
  m.impl("ce_entropy_backward", TORCH_BOX(&ce_entropy_backward));
  m.impl("mixupe_loss", TORCH_BOX(&mixupe_loss));
  m.impl("mixupe_loss_with_gradient", TORCH_BOX(&mixupe_loss_with_gradient));
  m.impl("mixupe_loss_backward", TORCH_BOX(&mixupe_loss_backward));
  m.impl("mixupe_loss_backward_out", TORCH_BOX(&mixupe_loss_backward_out));
}

}  // namespace mixupe

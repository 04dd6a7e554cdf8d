// ce_entropy, mixupe_loss and their backwards on CUDA: the operators and their launches. Kernels are in cuda_rows.h.
#include "cuda_rows.h"

namespace mixupe {
namespace {

constexpr int64_t ignored_label = -100;  // reference.IGNORE_INDEX

// Calls f with the team for the job's rows and, as a constant, whether they are sigmoid rows.
template <typename Job, typename F>
void with_variant(const Job& job, const F& f) {
  with_team(job.targets.classes, [&](auto team) {
    job.sigmoid ? f(team, std::true_type{}) : f(team, std::false_type{});
  });
}

template <typename L>
void run(const Forward<L>& job, const Tensor& logits) {
  with_variant(job, [&](auto team, auto sigmoid) {
    using Rows = decltype(team);
    launch(forward_rows<Rows, sigmoid.value, L>, Rows::blocks(job.shape.rows), Rows::block, logits, job);
  });
}

template <typename L>
void run(const Backward<L>& job, const Tensor& logits) {
  with_variant(job, [&](auto team, auto sigmoid) {
    using Rows = decltype(team);
    launch(backward_rows<Rows, sigmoid.value, L>, Rows::blocks(job.rows), Rows::block, logits, job);
  });
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
    run(Forward<L>{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0),
                   check_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index), sigmoid, data<T>(ce),
                   data<T>(entropy), data<T>(lse), LossShape<T>{rows}},
        logits);
  });
  return {ce, entropy, lse};
}

// The fields of a backward job that both backward operators have.
template <typename L>
Backward<L> backward_job(
    const Tensor& logits, const Tensor& out, const Targets<Accumulate<L>>& targets, bool sigmoid,
    const Tensor& entropy, const Tensor& lse) {
  using T = Accumulate<L>;
  return {static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), data<L>(out), out.stride(0), targets,
          sigmoid, vector_of<T>("entropy", entropy, logits.size(0), logits),
          vector_of<T>("lse", lse, logits.size(0), logits), logits.size(0)};
}

Tensor ce_entropy_backward(
    const OptionalTensor& grad_ce, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
    const Tensor& logits_argument, const Tensor& entropy, const Tensor& lse, const Tensor& target,
    const OptionalTensor& partner, const OptionalTensor& lam, const OptionalTensor& class_weight,
    double label_smoothing, int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  TargetTensors keep{target, class_weight};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const Targets<T> targets = check_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index);
    Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, entropy, lse);
    job.grad_ce = vector_of<T>("grad_ce", grad_ce, rows, logits);
    job.grad_entropy = vector_of<T>("grad_entropy", grad_entropy, rows, logits);
    job.grad_lse = vector_of<T>("grad_lse", grad_lse, rows, logits);
    run(job, logits);
  });
  return out;
}

// The loss and its gradient

struct Loss {
  Tensor loss, parts, signed_entropy, lse;
};

template <typename L, typename T>
Loss forward_loss(
    const Tensor& logits, const Targets<T>& targets, const Tensor& eta, const Tensor& reg_weight,
    const LossShape<T>& shape, bool rescale, bool sigmoid) {
  const ScalarType dtype = dtype_of<T>();
  const Loss out{allocate(logits, dtype, {}), allocate(logits, dtype, {5}), allocate(logits, dtype, {shape.rows}),
                 allocate(logits, dtype, {shape.rows})};
  const Tensor ce = allocate(logits, dtype, {shape.rows}), kept = allocate(logits, dtype, {shape.rows}),
               value = allocate(logits, dtype, {shape.rows});
  run(Forward<L>{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), targets, sigmoid, data<T>(ce),
                 data<T>(out.signed_entropy), data<T>(out.lse), shape, data<T>(kept), data<T>(value)},
      logits);
  using All = Team<1024>;
  launch(total_loss<All, T>, 1, All::block, logits,
         Total<T>{data<T>(ce), data<T>(kept), data<T>(value), scalar_of<T>("eta", eta, logits),
                  scalar_of<T>("reg_weight", reg_weight, logits), shape, rescale, data<T>(out.loss),
                  data<T>(out.parts)});
  return out;
}

template <typename L, typename T>
void backward_loss(
    const Tensor& logits, const Targets<T>& targets, const T* grad, const Tensor& parts, const Tensor& signed_entropy,
    const Tensor& lse, int64_t num_mixed, int64_t penalty, bool sigmoid, const Tensor& out) {
  Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, signed_entropy, lse);
  job.loss = true;
  job.grad = grad;
  job.parts = vector_of<T>("parts", parts, 5, logits);
  job.num_mixed = num_mixed;
  job.penalty = static_cast<int>(penalty);
  run(job, logits);
}

// Calls f with a value of the logits' C++ type and the targets, checked.
template <typename F>
void with_targets(
    const Tensor& logits, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    double label_smoothing, const F& f) {
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using T = Accumulate<decltype(type)>;
    f(type, check_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixupe_loss(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  std::optional<Loss> out;
  with_targets(logits, target, partner, lam, label_smoothing, [&](auto type, const auto& targets) {
    using L = decltype(type);
    const auto shape = check_loss_shape<Accumulate<L>>(logits, num_mixed, num_reg, penalty, threshold);
    out = forward_loss<L>(logits, targets, eta, reg_weight, shape, rescale, sigmoid);
  });
  return {out->loss, out->parts, out->signed_entropy, out->lse};
}

std::tuple<Tensor, Tensor, Tensor> mixupe_loss_with_gradient(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const Tensor gradient = allocate(logits, logits.scalar_type(), sizes_of(logits));
  std::optional<Loss> out;
  with_targets(logits, target, partner, lam, label_smoothing, [&](auto type, const auto& targets) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const auto shape = check_loss_shape<T>(logits, num_mixed, num_reg, penalty, threshold);
    out = forward_loss<L>(logits, targets, eta, reg_weight, shape, rescale, sigmoid);
    backward_loss<L, T>(logits, targets, nullptr, out->parts, out->signed_entropy, out->lse, num_mixed, penalty,
                        sigmoid, gradient);
  });
  return {out->loss, out->parts, gradient};
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
    check_loss_shape<T>(logits, num_mixed, 0, penalty, 0);
    backward_loss<L, T>(logits, targets, scalar_of<T>("grad", grad, logits), parts, signed_entropy, lse, num_mixed,
                        penalty, sigmoid, result.buffer);
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

STABLE_TORCH_LIBRARY_IMPL(mixupe, CUDA, m) {
  m.impl("ce_entropy", TORCH_BOX(&ce_entropy));
  m.impl("ce_entropy_backward", TORCH_BOX(&ce_entropy_backward));
  m.impl("mixupe_loss", TORCH_BOX(&mixupe_loss));
  m.impl("mixupe_loss_with_gradient", TORCH_BOX(&mixupe_loss_with_gradient));
  m.impl("mixupe_loss_backward", TORCH_BOX(&mixupe_loss_backward));
  m.impl("mixupe_loss_backward_out", TORCH_BOX(&mixupe_loss_backward_out));
}

}  // namespace mixupe

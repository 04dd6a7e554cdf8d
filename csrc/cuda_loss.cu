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
    launch(backward_rows<Rows, sigmoid.value, L>, Rows::blocks(job.shape.rows), Rows::block, logits, job);
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
    const Tensor& entropy, const Tensor& lse, const LossShape<Accumulate<L>>& shape) {
  using T = Accumulate<L>;
  return {static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), data<L>(out), out.stride(0), targets,
          sigmoid, vector_of<T>("entropy", entropy, logits.size(0), logits),
          vector_of<T>("lse", lse, logits.size(0), logits), shape};
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
    Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, entropy, lse, LossShape<T>{rows});
    job.grad_ce = vector_of<T>("grad_ce", grad_ce, rows, logits);
    job.grad_entropy = vector_of<T>("grad_entropy", grad_entropy, rows, logits);
    job.grad_lse = vector_of<T>("grad_lse", grad_lse, rows, logits);
    run(job, logits);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixupe_loss(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  check_loss_rows(rows, num_mixed, num_reg, penalty);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor loss = allocate(logits, dtype, {}), parts = allocate(logits, dtype, {5}), ce = allocate(logits, dtype, {rows}),
         entropy = allocate(logits, dtype, {rows}), lse = allocate(logits, dtype, {rows}),
         kept = allocate(logits, dtype, {rows}), value = allocate(logits, dtype, {rows});
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const LossShape<T> shape{rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
    run(Forward<L>{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0),
                   check_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label), sigmoid, data<T>(ce),
                   data<T>(entropy), data<T>(lse), shape, data<T>(kept), data<T>(value)},
        logits);
    using All = Team<1024>;
    launch(total_loss<All, T>, 1, All::block, logits,
           Total<T>{data<T>(ce), data<T>(kept), data<T>(value), scalar_of<T>("eta", eta, logits),
                    scalar_of<T>("reg_weight", reg_weight, logits), shape, rescale, data<T>(loss), data<T>(parts)});
  });
  return {loss, parts, ce, entropy, lse};
}

void mixupe_loss_backward_out(
    const Tensor& grad, const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& eta, const Tensor& reg_weight, const Tensor& parts, const Tensor& ce,
    const Tensor& entropy, const Tensor& lse, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    double label_smoothing, bool sigmoid, Tensor out) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  check_loss_rows(rows, num_mixed, num_reg, penalty);
  require_dtype("out", out, logits.scalar_type());
  require_device("out", out, logits);
  require(sizes_of(out) == sizes_of(logits), "out must have the shape of logits");
  require(!overlap(logits, out) || same_memory(logits, out), "out must be logits itself or not overlap it");
  const bool dense = samples_are(out, MemoryFormat::Contiguous) && (rows <= 1 || out.stride(0) >= out.size(1));
  const Tensor result = dense ? out : allocate(logits, logits.scalar_type(), sizes_of(logits));
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const Targets<T> targets = check_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label);
    const LossShape<T> shape{rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
    Backward<L> job = backward_job<L>(logits, result, targets, sigmoid, entropy, lse, shape);
    job.ce = vector_of<T>("ce", ce, rows, logits);
    job.parts = vector_of<T>("parts", parts, 5, logits);
    job.grad = scalar_of<T>("grad", grad, logits);
    job.eta = scalar_of<T>("eta", eta, logits);
    job.reg_weight = scalar_of<T>("reg_weight", reg_weight, logits);
    run(job, logits);
  });
  if (!dense) torch::stable::copy_(out, result);
}

Tensor mixupe_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& eta, const Tensor& reg_weight, const Tensor& parts, const Tensor& ce,
    const Tensor& entropy, const Tensor& lse, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    double label_smoothing, bool sigmoid) {
  const Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  mixupe_loss_backward_out(grad, logits, target, partner, lam, eta, reg_weight, parts, ce, entropy, lse, num_mixed,
                           num_reg, penalty, threshold, label_smoothing, sigmoid, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixupe, CUDA, m) {
  m.impl("ce_entropy", TORCH_BOX(&ce_entropy));
  m.impl("ce_entropy_backward", TORCH_BOX(&ce_entropy_backward));
  m.impl("mixupe_loss", TORCH_BOX(&mixupe_loss));
  m.impl("mixupe_loss_backward", TORCH_BOX(&mixupe_loss_backward));
  m.impl("mixupe_loss_backward_out", TORCH_BOX(&mixupe_loss_backward_out));
}

}  // namespace mixupe

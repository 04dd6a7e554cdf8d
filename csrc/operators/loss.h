// ce_entropy, mixupe_loss and their backwards on the host, over what each backend defines: run_rows, run_gradient, run_loss,
// run_loss_with_gradient and check_values.
#pragma once
#include <cmath>
#include <optional>
#include <tuple>

#include "layout.h"
#include "rows.h"

namespace mixupe {
namespace {

constexpr int64_t ignored_label = -100;  // of the losses; ce_entropy takes another

// Refuses labels out of range and λ outside [0, 1], now or, where reading them would wait for a device, as the kernels read them.
template <typename T>
void check_values(const Targets<T>& targets, int64_t rows);

template <typename L>
void run_rows(const Forward<L>& job, const Tensor& like);

template <typename L>
void run_gradient(const Backward<L>& job, const Tensor& like);

// The rows' scratch memory is the backend's.
template <typename L>
void run_loss(Loss<L> job, const Tensor& like);

// The same with the gradient; signed H and lse of the rows are scratch, too.
template <typename L>
void run_loss_with_gradient(Loss<L> job, const Tensor& gradient);

inline Tensor check_logits(const Tensor& logits) {
  require_float("logits", logits.scalar_type());
  if (logits.dim() != 2 || logits.size(1) == 0)
    fail("logits must have shape (N, C) with C >= 1, got ", shape_text(logits.sizes()));
  return with_dense_rows(logits);
}

// A caller's targets, and the copies of those that had to be made dense.
struct TargetTensors {
  Tensor labels;
  const OptionalTensor &partner_labels, &lam;
  OptionalTensor class_weight;
  double label_smoothing;
  int64_t ignore_index;
};

template <typename T>
Targets<T> check_targets(TargetTensors& given, const Tensor& logits) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const Beside beside{"logits", logits};
  if (!(given.label_smoothing >= 0 && given.label_smoothing <= 1))
    fail("label_smoothing must be a number in [0, 1], got ", shortest(given.label_smoothing));
  Targets<T> t;
  t.classes = classes;
  t.ignore_index = given.ignore_index;
  t.label_smoothing = static_cast<T>(given.label_smoothing);
  require(given.partner_labels.has_value() == given.lam.has_value(), "partner_labels and lam must be given together");
  if (given.labels.dim() == 2) {
    require(!given.lam, "lam must be None where labels are soft: mix them before");
    require_dtype("labels", given.labels, dtype_of<T>());
    require_device("labels", given.labels, beside);
    require_shape("labels", given.labels, {rows, classes});
    given.labels = with_dense_rows(given.labels);
    t.dense = static_cast<const T*>(given.labels.const_data_ptr());
    t.dense_stride = given.labels.stride(0);
  } else {
    t.own = vector_of<int64_t>("labels", given.labels, rows, beside);
    t.partner = vector_of<int64_t>("partner_labels", given.partner_labels, rows, beside);
    t.lam = vector_of<T>("lam", given.lam, rows, beside);
  }
  if (given.class_weight) {
    vector_of<T>("class_weight", *given.class_weight, classes, beside);
    given.class_weight = torch::stable::contiguous(*given.class_weight);
    t.class_weight = static_cast<const T*>(given.class_weight->const_data_ptr());
  }
  check_values(t, rows);
  return t;
}

// Calls f with a value of the logits' C++ type and the targets, checked.
template <typename F>
void with_targets(const Tensor& logits, TargetTensors given, const F& f) {
  with_float_type(logits.scalar_type(),
                  [&](auto type) { f(type, check_targets<Accumulate<decltype(type)>>(given, logits)); });
}

template <typename T>
LossShape<T> check_loss_shape(const Tensor& logits, int64_t num_mixed, int64_t num_reg, int64_t penalty,
                              double threshold) {
  const int64_t rows = logits.size(0);
  require(num_mixed >= 0 && num_mixed <= rows, "num_mixed must be in [0, ", rows, "], got ", num_mixed);
  require(num_reg >= 0 && num_reg <= rows, "num_reg must be in [0, ", rows, "], got ", num_reg);
  require(penalty >= 0 && penalty < penalty_count, "penalty must be in [0, ", penalty_count - 1, "], got ", penalty);
  return {rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
}

// Where the gradient is written: `out` itself, or a buffer of its own to be copied to it.
struct GradientOutput {
  Tensor buffer;
  bool apart;
};

inline GradientOutput check_gradient_output(const Tensor& logits, const Tensor& out) {
  require_dtype("out", out, logits.scalar_type());
  require_device("out", out, {"logits", logits});
  require_shape("out", out, {logits.size(0), logits.size(1)});
  require_no_shared_elements("out", out);
  require(!overlap(logits, out) || same_memory(logits, out), "out must be logits itself or not overlap it");
  const bool dense = samples_are(out, MemoryFormat::Contiguous) && (out.size(0) <= 1 || out.stride(0) >= out.size(1));
  return dense ? GradientOutput{out, false}
               : GradientOutput{allocate(logits, logits.scalar_type(), sizes_of(logits)), true};
}

template <typename L, typename T>
Forward<L> forward_job(const Tensor& logits, const Targets<T>& targets, bool sigmoid, const LossShape<T>& shape, T* ce,
                       T* entropy, T* lse) {
  return {static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), targets, sigmoid, shape, ce, entropy, lse};
}

template <typename L, typename T>
Backward<L> backward_job(const Tensor& logits, const Tensor& out, const Targets<T>& targets, bool sigmoid,
                         Vector<T> entropy, Vector<T> lse) {
  return {static_cast<const L*>(logits.const_data_ptr()),
          logits.stride(0),
          data<L>(out),
          out.stride(0),
          logits.size(0),
          targets,
          sigmoid,
          entropy,
          lse};
}

// The backward of a loss whose upstream gradient is 1, from what its forward left.
template <typename L>
Backward<L> backward_of(const Loss<L>& loss, const Tensor& gradient) {
  const Forward<L>& rows = loss.rows;
  Backward<L> job{rows.logits,  rows.stride,  data<L>(gradient), gradient.stride(0), rows.shape.rows,
                  rows.targets, rows.sigmoid, {rows.entropy, 1}, {rows.lse, 1}};
  job.loss = true;
  job.parts = {loss.parts, 1};
  job.num_mixed = rows.shape.num_mixed;
  job.penalty = rows.shape.penalty;
  return job;
}

// Operators

std::tuple<Tensor, Tensor, Tensor> ce_entropy(const Tensor& logits_argument, const Tensor& labels,
                                              const OptionalTensor& partner_labels, const OptionalTensor& lam,
                                              const OptionalTensor& class_weight, double label_smoothing,
                                              int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const Tensor ce = allocate(logits, dtype, {rows}), entropy = allocate(logits, dtype, {rows}),
               lse = allocate(logits, dtype, {rows});
  with_targets(logits, {labels, partner_labels, lam, class_weight, label_smoothing, ignore_index},
               [&](auto type, const auto& targets) {
                 using L = decltype(type);
                 using T = Accumulate<L>;
                 const LossShape<T> shape{rows};
                 run_rows(forward_job<L>(logits, targets, sigmoid, shape, data<T>(ce), data<T>(entropy), data<T>(lse)),
                          logits);
               });
  return {ce, entropy, lse};
}

Tensor ce_entropy_backward(const OptionalTensor& grad_ce, const OptionalTensor& grad_entropy,
                           const OptionalTensor& grad_lse, const Tensor& logits_argument, const Tensor& entropy,
                           const Tensor& lse, const Tensor& labels, const OptionalTensor& partner_labels,
                           const OptionalTensor& lam, const OptionalTensor& class_weight, double label_smoothing,
                           int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  with_targets(logits, {labels, partner_labels, lam, class_weight, label_smoothing, ignore_index},
               [&](auto type, const auto& targets) {
                 using L = decltype(type);
                 using T = Accumulate<L>;
                 Backward<L> job = backward_job<L>(logits, out, targets, sigmoid,
                                                   vector_of<T>("entropy", entropy, rows, {"logits", logits}),
                                                   vector_of<T>("lse", lse, rows, {"logits", logits}));
                 job.grad_ce = vector_of<T>("grad_ce", grad_ce, rows, {"logits", logits});
                 job.grad_entropy = vector_of<T>("grad_entropy", grad_entropy, rows, {"logits", logits});
                 job.grad_lse = vector_of<T>("grad_lse", grad_lse, rows, {"logits", logits});
                 run_gradient(job, logits);
               });
  return out;
}

// The numbers of a loss, in the order of its operators' arguments.
struct LossNumbers {
  int64_t num_mixed, num_reg, penalty;
  double threshold;
  bool rescale, sigmoid;
  double clean_weight;
};

void check_clean_weight(double clean_weight, bool of_mixed_rows) {
  if (!(clean_weight >= 0 && std::isfinite(clean_weight)))
    fail("clean_weight must be a number >= 0, got ", shortest(clean_weight));
  if (clean_weight != 0 && of_mixed_rows)
    fail("clean_weight must be 0 where R is of mixed rows (regularize=\"mixed\"): no row is clean, got ",
         shortest(clean_weight));
}

struct LossOutputs {
  Tensor loss, parts;
};

// Calls f with the loss's job, whose rows have nowhere to go yet; the job writes into the result.
template <typename F>
LossOutputs with_loss(const Tensor& logits, const TargetTensors& target, const Tensor& eta, const Tensor& reg_weight,
                      const LossNumbers& given, const F& f) {
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const LossOutputs out{allocate(logits, dtype, {}), allocate(logits, dtype, {loss_parts})};
  with_targets(logits, target, [&](auto type, const auto& targets) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const auto shape = check_loss_shape<T>(logits, given.num_mixed, given.num_reg, given.penalty, given.threshold);
    check_clean_weight(given.clean_weight, shape.num_reg > 0 && shape.num_mixed == shape.rows);
    f(Loss<L>{forward_job<L, T>(logits, targets, given.sigmoid, shape, nullptr, nullptr, nullptr),
              scalar_of<T>("eta", eta, {"logits", logits}), scalar_of<T>("reg_weight", reg_weight, {"logits", logits}),
              given.clean_weight, given.rescale, data<T>(out.loss), data<T>(out.parts)});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixupe_loss(const Tensor& logits_argument, const Tensor& labels,
                                                       const OptionalTensor& partner_labels, const OptionalTensor& lam,
                                                       const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed,
                                                       int64_t num_reg, int64_t penalty, double threshold, bool rescale,
                                                       double label_smoothing, bool sigmoid, double clean_weight) {
  const Tensor logits = check_logits(logits_argument);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const Tensor signed_entropy = allocate(logits, dtype, {logits.size(0)}),
               lse = allocate(logits, dtype, {logits.size(0)});
  const auto [loss, parts] =
      with_loss(logits, {labels, partner_labels, lam, std::nullopt, label_smoothing, ignored_label}, eta, reg_weight,
                {num_mixed, num_reg, penalty, threshold, rescale, sigmoid, clean_weight}, [&](auto job) {
                  using T = typename decltype(job)::T;
                  job.rows.entropy = data<T>(signed_entropy), job.rows.lse = data<T>(lse);
                  run_loss(job, logits);
                });
  return {loss, parts, signed_entropy, lse};
}

std::tuple<Tensor, Tensor, Tensor> mixupe_loss_with_gradient(
    const Tensor& logits_argument, const Tensor& labels, const OptionalTensor& partner_labels,
    const OptionalTensor& lam, const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg,
    int64_t penalty, double threshold, bool rescale, double label_smoothing, bool sigmoid, double clean_weight) {
  const Tensor logits = check_logits(logits_argument);
  const Tensor gradient = allocate(logits, logits.scalar_type(), sizes_of(logits));
  const auto [loss, parts] =
      with_loss(logits, {labels, partner_labels, lam, std::nullopt, label_smoothing, ignored_label}, eta, reg_weight,
                {num_mixed, num_reg, penalty, threshold, rescale, sigmoid, clean_weight},
                [&](auto job) { run_loss_with_gradient(job, gradient); });
  return {loss, parts, gradient};
}

void mixupe_loss_backward_out(const Tensor& grad, const Tensor& logits_argument, const Tensor& labels,
                              const OptionalTensor& partner_labels, const OptionalTensor& lam, const Tensor& parts,
                              const Tensor& signed_entropy, const Tensor& lse, int64_t num_mixed, int64_t penalty,
                              double label_smoothing, bool sigmoid, Tensor out) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const GradientOutput result = check_gradient_output(logits, out);
  with_targets(logits, {labels, partner_labels, lam, std::nullopt, label_smoothing, ignored_label},
               [&](auto type, const auto& targets) {
                 using L = decltype(type);
                 using T = Accumulate<L>;
                 const LossShape<T> shape = check_loss_shape<T>(logits, num_mixed, 0, penalty, 0);
                 Backward<L> job =
                     backward_job<L>(logits, result.buffer, targets, sigmoid,
                                     vector_of<T>("signed_entropy", signed_entropy, rows, {"logits", logits}),
                                     vector_of<T>("lse", lse, rows, {"logits", logits}));
                 job.loss = true;
                 job.grad = scalar_of<T>("grad", grad, {"logits", logits});
                 job.parts = vector_of<T>("parts", parts, loss_parts, {"logits", logits});
                 job.num_mixed = shape.num_mixed, job.penalty = shape.penalty;
                 run_gradient(job, logits);
               });
  if (result.apart) torch::stable::copy_(out, result.buffer);
}

Tensor mixupe_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                            const OptionalTensor& partner_labels, const OptionalTensor& lam, const Tensor& parts,
                            const Tensor& signed_entropy, const Tensor& lse, int64_t num_mixed, int64_t penalty,
                            double label_smoothing, bool sigmoid) {
  const Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  mixupe_loss_backward_out(grad, logits, labels, partner_labels, lam, parts, signed_entropy, lse, num_mixed, penalty,
                           label_smoothing, sigmoid, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(mixupe, MIXUPE_KEY, m) {
  m.impl("ce_entropy", TORCH_BOX(&ce_entropy));
  m.impl("ce_entropy_backward", TORCH_BOX(&ce_entropy_backward));
  m.impl("mixupe_loss", TORCH_BOX(&mixupe_loss));
  m.impl("mixupe_loss_with_gradient", TORCH_BOX(&mixupe_loss_with_gradient));
  m.impl("mixupe_loss_backward", TORCH_BOX(&mixupe_loss_backward));
  m.impl("mixupe_loss_backward_out", TORCH_BOX(&mixupe_loss_backward_out));
}

}  // namespace
}  // namespace mixupe

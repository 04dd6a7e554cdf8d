// ce_entropy, mixupe_loss and their backwards on the CPU: rows shared out among threads, and the loss's few numbers. What is
// done to a row is in rows.h.
#include "../operators/loss.h"

#include <cmath>
#include <cstddef>
#include <memory>
#include <vector>

#include "few_classes.h"
#include "parallel.h"
#include "rows.h"
#include "values.h"

namespace mixupe {
namespace {

template <typename T>
void check_values(const Targets<T>& targets, int64_t rows) {
  check_labels("labels", targets.own, rows, targets.classes, targets.ignore_index);
  check_labels("partner_labels", targets.partner, rows, targets.classes, targets.ignore_index);
  check_weights(targets.lam, rows);
}

template <typename L>
void run_rows(const Forward<L>& job, const OnePass<L>& one_pass) {
  const int64_t rows = job.shape.rows, classes = job.targets.classes;
  if constexpr (std::is_same_v<Accumulate<L>, float>) {
    if (one_pass.gradient ? one_pass.gradient.grouped : in_groups<L>(job.targets, job.sigmoid))
      return parallel_rows(groups_of(rows), group_size(classes),
                           [&](int64_t begin, int64_t end) { forward_groups(job, one_pass, begin, end); });
  }
  parallel_rows(rows, classes, [&](int64_t begin, int64_t end) { forward_rows(job, one_pass, begin, end); });
}

template <typename L>
void run_rows(const Forward<L>& job, const Tensor&) {
  run_rows(job, OnePass<L>{});
}

template <typename L>
void run_gradient(const Backward<L>& job, const Tensor&) {
  using T = Accumulate<L>;
  const Targets<T>& t = job.targets;
  T class_weight_sum = t.class_weight ? T(0) : T(t.classes);
  for (int64_t k = 0; t.class_weight && k < t.classes; ++k) class_weight_sum += t.class_weight[k];
  parallel_rows(job.rows, t.classes,
                [&](int64_t begin, int64_t end) { backward_rows(job, class_weight_sum, begin, end); });
}

// Of a loss's sums, what the targets alone tell.
template <typename T>
LossSums count_rows(const Targets<T>& targets, const LossShape<T>& shape) {
  LossSums counts{};
  for (int64_t row = 0; row < shape.rows; ++row) {
    const T kept = targets.row_labels(row).kept;
    (row < shape.num_mixed ? counts.rows_mix : counts.rows_clean) += kept;
    counts.rows_reg += shape.regularizes(row, kept);
  }
  return counts;
}

// Summed serially in float64: the same bits for any number of threads.
template <typename L>
LossSums sum_rows(const Forward<L>& job, LossSums sums) {
  const auto& shape = job.shape;
  for (int64_t row = 0; row < shape.num_mixed; ++row) sums.mix += job.ce[row];
  for (int64_t row = shape.num_mixed; row < shape.rows; ++row) sums.clean += job.ce[row];
  for (int64_t row = shape.rows - shape.num_reg; row < shape.rows; ++row) sums.reg += job.value[row];
  return sums;
}

// The loss, and where it has a place to wait its gradient without η̂.
template <typename L>
void loss_of_rows(Loss<L> job, const WaitingGradient<L>& gradient) {
  using T = Accumulate<L>;
  Forward<L>& rows = job.rows;
  const LossWeights weights = weights_of(job);
  const LossSums counts = count_rows(rows.targets, rows.shape);
  const std::unique_ptr<T[]> scratch(new T[2 * rows.shape.rows]);
  rows.ce = scratch.get(), rows.value = scratch.get() + rows.shape.rows;
  OnePass<L> one_pass{gradient};
  if (gradient) {
    loss_of_sums(counts, weights, false, job.parts);
    one_pass.mix = job.parts[of_mix], one_pass.clean = job.parts[of_clean], one_pass.reg = job.parts[of_penalty];
  }
  run_rows(rows, one_pass);
  *job.loss = loss_of_sums(sum_rows(rows, counts), weights, job.rescale, job.parts);
}

template <typename L>
void run_loss(Loss<L> job, const Tensor&) {
  loss_of_rows(job, WaitingGradient<L>{});
}

template <typename L, typename T>
void scale_gradient(const WaitingGradient<L>& gradient, T factor, int64_t classes, int64_t rows) {
  if constexpr (std::is_same_v<T, float>) {
    if (gradient.grouped)
      return parallel_rows(groups_of(rows), group_size(classes), [=](int64_t begin, int64_t end) {
        scale_groups(gradient.kept, classes, factor, rows, gradient.out, begin, end);
      });
  }
  parallel_rows(rows, classes, [=](int64_t begin, int64_t end) {
    const auto from = gradient.from_row(begin, classes);
    Order<L>::scale(from.kept, end - begin, classes, factor, from.out);
  });
}

// Bytes of a gradient that stays in the last-level cache until it is scaled, and of what is kept apart until then: that
// memory stays with the thread, since its page faults would cost more than the exponentials it spares.
constexpr int64_t cached_gradient = 8 << 20, most_kept = 4 << 20;

template <typename T>
T* kept_memory(int64_t bytes) {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  static thread_local std::vector<Line> memory;
  if (int64_t(memory.size() * sizeof(Line)) < bytes) memory.resize(bytes / sizeof(Line) + 1);
  return reinterpret_cast<T*>(memory.data());
}

// Where forward_rows may leave the gradient without η̂: nowhere if these targets or this size do not allow it.
template <typename L, typename T>
WaitingGradient<L> waiting_gradient(const Targets<T>& targets, bool sigmoid, const Tensor& out) {
  const int64_t rows = out.size(0), classes = targets.classes;
  if (sigmoid || targets.everywhere() || classes > block_size) return {};
  const int64_t in_lanes = groups_of(rows) * group_size(classes) * int64_t(sizeof(T));
  if (in_groups<L>(targets, sigmoid) && in_lanes <= most_kept) return {data<L>(out), kept_memory<T>(in_lanes), true};
  constexpr bool apart = !std::is_same_v<L, T>;
  const int64_t bytes = rows * Order<L>::kept_length(classes) * int64_t(sizeof(T));
  if (bytes > (apart ? most_kept : cached_gradient)) return {};
  if constexpr (apart)
    return {data<L>(out), kept_memory<T>(bytes)};
  else
    return {data<L>(out), data<T>(out)};
}

template <typename L>
void run_loss_with_gradient(Loss<L> job, const Tensor& gradient) {
  using T = Accumulate<L>;
  const Forward<L>& rows = job.rows;
  const std::unique_ptr<T[]> scratch(new T[2 * rows.shape.rows]);
  job.rows.entropy = scratch.get(), job.rows.lse = scratch.get() + rows.shape.rows;
  const WaitingGradient<L> waiting = waiting_gradient<L>(rows.targets, rows.sigmoid, gradient);
  loss_of_rows(job, waiting);
  // 0·NaN is no 0: rows of neither mean have a gradient of 0 even where η̂ is NaN.
  if (!waiting || !std::isfinite(job.parts[eta_hat]))
    run_gradient(backward_of(job, gradient), gradient);
  else if (job.rescale || waiting.apart())
    scale_gradient(waiting, job.parts[eta_hat], rows.targets.classes, rows.shape.rows);
}

}  // namespace
}  // namespace mixupe

// CE, H and lse of every row, and the loss of them: a warp or a block to a row, or blocks to its parts.
#pragma once
#include "rows.h"

namespace mixupe {

template <bool sigmoid, typename T>
using SumsOf = std::conditional_t<sigmoid, SigmoidSums, SoftmaxSums<T>>;

template <typename Team, bool sigmoid, typename L, typename T>
__device__ __forceinline__ SumsOf<sigmoid, T> sums_of(const Forward<L>& job, const Labels<T>& l, int64_t row,
                                                      const Columns& columns) {
  const Targets<T>& t = job.targets;
  const L* z = job.logits + row * job.stride + columns.begin;
  const Span span = span_of<L, pack_of<L>>(z, columns.size);
  if constexpr (sigmoid) {
    return sigmoid_sums<Team>(z, t, l, row, columns.begin, span);
  } else {
    if (t.everywhere()) return spread_sums<Team>(z, t, l.uniform, row, columns.begin, span);
    return {row_sums<Team>(z, span), {}};
  }
}

// The logits of a row's labels.
template <typename T>
struct LabelLogits {
  T own, partner;
};

template <typename L, typename T>
__device__ __forceinline__ LabelLogits<T> label_logits(const Forward<L>& job, const Labels<T>& l, int64_t row) {
  const L* z = job.logits + row * job.stride;
  return {T(widen(z[l.own])), T(widen(z[l.partner]))};
}

template <typename T>
__device__ __forceinline__ RowLoss<T> loss_of_row(const SoftmaxSums<T>& sums, const Targets<T>& t, const Labels<T>& l,
                                                  const LabelLogits<T>& z) {
  const T log_total = log_sum(sums.logits), max = sums.logits.max;
  // From shifted logits: lse - z_y would lose the digits of a shift that all logits share.
  const T ce = weigh(l.own_weight, log_total - (z.own - max)) + weigh(l.partner_weight, log_total - (z.partner - max));
  const TargetSums& spread = sums.targets;
  const T spread_ce = t.everywhere() ? T(weigh(spread.mass, double(log_total)) - spread.dot) : T(0);
  return {ce + spread_ce, entropy(sums.logits, log_total), max + log_total, T(spread.mass)};
}

template <typename T>
__device__ __forceinline__ RowLoss<T> loss_of_row(const SigmoidSums& sums, const Targets<T>&, const Labels<T>&,
                                                  const LabelLogits<T>&) {
  return {T(sums.ce), T(sums.entropy), T(sums.softplus), T(0)};
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) forward_rows(const Forward<L> job) {
  begin_kernel();
  using T = Accumulate<L>;
  const int64_t row = Team::row();
  if (row >= job.shape.rows) return;  // whole teams
  const Labels<T> l = checked_labels(job.targets, row);
  const LabelLogits<T> z = label_logits(job, l, row);  // asked for first, needed last
  const auto sums = sums_of<Team, sigmoid>(job, l, row, Columns{0, job.targets.classes});
  if (Team::rank() == 0) write_row(job, row, l, loss_of_row(sums, job.targets, l, z));
}

template <bool sigmoid, typename L>
using ForwardParts = InParts<Forward<L>, SumsOf<sigmoid, Accumulate<L>>>;

// The sums of the parts of rows, a block each.
template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) forward_parts(const ForwardParts<sigmoid, L> job) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const auto l = checked_labels(job.rows.targets, row);
  const auto sums = sums_of<Team, sigmoid>(job.rows, l, row, job.columns());
  if (Team::rank() == 0) job.keep(sums);
}

// The rows, from the sums of their parts.
template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) join_parts(const ForwardParts<sigmoid, L> job) {
  begin_kernel();
  const Forward<L>& rows = job.rows;
  const int64_t row = Team::row();
  if (row >= rows.shape.rows) return;  // whole teams
  const auto l = checked_labels(rows.targets, row);
  const auto z = label_logits(rows, l, row);
  const auto sums = job.template joined<Team>(row);
  if (Team::rank() == 0) write_row(rows, row, l, loss_of_row(sums, rows.targets, l, z));
}

// The loss and its parts, by one block: the order of summation is fixed.
template <typename Team, typename L>
__global__ void __launch_bounds__(Team::block) total_loss(const Loss<L> job) {
  begin_kernel();
  const Forward<L>& rows = job.rows;
  const auto& shape = rows.shape;
  LossSums sums{};
  for (int64_t row = Team::rank(); row < shape.num_mixed; row += Team::threads) {
    sums.mix += rows.ce[row];
    sums.rows_mix += rows.kept[row];
  }
  for (int64_t row = shape.num_mixed + Team::rank(); row < shape.rows; row += Team::threads) {
    sums.clean += rows.ce[row];
    sums.rows_clean += rows.kept[row];
  }
  for (int64_t row = shape.rows - shape.num_reg + Team::rank(); row < shape.rows; row += Team::threads) {
    sums.reg += rows.value[row];
    sums.rows_reg += shape.regularizes(row, rows.kept[row]) ? 1 : 0;
  }
  sums = Team::reduce(sums, [](const LossSums& a, const LossSums& b) {
    return LossSums{a.mix + b.mix, a.rows_mix + b.rows_mix, a.clean + b.clean, a.rows_clean + b.rows_clean,
                    a.reg + b.reg, a.rows_reg + b.rows_reg};
  });
  if (Team::rank() != 0) return;
  *job.loss = loss_of_sums(sums, weights_of(job), job.rescale, job.parts);
}

}  // namespace mixupe

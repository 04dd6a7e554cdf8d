// The gradient of every row of logits: a warp or a block to a row, or blocks to its parts.
#pragma once
#include "rows.h"

namespace mixupe {

// Σy of a row's targets but for their labels, if only reading them tells it, and else 0.
template <typename Team, typename T>
__device__ double spread_mass(const Targets<T>& t, const Labels<T>& l, int64_t row, const Columns& columns) {
  if (!t.dense && (!t.class_weight || l.uniform == T(0))) return 0;
  constexpr int pack = vector_bytes / sizeof(T);
  const T* targets = (t.dense ? t.dense + row * t.dense_stride : t.class_weight) + columns.begin;
  const Span span = span_of<T, pack>(targets, columns.size);
  double mass = 0;
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T y[count.value], sum = 0;
    load_spread(t, l.uniform, row, columns.begin + k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) sum += y[i];
    mass += sum;
  });
  return Team::reduce(mass, [](double a, double b) { return a + b; });
}

// Σy of a row.
template <typename T>
__device__ __forceinline__ T target_mass(const Targets<T>& t, const Labels<T>& l, double spread) {
  if (t.dense) return T(spread);
  return l.own_weight + l.partner_weight + (t.class_weight ? T(spread) : l.uniform * T(t.classes));
}

// What the gradient of a softmax row takes from all its columns: the mass of its targets, and its sums where lse has lost digits.
template <typename Team, typename L, typename T = Accumulate<L>>
__device__ __forceinline__ SoftmaxSums<T> gradient_sums(const Backward<L>& job, const Labels<T>& l, int64_t row,
                                                        const Columns& columns) {
  auto sums = SoftmaxSums<T>::none();
  sums.targets.mass = spread_mass<Team>(job.targets, l, row, columns);
  if (lse_lost_digits<L>(job.lse[row])) {
    const L* z = job.logits + row * job.stride + columns.begin;
    sums.logits = row_sums<Team>(z, span_of<L, pack_of<L>>(z, columns.size));
  }
  return sums;
}

// A column's dz. Its label term meets the rest before the one rounding to the logits' dtype: in bfloat16 a later subtraction would
// lose the whole gradient where p is near 1.
template <bool sigmoid, typename T>
__device__ __forceinline__ T column_gradient(T z, T y, const RowGradient<T>& g, const SoftmaxGradient<T>& of_row) {
  return sigmoid ? sigmoid_gradient(z, y, g) : softmax_gradient(z, of_row.shift, of_row.level, of_row.slope) - g.ce * y;
}

// The gradient of columns whose targets are labels alone: as if they had none, and then the labels' written over it.
template <typename Team, bool sigmoid, typename L, typename T>
__device__ __forceinline__ void write_labelled(const L* z, L* out, const Labels<T>& l, const Columns& columns,
                                               const Span& span, const RowGradient<T>& g,
                                               const SoftmaxGradient<T>& of_row) {
  constexpr int pack = pack_of<L>;
  const bool has_own = columns.has(l.own), has_partner = columns.has(l.partner) && l.partner != l.own;
  const int64_t own = l.own - columns.begin, partner = l.partner - columns.begin;
  const T own_logit = has_own ? T(widen(z[own])) : T(0), partner_logit = has_partner ? T(widen(z[partner])) : T(0);
  Team::sync();  // before others write: `out` may be the logits
  for_each_edge<pack>(span, Team::rank(), Team::threads, [&](int64_t k) {
    out[k] = narrow<L>(column_gradient<sigmoid>(T(widen(z[k])), T(0), g, of_row));
  });
  const int packs = static_cast<int>(span.packs);
  auto* to = reinterpret_cast<Vec<L, pack>*>(out + span.head);
  const auto write = [&](const auto& flight, int first, auto all) {
#pragma unroll
    for (int d = 0; d < packs_in_flight; ++d) {
      T values[pack];
      widened(flight.packs[d], values);
#pragma unroll
      for (T& value : values) value = column_gradient<sigmoid>(value, T(0), g, of_row);
      const int p = first + d * Team::threads;
      if (all.value || p < packs) to[p] = narrowed<L>(values);
    }
  };
  for_each_flight<Team, pack>(z + span.head, packs, L{}, write);
  Team::sync();  // the labels' columns are written last
  if (Team::rank() != 0) return;
  const T weight = l.own == l.partner ? l.own_weight + l.partner_weight : l.own_weight;
  if (has_own) out[own] = narrow<L>(column_gradient<sigmoid>(own_logit, weight, g, of_row));
  if (has_partner) out[partner] = narrow<L>(column_gradient<sigmoid>(partner_logit, l.partner_weight, g, of_row));
}

// The gradient of a team's columns of a row, given the row's `gradient_sums` (of a sigmoid row: none).
template <typename Team, bool sigmoid, typename L, typename T = Accumulate<L>>
__device__ __forceinline__ void write_gradient(const Backward<L>& job, const Labels<T>& l, int64_t row,
                                               const Columns& columns, const SoftmaxSums<T>& sums) {
  constexpr int pack = pack_of<L>;
  const Targets<T>& t = job.targets;
  const RowUpstream<T> row_upstream = upstream(job, row, target_mass(t, l, sums.targets.mass));
  const RowGradient<T> g = row_upstream.g;
  const T lse = job.lse[row];
  SoftmaxGradient<T> of_row{lse, row_upstream.level, g.entropy, g.ce};
  if (!sigmoid && lse_lost_digits<L>(lse))
    of_row = gradient_of_sums(sums.logits, log_sum(sums.logits), row_upstream.level, g);
  const L* z = job.logits + row * job.stride + columns.begin;
  L* out = job.out + row * job.out_stride + columns.begin;
  const Span span = span_of<L, pack>(out, columns.size);
  if (!t.everywhere() && is_aligned<L, pack>(z + span.head))
    return write_labelled<Team, sigmoid>(z, out, l, columns, span, g, of_row);
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    load_targets(t, l, row, columns.begin + k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) values[i] = column_gradient<sigmoid>(values[i], y[i], g, of_row);
    store(values, out + k);
  });
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) backward_rows(const Backward<L> job) {
  begin_kernel();
  using T = Accumulate<L>;
  const int64_t row = Team::row();
  if (row >= job.rows) return;  // whole teams
  const Labels<T> l = checked_labels(job.targets, row);
  const Columns all{0, job.targets.classes};
  auto sums = SoftmaxSums<T>::none();
  if constexpr (!sigmoid)
    sums = gradient_sums<Team>(job, l, row, all);  // before anything is written: `out` may be the logits
  write_gradient<Team, sigmoid>(job, l, row, all, sums);
}

template <typename L>
using BackwardParts = InParts<Backward<L>, SoftmaxSums<Accumulate<L>>>;

// What softmax rows in parts take from all their columns: a kernel of its own, before any block writes, since `out` may be the logits.
template <typename Team, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) sum_parts(const BackwardParts<L> job) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const auto sums = gradient_sums<Team>(job.rows, checked_labels(job.rows.targets, row), row, job.columns());
  if (Team::rank() == 0) job.keep(sums);
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) backward_parts(const BackwardParts<L> job) {
  begin_kernel();
  using T = Accumulate<L>;
  const int64_t row = blockIdx.x;
  const Labels<T> l = checked_labels(job.rows.targets, row);
  auto sums = SoftmaxSums<T>::none();
  if constexpr (!sigmoid) sums = job.template joined<Team>(row);
  write_gradient<Team, sigmoid>(job.rows, l, row, job.columns(), sums);
}

}  // namespace mixupe

// Kernels over rows of logits: one pass each way, a warp or a block to a row, arithmetic from row.h. Sums are joined in
// a fixed order and never by atomics: results repeat bit for bit.
#pragma once
#include "../operators/rows.h"
#include "elements.h"
#include "team.h"

namespace mixupe {

__device__ __forceinline__ void check_label(int64_t label, int64_t classes, int64_t ignore_index) {
  assert(((label >= 0 && label < classes) || label == ignore_index) && "labels must be classes in [0, C)");
}

// The row's labels, refused before anything is read at them; λ must be in [0, 1].
template <typename T>
__device__ __forceinline__ Labels<T> checked_labels(const Targets<T>& t, int64_t row) {
  if (t.own) check_label(t.own[row], t.classes, t.ignore_index);
  if (t.partner) check_label(t.partner[row], t.classes, t.ignore_index);
  assert((!t.lam || (t.lam[row] >= T(0) && t.lam[row] <= T(1))) && "lam must be in [0, 1]");
  return t.row_labels(row);
}

// The targets of columns k, ..., k + count - 1.
template <int count, typename T>
__device__ __forceinline__ void load_targets(const Targets<T>& t, const Labels<T>& l, int64_t row, int64_t k,
                                             T (&y)[count]) {
  if (t.dense) {
    load(t.dense + row * t.dense_stride + k, y);
    const T kept = T(1) - t.label_smoothing, uniform = t.label_smoothing / T(t.classes);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = y[i] * kept + uniform;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = l.uniform;
  }
  if (t.class_weight) {
    T weight[count];
    load(t.class_weight + k, weight);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] *= weight[i];
  }
  const bool labelled = (l.own >= k && l.own < k + count) || (l.partner >= k && l.partner < k + count);
  if (t.dense || !labelled) return;
  // Registers have no run-time index: a label is compared with each column.
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (l.own == k + i) y[i] += l.own_weight;
    if (l.partner == k + i) y[i] += l.partner_weight;
  }
}

// What a thread knows of its share of a row of logits and targets.
template <typename T>
struct RowSums {
  Stats<T> stats;
  T mass, dot;  // Σ y and Σ y (z - max)
};

// `dot` of sums whose maximum becomes `max`.
template <typename T>
__device__ __forceinline__ T shifted_dot(const RowSums<T>& sums, T max) {
  return sums.dot + weigh(sums.mass, finite_shift(sums.stats.max) - finite_shift(max));
}

template <int count, typename T>
__device__ __forceinline__ void add_logits(const T (&z)[count], RowSums<T>& sums) {
  T max = sums.stats.max;
#pragma unroll
  for (int i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
  if (max > sums.stats.max) {  // rarely so after the first few packs
    sums.dot = shifted_dot(sums, max);
    sums.stats = merge(sums.stats, Stats<T>{max, T(0), T(0)});
  }
  const T shift = finite_shift(max);
#pragma unroll
  for (int i = 0; i < count; ++i) add_logit(z[i], shift, sums.stats.sum, sums.stats.weighted);
}

template <int count, typename T>
__device__ __forceinline__ void add_targets(const T (&z)[count], const T (&y)[count], RowSums<T>& sums) {
  const T shift = finite_shift(sums.stats.max);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    sums.mass += y[i];
    sums.dot += weigh(y[i], z[i] - shift);
  }
}

template <typename T>
__device__ __forceinline__ RowSums<T> join(const RowSums<T>& a, const RowSums<T>& b) {
  const Stats<T> stats = merge(a.stats, b.stats);
  return {stats, a.mass + b.mass, shifted_dot(a, stats.max) + shifted_dot(b, stats.max)};
}

template <typename Team, typename L, typename T>
__device__ RowLoss<T> softmax_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row) {
  constexpr int pack = pack_of<L>;
  const bool everywhere = t.everywhere();
  const T own = widen(z[l.own]), partner = widen(z[l.partner]);  // asked for first, needed last
  const Span span = span_of<L, pack>(z, t.classes);
  RowSums<T> sums{empty_stats<T>(), T(0), T(0)};
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value];
    load(z + k, values);
    add_logits(values, sums);
    if (!everywhere) return;
    T y[count.value];
    load_targets(t, l, row, k, y);
    add_targets(values, y, sums);
  });
  sums = Team::reduce(sums, [](const RowSums<T>& a, const RowSums<T>& b) { return join(a, b); });
  const T log_total = log_sum(sums.stats), max = sums.stats.max;
  // From shifted logits: lse - z_y would lose the digits of a shift that all logits share.
  const T ce =
      everywhere ? weigh(sums.mass, log_total) - sums.dot
                 : weigh(l.own_weight, log_total - (own - max)) + weigh(l.partner_weight, log_total - (partner - max));
  return {ce, entropy(sums.stats, log_total), max + log_total, sums.mass};
}

template <typename T>
struct SigmoidSums {
  T ce, entropy, softplus;
};

template <typename Team, typename L, typename T>
__device__ RowLoss<T> sigmoid_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row) {
  constexpr int pack = pack_of<L>;
  const Span span = span_of<L, pack>(z, t.classes);
  SigmoidSums<T> sums{};
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    load_targets(t, l, row, k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      T softplus = 0;
      add_sigmoid_logit(values[i], softplus, sums.entropy);
      sums.softplus += softplus;
      sums.ce += softplus - weigh(y[i], values[i]);
    }
  });
  sums = Team::reduce(sums, [](const SigmoidSums<T>& a, const SigmoidSums<T>& b) {
    return SigmoidSums<T>{a.ce + b.ce, a.entropy + b.entropy, a.softplus + b.softplus};
  });
  return {sums.ce, sums.entropy, sums.softplus, T(0)};
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) forward_rows(const Forward<L> job) {
  using T = Accumulate<L>;
  const int64_t row = Team::row();
  if (row >= job.shape.rows) return;  // whole teams
  const L* z = job.logits + row * job.stride;
  const Labels<T> l = checked_labels(job.targets, row);
  const RowLoss<T> r = [&] {
    if constexpr (sigmoid) {
      return sigmoid_row<Team>(z, job.targets, l, row);
    } else {
      return softmax_row<Team>(z, job.targets, l, row);
    }
  }();
  if (Team::rank() != 0) return;
  write_row(job, row, l, r);
}

// The loss and its parts, by one block: the order of summation is fixed.
template <typename Team, typename L>
__global__ void __launch_bounds__(Team::block) total_loss(const Loss<L> job) {
  const Forward<L>& rows = job.rows;
  const auto& shape = rows.shape;
  LossSums sums{};
  for (int64_t row = Team::rank(); row < shape.num_mixed; row += Team::threads) {
    sums.mix += rows.ce[row];
    sums.rows_mix += rows.kept[row];
  }
  for (int64_t row = shape.rows - shape.num_reg + Team::rank(); row < shape.rows; row += Team::threads) {
    sums.reg += rows.value[row];
    sums.rows_reg += shape.regularizes(row, rows.kept[row]) ? 1 : 0;
  }
  sums = Team::reduce(sums, [](const LossSums& a, const LossSums& b) {
    return LossSums{a.mix + b.mix, a.rows_mix + b.rows_mix, a.reg + b.reg, a.rows_reg + b.rows_reg};
  });
  if (Team::rank() != 0) return;
  *job.loss = loss_of_sums(sums, *job.eta, *job.reg_weight, job.rescale, job.parts);
}

// Σy of a row; where targets differ between classes it takes a pass of its own, since every column's gradient needs it.
template <typename Team, typename T>
__device__ T target_mass(const Targets<T>& t, const Labels<T>& l, int64_t row, const Span& span) {
  if (!t.dense && !t.class_weight) return l.own_weight + l.partner_weight + l.uniform * T(t.classes);
  if (!t.dense && l.uniform == T(0)) return l.own_weight + l.partner_weight;
  constexpr int pack = vector_bytes / sizeof(T);
  T mass = 0;
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T y[count.value];
    load_targets(t, l, row, k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) mass += y[i];
  });
  return Team::reduce(mass, [](T a, T b) { return a + b; });
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) backward_rows(const Backward<L> job) {
  using T = Accumulate<L>;
  constexpr int pack = pack_of<L>, target_pack = vector_bytes / sizeof(T);
  const Targets<T>& t = job.targets;
  const int64_t row = Team::row();
  if (row >= job.rows) return;  // whole teams
  const Labels<T> l = checked_labels(t, row);
  const T* target_row = t.dense ? t.dense + row * t.dense_stride : t.class_weight;
  const T mass = target_mass<Team>(t, l, row, span_of<T, target_pack>(target_row, t.classes));
  const RowUpstream<T> row_upstream = upstream(job, row, mass);
  const RowGradient<T> g = row_upstream.g;
  const T lse = job.lse[row], level = row_upstream.level;
  const L* z = job.logits + row * job.stride;
  L* out = job.out + row * job.out_stride;
  const Span span = span_of<L, pack>(out, t.classes);
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    load_targets(t, l, row, k, y);
    // The label term meets the rest before the one rounding to the logits' dtype: in bfloat16 a later subtraction
    // would lose the whole gradient where p is near 1.
#pragma unroll
    for (int i = 0; i < count.value; ++i)
      values[i] = sigmoid ? sigmoid_gradient(values[i], y[i], g)
                          : softmax_gradient(values[i], lse, level, g.entropy) - g.ce * y[i];
    store(values, out + k);
  });
}

}  // namespace mixupe

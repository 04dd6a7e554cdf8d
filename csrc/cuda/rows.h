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

// The targets of columns k, ..., k + count - 1 but for their labels.
template <int count, typename T>
__device__ __forceinline__ void load_spread(const Targets<T>& t, T uniform, int64_t row, int64_t k, T (&y)[count]) {
  if (t.dense) {
    load(t.dense + row * t.dense_stride + k, y);
    const T kept = T(1) - t.label_smoothing, smoothed = t.label_smoothing / T(t.classes);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = y[i] * kept + smoothed;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = uniform;
  }
  if (t.class_weight) {
    T weight[count];
    load(t.class_weight + k, weight);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] *= weight[i];
  }
}

// The same with their labels.
template <int count, typename T>
__device__ __forceinline__ void load_targets(const Targets<T>& t, const Labels<T>& l, int64_t row, int64_t k,
                                             T (&y)[count]) {
  load_spread(t, l.uniform, row, k, y);
  const bool labelled = (l.own >= k && l.own < k + count) || (l.partner >= k && l.partner < k + count);
  if (t.dense || !labelled) return;
  // Registers have no run-time index: a label is compared with each column.
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (l.own == k + i) y[i] += l.own_weight;
    if (l.partner == k + i) y[i] += l.partner_weight;
  }
}

template <int count, typename T>
__device__ __forceinline__ void add_logits(const T (&z)[count], Stats<T>& stats) {
  T max = stats.max;
#pragma unroll
  for (int i = 0; i < count; ++i) max = fmax(max, z[i]);
  if (max > stats.max) stats = merge(stats, Stats<T>{max, T(0), T(0)});  // rarely so after the first few packs
  const T shift = finite_shift(max);
#pragma unroll
  for (int i = 0; i < count; ++i) add_logit(z[i], shift, stats.sum, stats.weighted);
}

template <typename Team, typename T>
__device__ __forceinline__ Stats<T> join_stats(const Stats<T>& stats) {
  return Team::reduce(stats, [](const Stats<T>& a, const Stats<T>& b) { return merge(a, b); });
}

// The sums of a row of logits, given to all threads.
template <typename Team, typename L, typename T = Accumulate<L>>
__device__ Stats<T> row_sums(const L* z, const Span& span) {
  constexpr int pack = pack_of<L>;
  Stats<T> stats = empty_stats<T>();
  for_each_edge<pack>(span, Team::rank(), Team::threads, [&](int64_t k) {
    const T value[1] = {T(widen(z[k]))};
    add_logits(value, stats);
  });
  const auto add = [&](const auto& flight, int, auto) {
    T max = stats.max;
#pragma unroll
    for (const auto& one : flight.packs) max = max_of(one, max);
    if (max > stats.max) stats = merge(stats, Stats<T>{max, T(0), T(0)});  // rarely so after the first few packs
    const T shift = finite_shift(max);
#pragma unroll
    for (const auto& one : flight.packs) {
      T values[pack];
      widened(one, values);
#pragma unroll
      for (int i = 0; i < pack; ++i) add_logit(values[i], shift, stats.sum, stats.weighted);
    }
  };
  for_each_flight<Team, pack>(z + span.head, static_cast<int>(span.packs), narrow<L>(T(-INFINITY)), add);
  return join_stats<Team>(stats);
}

// Σ y and Σ y (z - max) of targets but for their labels: beside a label's weight, small shares of many classes would be rounded
// away. A pack's are joined in float64.
struct TargetSums {
  double mass, dot;
};

// Sums whose maximum becomes `max`.
template <typename T>
__device__ __forceinline__ void move_shift(TargetSums& sums, T from, T to) {
  if (from != to) sums.dot += weigh(sums.mass, double(finite_shift(from)) - double(finite_shift(to)));
}

template <int count, typename T>
__device__ __forceinline__ void add_targets(const T (&z)[count], const T (&y)[count], T max, TargetSums& sums) {
  const T shift = finite_shift(max);
  T mass = 0, dot = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    mass += y[i];
    dot += weigh(y[i], z[i] - shift);
  }
  sums.mass += mass, sums.dot += dot;
}

// CE of a row whose targets are not in its labels alone, but for these, and its Σy.
template <typename Team, typename L, typename T>
__device__ TargetSums spread_sums(const L* z, const Targets<T>& t, T uniform, int64_t row, const Span& span,
                                  Stats<T>& stats) {
  constexpr int pack = pack_of<L>;
  TargetSums sums{};
  stats = empty_stats<T>();
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    const T before = stats.max;
    add_logits(values, stats);
    move_shift(sums, before, stats.max);
    load_spread(t, uniform, row, k, y);
    add_targets(values, y, stats.max, sums);
  });
  const T own_max = stats.max;
  stats = join_stats<Team>(stats);
  move_shift(sums, own_max, stats.max);
  return Team::reduce(
      sums, [](const TargetSums& a, const TargetSums& b) { return TargetSums{a.mass + b.mass, a.dot + b.dot}; });
}

template <typename Team, typename L, typename T>
__device__ RowLoss<T> softmax_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row) {
  const T own = widen(z[l.own]), partner = widen(z[l.partner]);  // asked for first, needed last
  const Span span = span_of<L, pack_of<L>>(z, t.classes);
  const bool everywhere = t.everywhere();
  TargetSums spread{};
  Stats<T> stats;
  if (everywhere) {
    spread = spread_sums<Team>(z, t, l.uniform, row, span, stats);
  } else {
    stats = row_sums<Team>(z, span);
  }
  const T log_total = log_sum(stats), max = stats.max;
  // From shifted logits: lse - z_y would lose the digits of a shift that all logits share.
  const T ce = weigh(l.own_weight, log_total - (own - max)) + weigh(l.partner_weight, log_total - (partner - max));
  const T spread_ce = everywhere ? T(weigh(spread.mass, double(log_total)) - spread.dot) : T(0);
  return {ce + spread_ce, entropy(stats, log_total), max + log_total, T(spread.mass)};
}

struct SigmoidSums {
  double ce, entropy, softplus;
};

template <typename Team, typename L, typename T>
__device__ RowLoss<T> sigmoid_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row) {
  constexpr int pack = pack_of<L>;
  const Span span = span_of<L, pack>(z, t.classes);
  SigmoidSums sums{};
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value], ce = 0, entropy = 0, softplus = 0;
    load(z + k, values);
    load_targets(t, l, row, k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      T own_softplus = 0;
      add_sigmoid_logit(values[i], own_softplus, entropy);
      softplus += own_softplus;
      ce += own_softplus - weigh(y[i], values[i]);
    }
    sums.ce += ce, sums.entropy += entropy, sums.softplus += softplus;  // a pack's, joined in float64
  });
  sums = Team::reduce(sums, [](const SigmoidSums& a, const SigmoidSums& b) {
    return SigmoidSums{a.ce + b.ce, a.entropy + b.entropy, a.softplus + b.softplus};
  });
  return {T(sums.ce), T(sums.entropy), T(sums.softplus), T(0)};
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) forward_rows(const Forward<L> job) {
  begin_kernel();
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

// Σy of a row; where targets differ between classes it takes a pass of its own, since every column's gradient needs it.
template <typename Team, typename T>
__device__ T target_mass(const Targets<T>& t, const Labels<T>& l, int64_t row, const Span& span) {
  if (!t.dense && !t.class_weight) return l.own_weight + l.partner_weight + l.uniform * T(t.classes);
  if (!t.dense && l.uniform == T(0)) return l.own_weight + l.partner_weight;
  constexpr int pack = vector_bytes / sizeof(T);
  double mass = 0;
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T y[count.value], sum = 0;
    load_spread(t, l.uniform, row, k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) sum += y[i];
    mass += sum;
  });
  mass = Team::reduce(mass, [](double a, double b) { return a + b; });
  return T(mass) + (t.dense ? T(0) : l.own_weight + l.partner_weight);
}

// A column's dz. Its label term meets the rest before the one rounding to the logits' dtype: in bfloat16 a later subtraction would
// lose the whole gradient where p is near 1.
template <bool sigmoid, typename T>
__device__ __forceinline__ T column_gradient(T z, T y, const RowGradient<T>& g, const SoftmaxGradient<T>& of_row) {
  return sigmoid ? sigmoid_gradient(z, y, g) : softmax_gradient(z, of_row.shift, of_row.level, of_row.slope) - g.ce * y;
}

// The gradient of a row whose targets are its labels alone: as if it had none, and then theirs written over it.
template <typename Team, bool sigmoid, typename L, typename T>
__device__ __forceinline__ void write_labelled(const L* z, L* out, const Labels<T>& l, const Span& span,
                                               const RowGradient<T>& g, const SoftmaxGradient<T>& of_row) {
  constexpr int pack = pack_of<L>;
  const T own = widen(z[l.own]), partner = widen(z[l.partner]);
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
  const bool same = l.own == l.partner;
  out[l.own] =
      narrow<L>(column_gradient<sigmoid>(own, same ? l.own_weight + l.partner_weight : l.own_weight, g, of_row));
  if (!same) out[l.partner] = narrow<L>(column_gradient<sigmoid>(partner, l.partner_weight, g, of_row));
}

template <typename Team, bool sigmoid, typename L>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) backward_rows(const Backward<L> job) {
  begin_kernel();
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
  const T lse = job.lse[row];
  const L* z = job.logits + row * job.stride;
  L* out = job.out + row * job.out_stride;
  SoftmaxGradient<T> of_row{lse, row_upstream.level, g.entropy, g.ce};
  if (!sigmoid && lse_lost_digits<L>(lse)) {  // before anything is written: `out` may be the logits
    const Stats<T> stats = row_sums<Team>(z, span_of<L, pack>(z, t.classes));
    of_row = gradient_of_sums(stats, log_sum(stats), row_upstream.level, g);
  }
  const Span span = span_of<L, pack>(out, t.classes);
  if (!t.everywhere() && is_aligned<L, pack>(z + span.head))
    return write_labelled<Team, sigmoid>(z, out, l, span, g, of_row);
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    load_targets(t, l, row, k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) values[i] = column_gradient<sigmoid>(values[i], y[i], g, of_row);
    store(values, out + k);
  });
}

}  // namespace mixupe

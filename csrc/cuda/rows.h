// Rows of logits and their targets as a team of threads reads them: one pass, arithmetic from row.h. The kernels are in
// forward.h and backward.h. Sums are joined in a fixed order and never by atomics: results repeat bit for bit.
#pragma once
#include "../operators/rows.h"
#include "elements.h"
#include "parts.h"
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

// All that a softmax row's results are made of, but for its labels; mergeable over any split of the row.
template <typename T>
struct SoftmaxSums {
  Stats<T> logits;
  TargetSums targets;

  static MIXUPE_FN SoftmaxSums none() { return {empty_stats<T>(), {}}; }
};

template <typename T>
MIXUPE_FN SoftmaxSums<T> join(SoftmaxSums<T> a, SoftmaxSums<T> b) {
  const Stats<T> logits = merge(a.logits, b.logits);
  move_shift(a.targets, a.logits.max, logits.max);
  move_shift(b.targets, b.logits.max, logits.max);
  return {logits, {a.targets.mass + b.targets.mass, a.targets.dot + b.targets.dot}};
}

// The sums of a row whose targets are not in its labels alone.
template <typename Team, typename L, typename T>
__device__ SoftmaxSums<T> spread_sums(const L* z, const Targets<T>& t, T uniform, int64_t row, int64_t begin,
                                      const Span& span) {
  constexpr int pack = pack_of<L>;
  auto sums = SoftmaxSums<T>::none();
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value];
    load(z + k, values);
    const T before = sums.logits.max;
    add_logits(values, sums.logits);
    move_shift(sums.targets, before, sums.logits.max);
    load_spread(t, uniform, row, begin + k, y);
    add_targets(values, y, sums.logits.max, sums.targets);
  });
  const T own_max = sums.logits.max;
  sums.logits = join_stats<Team>(sums.logits);
  move_shift(sums.targets, own_max, sums.logits.max);
  sums.targets = Team::reduce(sums.targets, [](const TargetSums& a, const TargetSums& b) {
    return TargetSums{a.mass + b.mass, a.dot + b.dot};
  });
  return sums;
}

struct SigmoidSums {
  double ce, entropy, softplus;

  static MIXUPE_FN SigmoidSums none() { return {}; }
};

MIXUPE_FN SigmoidSums join(const SigmoidSums& a, const SigmoidSums& b) {
  return {a.ce + b.ce, a.entropy + b.entropy, a.softplus + b.softplus};
}

template <typename Team, typename L, typename T>
__device__ SigmoidSums sigmoid_sums(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row, int64_t begin,
                                    const Span& span) {
  constexpr int pack = pack_of<L>;
  auto sums = SigmoidSums::none();
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T values[count.value], y[count.value], ce = 0, entropy = 0, softplus = 0;
    load(z + k, values);
    load_targets(t, l, row, begin + k, y);
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      T own_softplus = 0;
      add_sigmoid_logit(values[i], own_softplus, entropy);
      softplus += own_softplus;
      ce += own_softplus - weigh(y[i], values[i]);
    }
    sums.ce += ce, sums.entropy += entropy, sums.softplus += softplus;  // a pack's, joined in float64
  });
  return Team::reduce(sums, [](const SigmoidSums& a, const SigmoidSums& b) { return join(a, b); });
}

}  // namespace mixupe

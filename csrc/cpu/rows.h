// The rows of ce_entropy and mixupe_loss and their gradients on the CPU: loops over blocks of a row, arithmetic from row.h.
#pragma once
#include "../operators/rows.h"
#include "bfloat16.h"

namespace mixupe {
namespace {

template <typename T>
struct Block {
  alignas(64) T z[block_size];
  alignas(64) T y[block_size];
};

MIXUPE_FN int64_t block_length(int64_t classes, int64_t start) {
  return classes - start < block_size ? classes - start : block_size;
}

// Loops over a block. Each is a function of its own, compiled for every SIMD level: inlined into the loop over blocks,
// GCC 12 left one of them scalar (six times slower).

// Sums are made in the accumulation dtype over so many columns and joined: rounding took more of a whole block of 2048 than of
// PyTorch's sums. Targets and sigmoids are summed over 256, and exponentials in 64 steps: every end of theirs takes time.
constexpr int64_t short_sum = 256, exponentials_sum = 64 * lanes;

// Adds up a block of n columns, padded: `add(column, sums...)` adds a column's terms to a sum for each of `totals`, to which the sums
// go every `longest` columns. Two packs of lanes a step: the end of one is 3 of its 25 instructions. GCC 12 compiles this form to no
// more of them than loops by hand; with the sums in an array, sigmoids took a twentieth more.
template <typename T, int64_t longest, typename F, typename... Totals>
MIXUPE_FN void add_sums(int64_t n, const F& add, Totals&... totals) {
  for (int64_t start = 0; start < n; start += longest) {
    const int64_t end = start + padded(n - start < longest ? n - start : longest);
    const auto add_parts = [&](auto&&... sums) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int64_t i = start; i < end; i += lanes)
#pragma omp simd
        for (int64_t lane = 0; lane < lanes; ++lane) add(i + lane, sums.of[lane]...);
      ((totals += sums.total()), ...);
    };
    add_parts((static_cast<void>(totals), Parts<T>())...);
  }
}

// Of the exponentials of a block less their maximum; `keep(column, exponential)` may store them.
template <typename T, typename F>
MIXUPE_FN Stats<T> softmax_sums(T max, int64_t length, const T* block, const F& keep) {
  const T shift = finite_shift(max);
  Stats<T> stats{max, T(0), T(0)};
  const auto add = [=](int64_t i, T& sum, T& weighted) { keep(i, add_logit(block[i], shift, sum, weighted)); };
  add_sums<T, exponentials_sum>(length, add, stats.sum, stats.weighted);
  return stats;
}

template <typename T>
MIXUPE_FN Stats<T> softmax_sums(T max, int64_t length, const T* block) {
  return softmax_sums(max, length, block, [](int64_t, T) {});
}

template <typename L, typename T>
MIXUPE_SIMD Stats<T> softmax_block(const L* z, int64_t n, T* block) {
  return softmax_sums(load_logits(z, n, block), padded(n), block);
}

// The same with the block in whatever order is quickest.
template <typename L, typename T>
MIXUPE_SIMD Stats<T> softmax_sums_block(const L* z, int64_t n, T* block) {
  return softmax_sums(Order<L>::load(z, n, block), Order<L>::span(n), block);
}

// The targets of a block of columns but for its labels, padded with 0.
template <typename T>
MIXUPE_SIMD void spread_block(const Targets<T>& t, T uniform, int64_t row, int64_t start, int64_t n, T* y) {
  if (t.dense) {
    const T* dense = t.dense + row * t.dense_stride + start;
    const T kept = T(1) - t.label_smoothing, smoothed = t.label_smoothing / T(t.classes);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = dense[i] * kept + smoothed;
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = uniform;
  }
  if (t.class_weight) {
    const T* weight = t.class_weight + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] *= weight[i];
  }
  for (int64_t i = n; i < padded(n); ++i) y[i] = T(0);
}

// The same with its labels.
template <typename T>
void target_block(const Targets<T>& t, const Labels<T>& l, int64_t row, int64_t start, int64_t n, T* y) {
  spread_block(t, l.uniform, row, start, n, y);
  if (t.dense) return;
  if (l.own >= start && l.own < start + n) y[l.own - start] += l.own_weight;
  if (l.partner >= start && l.partner < start + n) y[l.partner - start] += l.partner_weight;
}

// Σ y
template <typename T>
MIXUPE_SIMD double target_sum(const T* y, int64_t n) {
  double mass = 0;
  add_sums<T, short_sum>(n, [=](int64_t i, T& sum) { sum += y[i]; }, mass);
  return mass;
}

// Σ y (z - shift)
template <typename T>
MIXUPE_SIMD double target_dot(const T* z, const T* y, int64_t n, T shift) {
  double dot = 0;
  add_sums<T, short_sum>(n, [=](int64_t i, T& sum) { sum += weigh(y[i], z[i] - shift); }, dot);
  return dot;
}

struct SigmoidSums {
  double ce, entropy, softplus;
};

template <typename L, typename T>
MIXUPE_SIMD SigmoidSums sigmoid_block(const L* z, const T* y, int64_t n, T* block) {
  load_logits(z, n, block);
  const auto add = [=](int64_t i, T& ce, T& entropy, T& softplus) {
    T own_softplus = 0, own_entropy = 0;
    add_sigmoid_logit(block[i], own_softplus, own_entropy);
    entropy += own_entropy;
    softplus += own_softplus;
    ce += own_softplus - weigh(y[i], block[i]);
  };
  SigmoidSums sums{};
  add_sums<T, short_sum>(n, add, sums.ce, sums.entropy, sums.softplus);
  return sums;
}

template <typename L, typename T>
MIXUPE_SIMD void softmax_gradient_block(const L* z, int64_t n, const SoftmaxGradient<T>& gradient, T* block) {
  load_logits(z, n, block);
  const SoftmaxGradient<T> g = gradient;
#pragma omp simd
  for (int64_t i = 0; i < padded(n); ++i) block[i] = softmax_gradient(block[i], g.shift, g.level, g.slope);
}

// The same where logits and gradient have the accumulation dtype: straight from one to the other, which may be the same
// memory. Lanes past n are masked; a remainder loop would take their exponentials one by one.
template <typename T>
MIXUPE_SIMD void softmax_gradient_direct(const T* z, int n, const SoftmaxGradient<T>& gradient, T* out) {
  const SoftmaxGradient<T> g = gradient;
  const int end = static_cast<int>(padded(n));
#pragma omp simd
  for (int i = 0; i < end; ++i)
    if (i < n) out[i] = softmax_gradient(z[i], g.shift, g.level, g.slope);
}

template <typename T>
MIXUPE_SIMD void subtract_targets(const T* y, int64_t n, T weight, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < padded(n); ++i) block[i] -= weight * y[i];
}

template <typename L, typename T>
MIXUPE_SIMD void sigmoid_gradient_block(const L* z, const T* y, int64_t n, const RowGradient<T>& gradient, T* block) {
  load_logits(z, n, block);
  const RowGradient<T> g = gradient;
#pragma omp simd
  for (int64_t i = 0; i < padded(n); ++i) block[i] = sigmoid_gradient(block[i], y[i], g);
}

// The labels' part of CE, of shifted logits: lse - z_y would lose the digits of a shift that all logits share.
template <typename L, typename T>
MIXUPE_FN double label_ce(const L* z, const Labels<T>& l, double max, double log_total) {
  return weigh<double>(l.own_weight, log_total - (widen(z[l.own]) - max)) +
         weigh<double>(l.partner_weight, log_total - (widen(z[l.partner]) - max));
}

template <typename T>
MIXUPE_FN RowLoss<T> row_loss(double ce, const Stats<double>& stats, double log_total, double mass) {
  return {T(ce), T(entropy(stats, log_total)), T(stats.max + log_total), T(mass)};
}

// The row's sums. They are float64, so that merging blocks costs no digits; `f` is called with each block's part and with
// what the row's sums were before it and are with it.
template <typename L, typename T, typename F>
MIXUPE_FN Stats<double> each_block_sums(const L* z, int64_t classes, bool in_order, T* block, const F& f) {
  Stats<double> stats = empty_stats<double>();
  for (int64_t start = 0; start < classes; start += block_size) {
    const int64_t n = block_length(classes, start);
    const Stats<T> narrow_part =
        in_order ? softmax_block(z + start, n, block) : softmax_sums_block(z + start, n, block);
    const Stats<double> part{narrow_part.max, narrow_part.sum, narrow_part.weighted};
    const Stats<double> joint = start == 0 ? part : merge(stats, part);
    f(start, n, narrow_part.max, stats, joint);
    stats = joint;
  }
  return stats;
}

template <typename L, typename T>
MIXUPE_FN Stats<double> row_sums(const L* z, int64_t classes, T* block) {
  return each_block_sums(z, classes, false, block, [](auto&&...) {});
}

template <typename L, typename T>
RowLoss<T> softmax_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row, Block<T>& block) {
  double mass = 0,
         dot = 0;  // Σ y and Σ y (z - max), but for the labels: beside their weight small ones would be rounded
  const auto add_targets = [&](int64_t start, int64_t n, T max, const Stats<double>& before,
                               const Stats<double>& joint) {
    spread_block(t, l.uniform, row, start, n, block.y);
    const double part_mass = target_sum(block.y, n), shift = finite_shift(joint.max);
    dot += weigh(mass, finite_shift(before.max) - shift);
    dot += target_dot(block.z, block.y, n, finite_shift(max)) + weigh(part_mass, finite_shift(max) - shift);
    mass += part_mass;
  };
  const bool everywhere = t.everywhere();
  const Stats<double> stats =
      everywhere ? each_block_sums(z, t.classes, true, block.z, add_targets) : row_sums(z, t.classes, block.z);
  const double log_total = log_sum(stats), ce = label_ce(z, l, stats.max, log_total);
  return row_loss<T>(everywhere ? ce + weigh(mass, log_total) - dot : ce, stats, log_total, mass);
}

template <typename L, typename T>
RowLoss<T> sigmoid_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row, Block<T>& block) {
  double ce = 0, entropy = 0, softplus = 0;
  for (int64_t start = 0; start < t.classes; start += block_size) {
    const int64_t n = block_length(t.classes, start);
    target_block(t, l, row, start, n, block.y);
    const SigmoidSums part = sigmoid_block(z + start, block.y, n, block.z);
    ce += part.ce, entropy += part.entropy, softplus += part.softplus;
  }
  return {T(ce), T(entropy), T(softplus), T(0)};
}

// A gradient that is made before its factor is known: numbers in the accumulation dtype, Order::kept_length a row, which may be `out`
// itself, and of bfloat16 some in `out` besides; or `grouped`, as few_classes.h has them.
template <typename L>
struct WaitingGradient {
  L* out = nullptr;
  Accumulate<L>* kept = nullptr;
  bool grouped = false;

  explicit operator bool() const { return out; }
  bool apart() const { return static_cast<const void*>(out) != kept; }
  WaitingGradient from_row(int64_t row, int64_t n) const {
    return {out + row * n, kept + row * Order<L>::kept_length(n)};
  }
};

// The loss with its gradient from one exponential an element, of rows of labels that fit a block. Every row's loss is in η̂,
// but η̂ is a factor of the whole gradient: scale_gradient puts it in. ∂L/∂CE of a mixed row and of a clean one and ∂L/∂penalty of
// a row of R are without it, too.
template <typename L>
struct OnePass {
  WaitingGradient<L> gradient = {};
  Accumulate<L> mix = 0, clean = 0, reg = 0;
};

template <typename T>
void subtract_labels(const Labels<T>& l, T weight, int64_t start, int64_t n, T* dz) {
  if (l.own >= start && l.own < start + n) dz[l.own - start] -= weight * l.own_weight;
  if (l.partner >= start && l.partner < start + n) dz[l.partner - start] -= weight * l.partner_weight;
}

template <typename L, typename T>
MIXUPE_SIMD Stats<T> exponentials_block(const L* z, int64_t n, T* block, T* exponentials) {
  const T max = Order<L>::load(z, n, block);
  return softmax_sums(max, Order<L>::span(n), block, [=](int64_t i, T e) { exponentials[i] = e; });
}

// A row's loss is written, and its gradient returned but for its factor: what is left of it to do for every class.
template <typename L, typename T>
MIXUPE_FN SoftmaxGradient<T> row_loss_and_gradient(const Forward<L>& job, const OnePass<L>& one_pass, int64_t row,
                                                   const L* z, const Labels<T>& l, const Stats<double>& stats,
                                                   double log_total) {
  const RowLoss<T> r = row_loss<T>(label_ce(z, l, stats.max, log_total), stats, log_total, 0);
  const T slope = write_row(job, row, l, r);
  const RowGradient<T> g = loss_gradient(row < job.shape.num_mixed ? one_pass.mix : one_pass.clean, one_pass.reg, slope,
                                         T(1), job.shape.penalty);
  const T level = gradient_level(g, l.own_weight + l.partner_weight, r.entropy);
  return gradient_of_sums(stats, log_total, level, g);
}

template <typename L, typename T>
void loss_and_gradient_row(const Forward<L>& job, const OnePass<L>& one_pass, int64_t row, const L* z,
                           const Labels<T>& l, Block<T>& block) {
  const int64_t n = job.targets.classes;
  const WaitingGradient<L> to = one_pass.gradient.from_row(row, n);
  T* const exponentials = block.y;
  const Stats<T> sums = exponentials_block(z, n, block.z, exponentials);
  const Stats<double> stats{sums.max, sums.sum, sums.weighted};
  const SoftmaxGradient<T> g = short_nans(row_loss_and_gradient(job, one_pass, row, z, l, stats, log_sum(stats)));
  Order<L>::keep(exponentials, block.z, static_cast<int>(n), g, to.kept, to.out);
  Order<L>::subtract(l.own, g.ce * l.own_weight, to.kept, to.out);
  Order<L>::subtract(l.partner, g.ce * l.partner_weight, to.kept, to.out);
}

template <typename L>
void forward_rows(const Forward<L>& job, const OnePass<L>& one_pass, int64_t begin, int64_t end) {
  using T = Accumulate<L>;
  Block<T> block;
  for (int64_t row = begin; row < end; ++row) {
    const L* z = job.logits + row * job.stride;
    const Labels<T> l = job.targets.row_labels(row);
    if (one_pass.gradient) {
      loss_and_gradient_row(job, one_pass, row, z, l, block);
      continue;
    }
    const RowLoss<T> r =
        job.sigmoid ? sigmoid_row(z, job.targets, l, row, block) : softmax_row(z, job.targets, l, row, block);
    write_row(job, row, l, r);
  }
}

// Σy of a row; dense targets take a pass of their own, since every column's gradient needs it.
template <typename T>
T target_mass(const Targets<T>& t, T class_weight_sum, const Labels<T>& l, int64_t row, T* y) {
  if (!t.dense) return l.own_weight + l.partner_weight + l.uniform * class_weight_sum;
  double mass = 0;
  for (int64_t start = 0; start < t.classes; start += block_size) {
    const int64_t n = block_length(t.classes, start);
    spread_block(t, T(0), row, start, n, y);
    mass += target_sum(y, n);
  }
  return T(mass);
}

template <typename L>
void backward_rows(const Backward<L>& job, Accumulate<L> class_weight_sum, int64_t begin, int64_t end) {
  using T = Accumulate<L>;
  Block<T> block;
  const Targets<T>& t = job.targets;
  const bool everywhere = job.sigmoid || t.everywhere();
  for (int64_t row = begin; row < end; ++row) {
    const Labels<T> l = t.row_labels(row);
    const T mass = target_mass(t, class_weight_sum, l, row, block.y), lse = job.lse[row];
    const auto [g, level] = upstream(job, row, mass);
    SoftmaxGradient<T> of_row{lse, level, g.entropy, g.ce};
    const L* z = job.logits + row * job.stride;
    L* out = job.out + row * job.out_stride;
    if (!job.sigmoid && lse_lost_digits<L>(lse)) {
      const Stats<double> stats = row_sums(z, t.classes, block.z);
      of_row = gradient_of_sums(stats, log_sum(stats), level, g);
    }
    if constexpr (std::is_same_v<L, BFloat16>) {
      if (!everywhere && t.classes >= shortest_in_halves) {
        InHalves::gradient(z, t.classes, l, of_row, out);
        continue;
      }
    }
    for (int64_t start = 0; start < t.classes; start += block_size) {
      const int64_t n = block_length(t.classes, start);
      if constexpr (std::is_same_v<L, T>) {
        if (!everywhere) {
          softmax_gradient_direct(z + start, n, of_row, out + start);
          subtract_labels(l, g.ce, start, n, out + start);
          continue;
        }
      }
      // The label term meets the rest before the one rounding to the logits' dtype: in bfloat16 a later subtraction
      // would lose the whole gradient where p is near 1.
      if (everywhere) target_block(t, l, row, start, n, block.y);
      if (job.sigmoid) {
        sigmoid_gradient_block(z + start, block.y, n, g, block.z);
      } else {
        softmax_gradient_block(z + start, n, of_row, block.z);
        everywhere ? subtract_targets(block.y, n, g.ce, block.z) : subtract_labels(l, g.ce, start, n, block.z);
      }
      write_block(block.z, n, out + start);
    }
  }
}

}  // namespace
}  // namespace mixupe

// Rows of few classes on the CPU, one in each lane of a vector: a row by itself would leave most lanes empty, and has sums and
// a logarithm of its own to wait for.
#pragma once
#include "rows.h"

namespace mixupe {
namespace {

constexpr int64_t few_classes = 16;

// A group of rows is a block of values by class and then by row.
MIXUPE_FN int64_t group_size(int64_t classes) { return classes * lanes; }
MIXUPE_FN int64_t groups_of(int64_t rows) { return (rows + lanes - 1) / lanes; }

template <typename L>
MIXUPE_FN bool in_groups(const Targets<Accumulate<L>>& t, bool sigmoid) {
  return std::is_same_v<Accumulate<L>, float> && !sigmoid && !t.everywhere() && t.classes <= few_classes;
}

// The sums of each row, and what its gradient is made of.
struct Group {
  alignas(64) float z[few_classes * lanes];
  alignas(64) float e[few_classes * lanes];
  alignas(64) float max[lanes], sum[lanes], weighted[lanes], log_total[lanes];
  alignas(64) float shift[lanes], level[lanes], slope[lanes];
};

// Lanes without a row hold zeros.
template <typename L>
void load_group(const L* z, int64_t stride, int64_t classes, int64_t count, Group& group) {
  for (int64_t r = 0; r < lanes; ++r)
    for (int64_t k = 0; k < classes; ++k) group.z[k * lanes + r] = r < count ? widen(z[r * stride + k]) : 0.f;
}

// Loops over the lanes within one over classes: with the classes within, GCC 12 left both scalar.
MIXUPE_SIMD void group_sums(int64_t classes, Group& group) {
#pragma omp simd
  for (int r = 0; r < lanes; ++r) group.max[r] = -INFINITY, group.sum[r] = group.weighted[r] = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const float* z = group.z + k * lanes;
#pragma omp simd
    for (int r = 0; r < lanes; ++r) group.max[r] = z[r] > group.max[r] ? z[r] : group.max[r];
  }
#pragma omp simd
  for (int r = 0; r < lanes; ++r) group.shift[r] = finite_shift(group.max[r]);
  for (int64_t k = 0; k < classes; ++k) {
    const float* z = group.z + k * lanes;
    float* e = group.e + k * lanes;
#pragma omp simd
    for (int r = 0; r < lanes; ++r) e[r] = add_logit(z[r], group.shift[r], group.sum[r], group.weighted[r]);
  }
#pragma omp simd
  for (int r = 0; r < lanes; ++r)
    group.log_total[r] = log_sum(Stats<float>{group.max[r], group.sum[r], group.weighted[r]});
}

// The rows' gradients but for their labels.
MIXUPE_SIMD void keep_group(const Group& group, int64_t classes, float* kept) {
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int r = 0; r < lanes; ++r) {
      const int64_t i = k * lanes + r;
      kept[i] = probability_gradient(group.e[i], group.z[i] - group.shift[r], group.level[r], group.slope[r]);
    }
  }
}

template <typename L>
MIXUPE_SIMD void scale_group(const float* kept, int64_t classes, float factor, L* scaled) {
#pragma omp simd
  for (int64_t i = 0; i < group_size(classes); ++i) scaled[i] = narrow<L>(kept[i] * factor);
}

// forward_rows of the groups from `begin` to `end`.
template <typename L>
void forward_groups(const Forward<L>& job, const OnePass<L>& one_pass, int64_t begin, int64_t end) {
  const int64_t classes = job.targets.classes;
  Group group;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * lanes, count = std::min(lanes, job.shape.rows - first);
    const L* z = job.logits + first * job.stride;
    float* kept = one_pass.gradient ? one_pass.gradient.kept + index * group_size(classes) : nullptr;
    load_group(z, job.stride, classes, count, group);
    group_sums(classes, group);
    Labels<float> labels[lanes];
    float ce[lanes];
    for (int64_t r = 0; r < count; ++r) {
      const Stats<double> stats{group.max[r], group.sum[r], group.weighted[r]};
      labels[r] = job.targets.row_labels(first + r);
      const auto g =
          row_loss_and_gradient(job, one_pass, first + r, z + r * job.stride, labels[r], stats, group.log_total[r]);
      group.shift[r] = g.shift, group.level[r] = g.level, group.slope[r] = g.slope, ce[r] = g.ce;
    }
    if (!kept) continue;
    keep_group(group, classes, kept);
    for (int64_t r = 0; r < count; ++r) {
      kept[labels[r].own * lanes + r] -= ce[r] * labels[r].own_weight;
      kept[labels[r].partner * lanes + r] -= ce[r] * labels[r].partner_weight;
    }
  }
}

// Groups that were kept, times their factor, in the order of memory.
template <typename L>
void scale_groups(const float* kept, int64_t classes, float factor, int64_t rows, L* out, int64_t begin, int64_t end) {
  alignas(64) L scaled[few_classes * lanes];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * lanes, count = std::min(lanes, rows - first);
    scale_group(kept + index * group_size(classes), classes, factor, scaled);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < classes; ++k) out[(first + r) * classes + k] = scaled[k * lanes + r];
  }
}

}  // namespace
}  // namespace mixupe

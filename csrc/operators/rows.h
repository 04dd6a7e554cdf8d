// Rows of logits and their targets, as the kernels of the losses read them, and what both backends make of one row.
#pragma once
#include "checks.h"

namespace mixupe {

// The targets of every row: class indices (two with `partner`) or dense (N, C) rows.
template <typename T>
struct Targets {
  Vector<int64_t> own, partner;
  Vector<T> lam;
  const T* dense = nullptr;
  int64_t dense_stride = 0;
  const T* class_weight = nullptr;
  int64_t classes = 0, ignore_index = 0;
  T label_smoothing = 0;

  // Whether the row's target has weight outside its label columns.
  MIXUPE_FN bool everywhere() const { return dense || label_smoothing != T(0); }

  MIXUPE_FN Labels<T> row_labels(int64_t row) const {
    if (dense) return {0, 0, T(0), T(0), T(0), T(1)};
    const int64_t first = own[row];
    Labels<T> l = labels<T>(first, partner ? partner[row] : first, partner ? lam[row] : T(1), ignore_index,
                            label_smoothing, classes);
    if (class_weight) l.own_weight *= class_weight[l.own], l.partner_weight *= class_weight[l.partner];
    return l;
  }
};

// What makes the rows' CE and H a MixupE loss.
template <typename T>
struct LossShape {
  int64_t rows = 0, num_mixed = 0, num_reg = 0;
  int penalty = 0;
  T threshold = 0;

  // Whether a row with this share of kept labels carries R.
  MIXUPE_FN bool regularizes(int64_t row, T kept) const { return row >= rows - num_reg && kept == T(1); }
};

// Σy where q̂ depends on it: dense targets of a softmax.
template <typename T>
MIXUPE_FN T q_hat_mass(const Targets<T>& t, bool sigmoid, T mass) {
  return t.dense && !sigmoid ? mass : T(1);
}

// One pass over the logits: CE, H and lse of every row.
template <typename L>
struct Forward {
  using T = Accumulate<L>;
  const L* logits;
  int64_t stride;
  Targets<T> targets;
  bool sigmoid;
  LossShape<T> shape;
  T *ce, *entropy, *lse;
  // For mixupe_loss, whose `entropy` is signed: each row's penalty, 0 for a row that carries none, and, if asked for, its
  // share of kept labels.
  T *value = nullptr, *kept = nullptr;
};

template <typename T>
struct RowLoss {
  T ce, entropy, lse, mass;
};

// Writes what was found of a row; returns the slope of its penalty, 0 where it carries none.
template <typename L, typename T>
MIXUPE_FN T write_row(const Forward<L>& job, int64_t row, const Labels<T>& l, const RowLoss<T>& r) {
  job.ce[row] = r.ce, job.entropy[row] = r.entropy, job.lse[row] = r.lse;
  if (!job.value) return T(0);
  const LossShape<T>& shape = job.shape;
  const T q = q_hat(r.ce, r.entropy, r.lse, q_hat_mass(job.targets, job.sigmoid, r.mass));
  const bool regularized = shape.regularizes(row, l.kept);
  Penalty<T> penalty{};
  if (regularized) penalty = penalty_of(shape.penalty, q, shape.threshold);
  job.value[row] = penalty.value;
  job.entropy[row] = sign_entropy(r.entropy, penalty.slope);
  if (job.kept) job.kept[row] = l.kept;
  return penalty.slope;
}

// The whole loss of those rows.
template <typename L>
struct Loss {
  using T = Accumulate<L>;
  Forward<L> rows;
  const T *eta, *reg_weight;
  double clean_weight;
  bool rescale;
  T *loss, *parts;
};

template <typename L>
MIXUPE_FN LossWeights weights_of(const Loss<L>& job) {
  return {*job.eta, *job.reg_weight, job.clean_weight};
}

// The gradient of every row.
template <typename L>
struct Backward {
  using T = Accumulate<L>;
  const L* logits;  // `out` may be the logits
  int64_t stride;
  L* out;
  int64_t out_stride, rows;
  Targets<T> targets;
  bool sigmoid;
  Vector<T> entropy, lse;
  Vector<T> grad_ce = {}, grad_entropy = {}, grad_lse = {};
  // For a loss, in place of the three gradients; `entropy` is then signed, and no `grad` stands for 1.
  bool loss = false;
  const T* grad = nullptr;
  Vector<T> parts = {};
  int64_t num_mixed = 0;
  int penalty = 0;
};

// A row's upstream gradients, and the level of its own (see RowGradient).
template <typename T>
struct RowUpstream {
  RowGradient<T> g;
  T level;
};

template <typename L, typename T>
MIXUPE_FN RowUpstream<T> upstream(const Backward<L>& job, int64_t row, T mass) {
  if (!job.loss) {
    const RowGradient<T> g{job.grad_ce ? job.grad_ce[row] : T(0), job.grad_entropy ? job.grad_entropy[row] : T(0),
                           job.grad_lse ? job.grad_lse[row] : T(0)};
    return {g, gradient_level(g, mass, job.entropy[row])};
  }
  const T grad = job.grad ? *job.grad : T(1);
  const SignedEntropy<T> h = split_sign(job.entropy[row]);
  const T ce = row < job.num_mixed ? grad * job.parts[of_mix] : weigh(job.parts[of_clean], grad);
  const RowGradient<T> g =
      loss_gradient(ce, grad * job.parts[of_penalty], h.slope, q_hat_mass(job.targets, job.sigmoid, mass), job.penalty);
  return {g, gradient_level(g, mass, h.entropy)};
}

}  // namespace mixupe

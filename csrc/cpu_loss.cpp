// ce_entropy, mixupe_loss and their backwards on the CPU: parallel loops over rows, arithmetic from row.h.
#include <memory>

#include "cpu.h"

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

// Reads a block of logits, padded with -∞, which adds 0 to every sum; returns their maximum.
template <typename L, typename T>
MIXUPE_FN T load_logits(const L* z, int64_t n, T* block) {
  const int64_t whole = n & ~(lanes - 1), end = padded(n);
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) block[i] = widen(z[i]);
  if (whole < n) {
    for (int64_t i = whole; i < whole + lanes; ++i) block[i] = T(-INFINITY);
    for (int64_t i = whole; i < n; ++i) block[i] = widen(z[i]);
  }
  T max = T(-INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < end; ++i) max = block[i] > max ? block[i] : max;
  return max;
}

template <typename L, typename T>
MIXUPE_SIMD Stats<T> softmax_block(const L* z, int64_t n, T* block) {
  const T max = load_logits(z, n, block), shift = finite_shift(max);
  T sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t i = 0; i < padded(n); ++i) add_logit(block[i], shift, sum, weighted);
  return {max, sum, weighted};
}

// The targets of a block of columns, padded with 0; returns Σy.
template <typename T>
MIXUPE_SIMD T target_block(const Targets<T>& t, const Labels<T>& l, int64_t row, int64_t start, int64_t n, T* y) {
  if (t.dense) {
    const T* dense = t.dense + row * t.dense_stride + start;
    const T kept = T(1) - t.label_smoothing, uniform = t.label_smoothing / T(t.classes);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = dense[i] * kept + uniform;
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = l.uniform;
  }
  if (t.class_weight) {
    const T* weight = t.class_weight + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] *= weight[i];
  }
  for (int64_t i = n; i < padded(n); ++i) y[i] = T(0);
  if (!t.dense && l.own >= start && l.own < start + n) y[l.own - start] += l.own_weight;
  if (!t.dense && l.partner >= start && l.partner < start + n) y[l.partner - start] += l.partner_weight;
  T mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t i = 0; i < padded(n); ++i) mass += y[i];
  return mass;
}

// Σ y (z - shift)
template <typename T>
MIXUPE_SIMD T target_dot(const T* z, const T* y, int64_t n, T shift) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < padded(n); ++i) dot += weigh(y[i], z[i] - shift);
  return dot;
}

template <typename T>
struct SigmoidSums {
  T ce, entropy, softplus;
};

template <typename L, typename T>
MIXUPE_SIMD SigmoidSums<T> sigmoid_block(const L* z, const T* y, int64_t n, T* block) {
  load_logits(z, n, block);
  T ce = 0, entropy = 0, softplus = 0;
#pragma omp simd reduction(+ : ce, entropy, softplus)
  for (int64_t i = 0; i < padded(n); ++i) {
    T own_softplus = 0, own_entropy = 0;
    add_sigmoid_logit(block[i], own_softplus, own_entropy);
    entropy += own_entropy;
    softplus += own_softplus;
    ce += own_softplus - weigh(y[i], block[i]);
  }
  return {ce, entropy, softplus};
}

template <typename L, typename T>
MIXUPE_SIMD void softmax_gradient_block(const L* z, int64_t n, T lse, T level, T slope, T* block) {
  load_logits(z, n, block);
#pragma omp simd
  for (int64_t i = 0; i < padded(n); ++i) block[i] = softmax_gradient(block[i], lse, level, slope);
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

template <typename L, typename T>
MIXUPE_SIMD void write_block(const T* block, int64_t n, L* out) {
  store_block(block, n, out);
}

template <typename T>
struct RowLoss {
  T ce, entropy, lse, mass;
};

// The few numbers of a row are float64, so that merging blocks costs no digits.
template <typename L, typename T>
RowLoss<T> softmax_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row, Block<T>& block) {
  const bool everywhere = t.everywhere();
  Stats<double> stats = empty_stats<double>();
  double mass = 0, dot = 0;  // Σ y and Σ y (z - max)
  for (int64_t start = 0; start < t.classes; start += block_size) {
    const int64_t n = block_length(t.classes, start);
    const Stats<T> narrow_part = softmax_block(z + start, n, block.z);
    const Stats<double> part{narrow_part.max, narrow_part.sum, narrow_part.weighted};
    const Stats<double> joint = start == 0 ? part : merge(stats, part);
    if (everywhere) {
      const T part_mass = target_block(t, l, row, start, n, block.y), shift = finite_shift(narrow_part.max);
      dot += weigh(mass, finite_shift(stats.max) - finite_shift(joint.max));
      dot += target_dot(block.z, block.y, n, shift) + weigh<double>(part_mass, shift - finite_shift(joint.max));
      mass += part_mass;
    }
    stats = joint;
  }
  const double log_total = log_sum(stats);
  // From shifted logits: lse - z_y would lose the digits of a shift that all logits share.
  const double ce = everywhere ? weigh(mass, log_total) - dot
                               : weigh<double>(l.own_weight, log_total - (widen(z[l.own]) - stats.max)) +
                                     weigh<double>(l.partner_weight, log_total - (widen(z[l.partner]) - stats.max));
  return {T(ce), T(entropy(stats, log_total)), T(stats.max + log_total), T(mass)};
}

template <typename L, typename T>
RowLoss<T> sigmoid_row(const L* z, const Targets<T>& t, const Labels<T>& l, int64_t row, Block<T>& block) {
  double ce = 0, entropy = 0, softplus = 0;
  for (int64_t start = 0; start < t.classes; start += block_size) {
    const int64_t n = block_length(t.classes, start);
    target_block(t, l, row, start, n, block.y);
    const SigmoidSums<T> part = sigmoid_block(z + start, block.y, n, block.z);
    ce += part.ce, entropy += part.entropy, softplus += part.softplus;
  }
  return {T(ce), T(entropy), T(softplus), T(0)};
}

// What makes the rows' CE and H a MixupE loss.
template <typename T>
struct LossShape {
  int64_t rows = 0, num_mixed = 0, num_reg = 0;
  int penalty = penalty_abs;
  T threshold = 0;
};

template <typename L>
struct Forward {
  using T = Accumulate<L>;
  const L* logits;
  int64_t stride;
  Targets<T> targets;
  bool sigmoid;
  T *ce, *entropy, *lse;
  // For mixupe_loss: each row's share of kept labels and its penalty.
  T *kept = nullptr, *value = nullptr;
  LossShape<T> shape = {};
};

// Σy where q̂ depends on it: dense targets of a softmax.
template <typename T>
T q_hat_mass(const Targets<T>& t, bool sigmoid, T mass) {
  return t.dense && !sigmoid ? mass : T(1);
}

template <typename L>
void forward_rows(const Forward<L>& job, int64_t begin, int64_t end) {
  using T = Accumulate<L>;
  Block<T> block;
  for (int64_t row = begin; row < end; ++row) {
    const L* z = job.logits + row * job.stride;
    const Labels<T> l = job.targets.row_labels(row);
    const RowLoss<T> r = job.sigmoid ? sigmoid_row(z, job.targets, l, row, block)
                                     : softmax_row(z, job.targets, l, row, block);
    job.ce[row] = r.ce, job.entropy[row] = r.entropy, job.lse[row] = r.lse;
    if (!job.value) continue;
    const T q = q_hat(r.ce, r.entropy, r.lse, q_hat_mass(job.targets, job.sigmoid, r.mass));
    job.kept[row] = job.targets.dense ? T(1) : l.kept;
    job.value[row] = penalty_value(q, job.shape.penalty, job.shape.threshold);
  }
}

template <typename L>
struct Backward {
  using T = Accumulate<L>;
  const L* logits;
  int64_t stride;
  L* out;
  int64_t out_stride;
  Targets<T> targets = {};
  bool sigmoid = false;
  T class_weight_sum = 0;
  Vector<T> entropy = {}, lse = {};
  Vector<T> grad_ce = {}, grad_entropy = {}, grad_lse = {};
  // For mixupe_loss_backward, in place of the three gradients: upstream's factor of a row of L_mix and of R.
  Vector<T> ce = {};
  T mix = 0, reg = 0;
  LossShape<T> shape = {};
};

template <typename L, typename T>
RowGradient<T> upstream(const Backward<L>& job, const Labels<T>& l, int64_t row, T mass) {
  if (!job.ce)
    return {job.grad_ce ? job.grad_ce[row] : T(0), job.grad_entropy ? job.grad_entropy[row] : T(0),
            job.grad_lse ? job.grad_lse[row] : T(0)};
  const LossShape<T>& shape = job.shape;
  const bool regularized = row >= shape.rows - shape.num_reg && (job.targets.dense || l.kept == T(1));
  const T q_mass = q_hat_mass(job.targets, job.sigmoid, mass);
  const T q = q_hat(job.ce[row], job.entropy[row], job.lse[row], q_mass);
  return loss_gradient(row < shape.num_mixed ? job.mix : T(0), regularized ? job.reg : T(0), q, q_mass,
                       shape.penalty, shape.threshold);
}

// Σy of a row; dense targets take a pass of their own, since every column's gradient needs it.
template <typename L, typename T>
T target_mass(const Backward<L>& job, const Labels<T>& l, int64_t row, T* y) {
  const Targets<T>& t = job.targets;
  if (!t.dense) return l.own_weight + l.partner_weight + l.uniform * job.class_weight_sum;
  double mass = 0;
  for (int64_t start = 0; start < t.classes; start += block_size)
    mass += target_block(t, l, row, start, block_length(t.classes, start), y);
  return T(mass);
}

template <typename L>
void backward_rows(const Backward<L>& job, int64_t begin, int64_t end) {
  using T = Accumulate<L>;
  Block<T> block;
  const Targets<T>& t = job.targets;
  for (int64_t row = begin; row < end; ++row) {
    const Labels<T> l = t.row_labels(row);
    const T mass = target_mass(job, l, row, block.y);
    const RowGradient<T> g = upstream(job, l, row, mass);
    const T level = gradient_level(g, mass, job.entropy[row]);
    for (int64_t start = 0; start < t.classes; start += block_size) {
      const int64_t n = block_length(t.classes, start);
      const L* z = job.logits + row * job.stride + start;
      if (job.sigmoid || t.everywhere()) target_block(t, l, row, start, n, block.y);
      // The label term meets the rest before the one rounding to the logits' dtype: in bfloat16 a later subtraction
      // would lose the whole gradient where p is near 1.
      if (job.sigmoid) {
        sigmoid_gradient_block(z, block.y, n, g, block.z);
      } else {
        softmax_gradient_block(z, n, job.lse[row], level, g.entropy, block.z);
        if (t.everywhere()) {
          subtract_targets(block.y, n, g.ce, block.z);
        } else {
          if (l.own >= start && l.own < start + n) block.z[l.own - start] -= g.ce * l.own_weight;
          if (l.partner >= start && l.partner < start + n) block.z[l.partner - start] -= g.ce * l.partner_weight;
        }
      }
      write_block(block.z, n, job.out + row * job.out_stride + start);
    }
  }
}

void check_labels(const Vector<int64_t>& labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; labels && i < rows; ++i)
    if ((labels[i] < 0 || labels[i] >= classes) && labels[i] != ignore_index)
      fail("target must be a class in [0, ", classes - 1, "], got ", labels[i]);
}

template <typename T>
Targets<T> cpu_targets(
    TargetTensors& keep, const Tensor& logits, const OptionalTensor& partner, const OptionalTensor& lam,
    double label_smoothing, int64_t ignore_index) {
  const Targets<T> t = check_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index);
  check_labels(t.own, logits.size(0), t.classes, ignore_index);
  check_labels(t.partner, logits.size(0), t.classes, ignore_index);
  return t;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename L>
void run(const Forward<L>& job, int64_t rows) {
  parallel_rows(rows, job.targets.classes, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
}

template <typename L>
void run(const Backward<L>& job, int64_t rows) {
  parallel_rows(rows, job.targets.classes, [&](int64_t begin, int64_t end) { backward_rows(job, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> ce_entropy(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const OptionalTensor& class_weight, double label_smoothing, int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor ce = allocate(logits, dtype, {rows}), entropy = allocate(logits, dtype, {rows}),
         lse = allocate(logits, dtype, {rows});
  TargetTensors keep{target, class_weight};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    Forward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0),
                   cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index), sigmoid,
                   data<T>(ce), data<T>(entropy), data<T>(lse)};
    run(job, rows);
  });
  return {ce, entropy, lse};
}

// The fields of a backward job that both backward operators have.
template <typename L>
Backward<L> backward_job(
    const Tensor& logits, const Tensor& out, const Targets<Accumulate<L>>& targets, bool sigmoid,
    const Tensor& entropy, const Tensor& lse) {
  using T = Accumulate<L>;
  Backward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0), data<L>(out), out.stride(0)};
  job.targets = targets;
  job.sigmoid = sigmoid;
  job.class_weight_sum = T(targets.classes);
  if (targets.class_weight) {
    job.class_weight_sum = 0;
    for (int64_t k = 0; k < targets.classes; ++k) job.class_weight_sum += targets.class_weight[k];
  }
  job.entropy = vector_of<T>("entropy", entropy, logits.size(0), logits);
  job.lse = vector_of<T>("lse", lse, logits.size(0), logits);
  return job;
}

Tensor ce_entropy_backward(
    const OptionalTensor& grad_ce, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
    const Tensor& logits_argument, const Tensor& entropy, const Tensor& lse, const Tensor& target,
    const OptionalTensor& partner, const OptionalTensor& lam, const OptionalTensor& class_weight,
    double label_smoothing, int64_t ignore_index, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  Tensor out = allocate(logits, logits.scalar_type(), {rows, logits.size(1)});
  TargetTensors keep{target, class_weight};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const Targets<T> targets = cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignore_index);
    Backward<L> job = backward_job<L>(logits, out, targets, sigmoid, entropy, lse);
    job.grad_ce = vector_of<T>("grad_ce", grad_ce, rows, logits);
    job.grad_entropy = vector_of<T>("grad_entropy", grad_entropy, rows, logits);
    job.grad_lse = vector_of<T>("grad_lse", grad_lse, rows, logits);
    run(job, rows);
  });
  return out;
}

constexpr int64_t ignored_label = -100;  // reference.IGNORE_INDEX

// (L_mix, R, η̂, 1/rows of L_mix, 1/rows of R) and the loss, summed serially in float64: the same bits for any number
// of threads.
template <typename L, typename T>
void reduce_loss(const Forward<L>& job, double eta, double reg_weight, bool rescale, T* parts, T* loss) {
  const LossShape<T>& shape = job.shape;
  double mix = 0, rows_mix = 0, reg = 0, rows_reg = 0;
  for (int64_t row = 0; row < shape.num_mixed; ++row) mix += job.ce[row], rows_mix += job.kept[row];
  for (int64_t row = shape.rows - shape.num_reg; row < shape.rows; ++row) {
    const bool whole = job.kept[row] == T(1);
    reg += whole ? job.value[row] : T(0);
    rows_reg += whole;
  }
  const double per_mix = rows_mix > 0 ? 1 / rows_mix : 0, per_reg = rows_reg > 0 ? 1 / rows_reg : 0;
  mix *= per_mix;
  reg *= per_reg * reg_weight;
  const double total = mix + eta * reg, eta_hat = rescale ? rescale_factor(mix, total) : 1;
  parts[0] = T(mix), parts[1] = T(reg), parts[2] = T(eta_hat), parts[3] = T(per_mix), parts[4] = T(per_reg);
  *loss = T(eta_hat * total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixupe_loss(
    const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner, const OptionalTensor& lam,
    const Tensor& eta, const Tensor& reg_weight, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    bool rescale, double label_smoothing, bool sigmoid) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  check_loss_rows(rows, num_mixed, num_reg, penalty);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor loss = allocate(logits, dtype, {}), parts = allocate(logits, dtype, {5}), ce = allocate(logits, dtype, {rows}),
         entropy = allocate(logits, dtype, {rows}), lse = allocate(logits, dtype, {rows});
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    Forward<L> job{static_cast<const L*>(logits.const_data_ptr()), logits.stride(0),
                   cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label), sigmoid,
                   data<T>(ce), data<T>(entropy), data<T>(lse)};
    const std::unique_ptr<T[]> scratch(new T[2 * rows]);
    job.kept = scratch.get();
    job.value = scratch.get() + rows;
    job.shape = {rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
    run(job, rows);
    reduce_loss(job, *scalar_of<T>("eta", eta, logits), *scalar_of<T>("reg_weight", reg_weight, logits), rescale,
                data<T>(parts), data<T>(loss));
  });
  return {loss, parts, ce, entropy, lse};
}

void mixupe_loss_backward_out(
    const Tensor& grad, const Tensor& logits_argument, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& eta, const Tensor& reg_weight, const Tensor& parts, const Tensor& ce,
    const Tensor& entropy, const Tensor& lse, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    double label_smoothing, bool sigmoid, Tensor out) {
  const Tensor logits = check_logits(logits_argument);
  const int64_t rows = logits.size(0);
  check_loss_rows(rows, num_mixed, num_reg, penalty);
  require_dtype("out", out, logits.scalar_type());
  require_device("out", out, logits);
  require(sizes_of(out) == sizes_of(logits), "out must have the shape of logits");
  require(!overlap(logits, out) || same_memory(logits, out), "out must be logits itself or not overlap it");
  const bool dense = samples_are(out, MemoryFormat::Contiguous) && (rows <= 1 || out.stride(0) >= out.size(1));
  Tensor result = dense ? out : allocate(logits, logits.scalar_type(), sizes_of(logits));
  TargetTensors keep{target, std::nullopt};
  with_float_type(logits.scalar_type(), [&](auto type) {
    using L = decltype(type);
    using T = Accumulate<L>;
    const Targets<T> targets = cpu_targets<T>(keep, logits, partner, lam, label_smoothing, ignored_label);
    Backward<L> job = backward_job<L>(logits, result, targets, sigmoid, entropy, lse);
    const Vector<T> part = vector_of<T>("parts", parts, 5, logits);
    const T upstream = *scalar_of<T>("grad", grad, logits) * part[2];
    const T weight = *scalar_of<T>("eta", eta, logits) * *scalar_of<T>("reg_weight", reg_weight, logits);
    job.ce = vector_of<T>("ce", ce, rows, logits);
    job.mix = upstream * part[3];
    job.reg = upstream * weight * part[4];
    job.shape = {rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
    run(job, rows);
  });
  if (!dense) torch::stable::copy_(out, result);
}

Tensor mixupe_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const OptionalTensor& partner,
    const OptionalTensor& lam, const Tensor& eta, const Tensor& reg_weight, const Tensor& parts, const Tensor& ce,
    const Tensor& entropy, const Tensor& lse, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold,
    double label_smoothing, bool sigmoid) {
  Tensor out = allocate(logits, logits.scalar_type(), sizes_of(logits));
  mixupe_loss_backward_out(grad, logits, target, partner, lam, eta, reg_weight, parts, ce, entropy, lse, num_mixed,
                           num_reg, penalty, threshold, label_smoothing, sigmoid, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixupe, CPU, m) {
  m.impl("ce_entropy", TORCH_BOX(&ce_entropy));
  m.impl("ce_entropy_backward", TORCH_BOX(&ce_entropy_backward));
  m.impl("mixupe_loss", TORCH_BOX(&mixupe_loss));
  m.impl("mixupe_loss_backward", TORCH_BOX(&mixupe_loss_backward));
  m.impl("mixupe_loss_backward_out", TORCH_BOX(&mixupe_loss_backward_out));
}

}  // namespace mixupe

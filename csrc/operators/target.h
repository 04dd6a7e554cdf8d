// mixed_target on the host, over the run_target that each backend defines, and what it makes of one row.
#pragma once
#include <tuple>

#include "checks.h"

namespace mixupe {
namespace {

// Rows of a batch, the mixed ones first: partners, labels and λ.
template <typename T>
struct TargetRows {
  int64_t batch, count, num_mixed;
  Vector<int64_t> labels, partner, rows;
  Vector<T> lam;
  T* own_lam;
  int64_t *own_partner, *own_label, *partner_label;

  MIXUPE_FN int64_t own(int64_t row) const { return rows[row]; }

  // A clean row is its own partner.
  MIXUPE_FN int64_t other(int64_t row) const {
    const int64_t sample = own(row);
    return row >= num_mixed ? sample : partner ? partner[sample] : batch - 1 - sample;
  }

  MIXUPE_FN void write(int64_t row, int64_t own, int64_t other) const {
    own_lam[row] = row < num_mixed ? lam[own] : T(1);
    own_partner[row] = other;
    own_label[row] = labels[own];
    partner_label[row] = labels[other];
  }
};

template <typename T>
void run_target(const TargetRows<T>& job, const Tensor& like);

std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_target(const Tensor& labels, const OptionalTensor& partner,
                                                        const Tensor& lam, const Tensor& rows, int64_t num_mixed) {
  require(labels.dim() == 1, "labels must have one dimension, got ", labels.dim());
  require(rows.dim() == 1, "rows must have one dimension, got ", rows.dim());
  const int64_t batch = labels.size(0), count = rows.size(0);
  require(num_mixed >= 0 && num_mixed <= count, "num_mixed must be in [0, ", count, "], got ", num_mixed);
  if (lam.scalar_type() != ScalarType::Double) require_dtype("lam", lam, ScalarType::Float);
  const Beside beside{"labels", labels};
  const auto indices = [&] { return allocate(labels, ScalarType::Long, {count}); };
  const Tensor own_lam = allocate(labels, lam.scalar_type(), {count}), own_partner = indices(), own_label = indices(),
               partner_label = indices();
  const auto run = [&](auto type) {
    using T = decltype(type);
    const TargetRows<T> job{batch,
                            count,
                            num_mixed,
                            vector_of<int64_t>("labels", labels, batch, beside),
                            vector_of<int64_t>("partner", partner, batch, beside),
                            vector_of<int64_t>("rows", rows, count, beside),
                            row_weights<T>("lam", lam, batch, beside),
                            data<T>(own_lam),
                            data<int64_t>(own_partner),
                            data<int64_t>(own_label),
                            data<int64_t>(partner_label)};
    run_target(job, labels);
  };
  lam.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {own_lam, own_partner, own_label, partner_label};
}

STABLE_TORCH_LIBRARY_IMPL(mixupe, MIXUPE_KEY, m) { m.impl("mixed_target", TORCH_BOX(&mixed_target)); }

}  // namespace
}  // namespace mixupe

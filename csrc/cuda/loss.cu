// The launches of ce_entropy, mixupe_loss and their backwards. Kernels are in rows.h.
#include "../operators/loss.h"

#include "launch.h"
#include "rows.h"

namespace mixupe {
namespace {

template <typename T>
void check_values(const Targets<T>&, int64_t) {}  // the kernels assert: see checked_labels

// Calls f with the team for rows of the targets' length and, as a constant, whether they are sigmoid rows.
template <typename T, typename F>
void with_variant(const Targets<T>& targets, bool sigmoid, const F& f) {
  with_team(targets.classes, [&](auto team) { sigmoid ? f(team, std::true_type{}) : f(team, std::false_type{}); });
}

template <typename L>
void run_rows(const Forward<L>& job, const Tensor& like) {
  with_variant(job.targets, job.sigmoid, [&](auto team, auto sigmoid) {
    using Rows = decltype(team);
    launch(forward_rows<Rows, sigmoid.value, L>, Rows::blocks(job.shape.rows), Rows::block, like, job);
  });
}

template <typename L>
void run_gradient(const Backward<L>& job, const Tensor& like) {
  with_variant(job.targets, job.sigmoid, [&](auto team, auto sigmoid) {
    using Rows = decltype(team);
    launch(backward_rows<Rows, sigmoid.value, L>, Rows::blocks(job.rows), Rows::block, like, job);
  });
}

// Memory of `vectors` numbers a row in one allocation, which takes the host 1 µs: the i-th vector begins at i·rows.
template <typename L>
Tensor scratch_of(const Forward<L>& rows, int64_t vectors, const Tensor& like) {
  return allocate(like, dtype_of<Accumulate<L>>(), {vectors, rows.shape.rows});
}

template <typename L>
void run_loss(Loss<L> job, const Tensor& like) {
  const Tensor scratch = scratch_of(job.rows, 3, like);
  auto* const vectors = data<Accumulate<L>>(scratch);
  const int64_t rows = job.rows.shape.rows;
  job.rows.ce = vectors, job.rows.kept = vectors + rows, job.rows.value = vectors + 2 * rows;
  run_rows(job.rows, like);
  using All = Team<1024>;
  launch(total_loss<All, L>, 1, All::block, like, job);
}

template <typename L>
void run_loss_with_gradient(Loss<L> job, const Tensor& gradient) {
  const Tensor scratch = scratch_of(job.rows, 2, gradient);
  auto* const vectors = data<Accumulate<L>>(scratch);
  job.rows.entropy = vectors, job.rows.lse = vectors + job.rows.shape.rows;
  run_loss(job, gradient);
  run_gradient(backward_of(job, gradient), gradient);
}

}  // namespace
}  // namespace mixupe

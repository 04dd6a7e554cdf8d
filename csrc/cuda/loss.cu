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

template <typename L>
void run_loss(Loss<L> job, const Tensor& like) {
  using T = Accumulate<L>;
  const auto scratch = [&] { return allocate(like, dtype_of<T>(), {job.rows.shape.rows}); };
  const Tensor ce = scratch(), kept = scratch(), value = scratch();
  job.rows.ce = data<T>(ce), job.rows.kept = data<T>(kept), job.rows.value = data<T>(value);
  run_rows(job.rows, like);
  using All = Team<1024>;
  launch(total_loss<All, L>, 1, All::block, like, job);
}

template <typename L>
void run_loss_with_gradient(Loss<L> job, const Tensor& gradient) {
  using T = Accumulate<L>;
  const Tensor signed_entropy = allocate(gradient, dtype_of<T>(), {job.rows.shape.rows}),
               lse = allocate(gradient, dtype_of<T>(), {job.rows.shape.rows});
  job.rows.entropy = data<T>(signed_entropy), job.rows.lse = data<T>(lse);
  run_loss(job, gradient);
  run_gradient(backward_of(job, gradient), gradient);
}

}  // namespace
}  // namespace mixupe

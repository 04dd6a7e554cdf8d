// The launches of ce_entropy, mixupe_loss and their backwards. Kernels are in forward.h and backward.h.
#include "../operators/loss.h"

#include "backward.h"
#include "forward.h"
#include "launch.h"

namespace mixupe {
namespace {

template <typename T>
void check_values(const Targets<T>&, int64_t) {}  // the kernels assert: see checked_labels

// Calls f with whether rows are sigmoid rows, as a constant.
template <typename F>
void with_variant(bool sigmoid, const F& f) {
  sigmoid ? f(std::true_type{}) : f(std::false_type{});
}

// Memory for the sums of all parts.
template <typename Sums>
Tensor sums_of_parts(int64_t rows, const Cut& cut, const Tensor& like) {
  return allocate(like, ScalarType::Double, {rows, cut.parts, int64_t(sizeof(Sums) / sizeof(double))});
}

template <typename L>
void run_rows(const Forward<L>& job, const Tensor& like) {
  const int64_t rows = job.shape.rows;
  const Cut cut(rows, job.targets.classes);
  with_variant(job.sigmoid, [&](auto sigmoid) {
    constexpr bool is_sigmoid = decltype(sigmoid)::value;
    if (cut.parts == 1)
      return with_team(job.targets.classes, [&](auto team) {
        using Rows = decltype(team);
        launch(forward_rows<Rows, is_sigmoid, L>, Rows::blocks(rows), Rows::block, like, job);
      });
    using Sums = SumsOf<is_sigmoid, Accumulate<L>>;
    const Tensor sums = sums_of_parts<Sums>(rows, cut, like);
    const ForwardParts<is_sigmoid, L> parts{job, cut, data<Sums>(sums)};
    launch(forward_parts<BlockTeam, is_sigmoid, L>, {rows, cut.parts}, BlockTeam::block, like, parts);
    launch(join_parts<WarpTeam, is_sigmoid, L>, WarpTeam::blocks(rows), WarpTeam::block, like, parts);
  });
}

template <typename L>
void run_gradient(const Backward<L>& job, const Tensor& like) {
  const Cut cut(job.rows, job.targets.classes);
  with_variant(job.sigmoid, [&](auto sigmoid) {
    constexpr bool is_sigmoid = decltype(sigmoid)::value;
    if (cut.parts == 1)
      return with_team(job.targets.classes, [&](auto team) {
        using Rows = decltype(team);
        launch(backward_rows<Rows, is_sigmoid, L>, Rows::blocks(job.rows), Rows::block, like, job);
      });
    using Sums = SoftmaxSums<Accumulate<L>>;
    const Tensor sums = sums_of_parts<Sums>(is_sigmoid ? 0 : job.rows, cut, like);
    const BackwardParts<L> parts{job, cut, data<Sums>(sums)};
    const Grid grid{job.rows, cut.parts};
    if (!is_sigmoid) launch(sum_parts<BlockTeam, L>, grid, BlockTeam::block, like, parts);
    launch(backward_parts<BlockTeam, is_sigmoid, L>, grid, BlockTeam::block, like, parts);
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

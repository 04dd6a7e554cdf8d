// mixed_target on CUDA: a thread a row.
#include "../operators/target.h"

#include "elements.h"
#include "launch.h"
#include "team.h"

namespace mixupe {
namespace {

constexpr int rows_per_block = 128;

template <typename T>
__global__ void __launch_bounds__(rows_per_block) write_rows(const TargetRows<T> job) {
  begin_kernel();
  const int64_t row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x;
  if (row >= job.count) return;
  const int64_t own = checked_row(job.own(row), job.batch);
  job.write(row, own, checked_row(job.other(row), job.batch));
}

template <typename T>
void run_target(const TargetRows<T>& job, const Tensor& like) {
  launch(write_rows<T>, (job.count + rows_per_block - 1) / rows_per_block, rows_per_block, like, job);
}

}  // namespace

}  // namespace mixupe

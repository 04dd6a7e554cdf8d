// mixed_target on the CPU.
#include "../operators/target.h"

#include "parallel.h"
#include "values.h"

namespace mixupe {
namespace {

template <typename T>
void run_target(const TargetRows<T>& job, const Tensor&) {
  check_rows("rows", job.rows, job.count, job.batch);
  check_rows("partner", job.partner, job.batch, job.batch);
  parallel_rows(job.count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) job.write(row, job.own(row), job.other(row));
  });
}

}  // namespace

}  // namespace mixupe

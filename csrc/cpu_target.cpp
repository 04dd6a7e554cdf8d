// mixed_target on the CPU.
#include "cpu.h"
#include "target_rows.h"

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

STABLE_TORCH_LIBRARY_IMPL(mixupe, CPU, m) { m.impl("mixed_target", TORCH_BOX(&mixed_target)); }

}  // namespace mixupe

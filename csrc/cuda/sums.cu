// The sums and dot products of rows that the gradients of mix are made of, on CUDA.
#include "../operators/sums.h"

#include "launch.h"
#include "tiling.h"

namespace mixupe {
namespace {

template <typename In>
struct GatherJob {
  Tiling tiling;
  GatherRows<In> sums;
};

template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) gather_rows(const GatherJob<In> job) {
  begin_kernel();
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const GatherRows<In>& sums = job.sums;
  const int64_t row = job.tiling.sample_of(blockIdx.x), begin = sums.offsets[row], end = sums.offsets[row + 1];
  assert(begin >= 0 && begin <= end && end <= sums.terms && "offsets must ascend from 0 to the length of index");
  assert((row > 0 || begin == 0) && (row < job.tiling.samples - 1 || end == sums.terms) &&
         "offsets must go from 0 to the length of index");
  In* out = sums.out + row * sums.out_stride;
  for_each_in_tile<pack>(job.tiling, span_of<In, pack>(out, sums.sample), [&](auto count, int64_t k) {
    T sum[count.value] = {}, values[count.value];
    for (int64_t t = begin; t < end; ++t) {
      load(sums.src + checked_row(sums.index[t], sums.sources) * sums.src_stride + k, values);
      const T weight = sums.weight[t];
#pragma unroll
      for (int i = 0; i < count.value; ++i) sum[i] += weight * values[i];
    }
    store(sum, out + k);
  });
}

template <typename In>
void run_gather(const GatherRows<In>& sums, const Tensor& like) {
  const GatherJob<In> job{Tiling(sums.rows, sums.sample, pack_of<In>), sums};
  launch(gather_rows<In>, job.tiling.blocks(), job.tiling.threads, like, job);
}

template <int count, typename T>
__device__ __forceinline__ void load_input(const Operand& input, int64_t row, int64_t k, T (&values)[count]) {
  with_dtype(input.dtype, input.at(row, k), [&](const auto* p) { load(p, values); });
}

template <typename Team, typename T>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) dot_rows(const DotRows<T> job) {
  begin_kernel();
  constexpr int pack = 8;  // 16 bytes of the narrowest dtype that occurs often
  const int64_t t = Team::row();
  if (t >= job.count) return;  // whole teams
  const int64_t a_row = checked_row(job.a.index[t], job.a.rows), b_row = checked_row(job.b.index[t], job.b.rows);
  Span span{};
  with_dtype(job.a.dtype, job.a.at(a_row, 0), [&](const auto* p) {
    span = span_of<std::remove_const_t<std::remove_pointer_t<decltype(p)>>, pack>(p, job.sample);
  });
  T sum = 0;
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T a[count.value], b[count.value];
    load_input(job.a, a_row, k, a);
    load_input(job.b, b_row, k, b);
#pragma unroll
    for (int i = 0; i < count.value; ++i) sum += a[i] * b[i];
  });
  const double total = Team::reduce(static_cast<double>(sum), [](double x, double y) { return x + y; });
  if (Team::rank() == 0) job.out[t] = static_cast<T>(total);
}

template <typename T>
void run_dot(const DotRows<T>& job, const Tensor& like) {
  with_team(job.sample, [&](auto team) {
    using Rows = decltype(team);
    launch(dot_rows<Rows, T>, Rows::blocks(job.count), Rows::block, like, job);
  });
}

}  // namespace
}  // namespace mixupe

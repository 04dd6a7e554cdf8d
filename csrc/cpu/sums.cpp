// The sums and dot products of rows that the gradients of mix are made of, on the CPU.
#include "../operators/sums.h"

#include "tiling.h"
#include "values.h"

namespace mixupe {
namespace {

template <typename In, typename T>
MIXUPE_SIMD void add_block(const In* src, T weight, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] += weight * T(widen(src[i]));
}

template <typename In>
void gather_rows(const GatherRows<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T block[block_size];
  tiling.each_block(begin, end, [&](int64_t row, int64_t start, int64_t n) {
    std::memset(block, 0, n * sizeof(T));
    for (int64_t t = job.offsets[row]; t < job.offsets[row + 1]; ++t)
      add_block(job.src + job.index[t] * job.src_stride + start, job.weight[t], n, block);
    write_block(block, n, job.out + row * job.out_stride + start);
  });
}

template <typename In>
void run_gather(const GatherRows<In>& job, const Tensor&) {
  check_rows("index", job.index, job.terms, job.sources);
  require(job.offsets[0] == 0 && job.offsets[job.rows] == job.terms, "offsets must go from 0 to ", job.terms);
  for (int64_t row = 0; row < job.rows; ++row) require(job.offsets[row] <= job.offsets[row + 1], "offsets must ascend");
  if (job.sample == 0) return;
  const Tiling tiling(job.sample, job.rows, sizeof(In));
  tiling.parallel([&](int64_t begin, int64_t end) { gather_rows(job, tiling, begin, end); });
}

template <typename T>
MIXUPE_SIMD T dot_block(const T* a, const T* b, int64_t n) {
  Parts<T> sum;
  const int64_t whole = n & ~(lanes - 1);
  for (int64_t i = 0; i < whole; i += lanes)
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) sum.of[lane] += a[i + lane] * b[i + lane];
  for (int64_t i = whole; i < n; ++i) sum.of[i - whole] += a[i] * b[i];
  return sum.total();
}

// Reading is by a pointer: a call a block costs nothing, and spares compiling the loop for every pair of dtypes.
template <typename T>
using ReadBlock = void (*)(const void* x, int64_t n, T* block);

template <typename In>
MIXUPE_SIMD void read_block(const void* x, int64_t n, Accumulate<In>* block) {
  const In* values = static_cast<const In*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = widen(values[i]);
}

template <typename T>
ReadBlock<T> block_reader(ScalarType dtype) {
  ReadBlock<T> read = nullptr;
  with_mixable_type(dtype, [&](auto type) {
    if constexpr (std::is_same_v<Accumulate<decltype(type)>, T>) read = read_block<decltype(type)>;
  });
  return read;
}

template <typename T>
void run_dot(const DotRows<T>& job, const Tensor&) {
  check_rows("a_index", job.a.index, job.count, job.a.rows);
  check_rows("b_index", job.b.index, job.count, job.b.rows);
  const ReadBlock<T> read_a = block_reader<T>(job.a.dtype), read_b = block_reader<T>(job.b.dtype);
  parallel_rows(job.count, job.sample, [&](int64_t begin, int64_t end) {
    alignas(64) T a[block_size], b[block_size];
    for (int64_t row = begin; row < end; ++row) {
      double total = 0;
      for (int64_t start = 0; start < job.sample; start += block_size) {
        const int64_t n = std::min(block_size, job.sample - start);
        read_a(job.a.at(job.a.index[row], start), n, a);
        read_b(job.b.at(job.b.index[row], start), n, b);
        total += dot_block(a, b, n);
      }
      job.out[row] = static_cast<T>(total);
    }
  });
}

}  // namespace
}  // namespace mixupe

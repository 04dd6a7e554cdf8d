// mix on CUDA.
#include "../operators/mix.h"

#include "launch.h"
#include "tiling.h"

namespace mixupe {
namespace {

template <typename In>
struct MixJob {
  Tiling tiling;
  MixSamples<In> samples;
  Output out;
};

template <typename T>
__device__ __forceinline__ T checked_weight(const Vector<T>& lam, int64_t row) {
  const T weight = lam[row];
  assert(weight >= T(0) && weight <= T(1) && "lam must be in [0, 1]");
  return weight;
}

// Which of the elements k, ..., k + count - 1 of a sample are inside the box, a bit each.
template <int count>
__device__ __forceinline__ unsigned inside(const Box& box, int64_t k) {
  if (!box) return 0;
  unsigned bits = 0;
  int64_t line = box.line_of(k), column = box.column_of(k);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bits |= static_cast<unsigned>(box.contains(line, column)) << i;
    if (++column == box.line_size) column = 0, line = line + 1 == box.height ? 0 : line + 1;
  }
  return bits;
}

// A weight of 1 or 0 copies exactly, whatever the other sample holds; it is 0 where `cut` has a bit.
template <int count, typename T>
__device__ __forceinline__ void blend(const T (&own)[count], const T (&other)[count], T lam, unsigned cut,
                                      T (&out)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const T weight = cut >> i & 1 ? T(0) : lam;
    out[i] = weight == T(1) ? own[i] : weight == T(0) ? other[i] : mix(own[i], other[i], weight);
  }
}

// v·scale + shift by the channel of each of the elements k, ..., k + count - 1 of a sample.
template <int count, typename In, typename T>
__device__ __forceinline__ void normalise(const MixSamples<In>& job, int64_t k, T (&values)[count]) {
  if (!job.scale) return;
  int64_t channel = k / job.channel_stride % job.channels, left = job.channel_stride - k % job.channel_stride;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = values[i] * job.scale[channel] + job.shift[channel];
    if (--left == 0) left = job.channel_stride, channel = channel + 1 == job.channels ? 0 : channel + 1;
  }
}

template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) mix_rows(const MixJob<In> job) {
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const MixSamples<In>& samples = job.samples;
  const int64_t row = job.tiling.sample_of(blockIdx.x);
  const int64_t own_row = checked_row(samples.own(row), samples.batch);
  const int64_t other_row = checked_row(samples.other(row, own_row), samples.batch);
  const T lam = checked_weight(samples.lam, row);
  const In *own = samples.x + own_row * samples.stride, *other = samples.x + other_row * samples.stride;
  const Span span = span_of_output<pack>(job.out, row, samples.sample);
  for_each_in_tile<pack>(job.tiling, span, [&](auto count, int64_t k) {
    // A sample is not read where all its weights are 0.
    T first[count.value] = {}, second[count.value] = {}, mixed[count.value];
    const unsigned cut = inside<count.value>(samples.box, k);
    if (lam != T(0) && cut != (1u << count.value) - 1) load(own + k, first);
    if (lam != T(1) || cut) load(other + k, second);
    blend(first, second, lam, cut, mixed);
    normalise(samples, k, mixed);
    store_output(mixed, job.out, row, k);
  });
}

// The flip pairing of a whole batch: a block takes the samples i and B - 1 - i and reads each element of the two before
// it writes either, so that out may be x. Samples of the tiling are pairs.
template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) flip_rows(const MixJob<In> job) {
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const MixSamples<In>& samples = job.samples;
  const int64_t row = job.tiling.sample_of(blockIdx.x), mirror = samples.batch - 1 - row;
  const T lam = checked_weight(samples.lam, row), mirror_lam = checked_weight(samples.lam, mirror);
  const In *own = samples.x + row * samples.stride, *other = samples.x + mirror * samples.stride;
  const Span span = span_of_output<pack>(job.out, row, samples.sample);
  for_each_in_tile<pack>(job.tiling, span, [&](auto count, int64_t k) {
    T first[count.value], second[count.value], mixed[count.value];
    const unsigned cut = inside<count.value>(samples.box, k);
    load(own + k, first);
    load(other + k, second);
    blend(first, second, lam, cut, mixed);
    normalise(samples, k, mixed);
    store_output(mixed, job.out, row, k);
    if (mirror == row) return;
    blend(second, first, mirror_lam, cut, mixed);
    normalise(samples, k, mixed);
    store_output(mixed, job.out, mirror, k);
  });
}

template <typename In>
void run_mix(const MixSamples<In>& samples, const Tensor& out) {
  const bool pairs = samples.flips();
  const auto element = static_cast<int64_t>(out.element_size());
  const MixJob<In> job{Tiling(pairs ? (samples.count + 1) / 2 : samples.count, samples.sample, pack_of<In>),
                       samples,
                       {data<char>(out), out.stride(0) * element, element, out.scalar_type()}};
  launch(pairs ? flip_rows<In> : mix_rows<In>, job.tiling.blocks(), job.tiling.threads, out, job);
}

}  // namespace
}  // namespace mixupe

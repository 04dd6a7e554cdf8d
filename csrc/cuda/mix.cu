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
  begin_kernel();
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
  begin_kernel();
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

// Samples without a box whose packs are aligned and whole, as most are, normalised if they are bytes: no branch but for the end of
// a tile, and both samples asked for before either is used. A block works within one plane of a sample: a channel where there is a
// scale, else all of it. Blocks are (sample, tile, plane), so that nothing is divided. Three `channels` that are innermost lie in one
// plane: blocks have a multiple of three threads, so that all packs of a thread begin at the same channel.
template <typename In, typename Out>
struct AlignedJob {
  MixSamples<In> samples;
  Out* out;
  int64_t out_stride, plane;  // elements
  int packs;                  // of a plane
  unsigned packs_per_tile;
};

// 16 bytes of x for a load, and four loads of each sample a thread. Of bytes two, or three where a thread has three channels' factors to
// fetch: 11.2 instructions an element on sm_90 then, and more than 12 with two.
template <typename In>
constexpr int aligned_pack = vector_bytes / sizeof(In);
template <typename In, int channels>
constexpr int packs_each = sizeof(In) == 1 ? (channels == 1 ? 2 : 3) : packs_per_thread;

// What a sample of weight 0 is taken for: its product leaves every other summand as it is.
template <typename In>
__device__ __forceinline__ Words nothing() {
  Vec<In, aligned_pack<In>> pack;
#pragma unroll
  for (In& value : pack.values) value = narrow<In>(-Accumulate<In>(0));
  return words_of<In>(pack);
}

__device__ __forceinline__ Words choose(bool which, const Words& yes, const Words& no) {
  Words chosen;
#pragma unroll
  for (int i = 0; i < 4; ++i) chosen.words[i] = which ? yes.words[i] : no.words[i];
  return chosen;
}

// The factor and summand of a channel's elements.
template <typename T>
struct Affine {
  T scale, shift;
};

template <typename In, typename Out, int channels, typename T>
__device__ __forceinline__ void write_mixed(const Words& own, const Words& other, T lam,
                                            const Affine<T> (&affine)[channels], Vec<Out, aligned_pack<In>>* out) {
  constexpr int pack = aligned_pack<In>;
  Vec<In, pack> packs[2];
  memcpy(&packs[0], &own, sizeof own);
  memcpy(&packs[1], &other, sizeof other);
  T first[pack], second[pack];
  if constexpr (sizeof(In) == 1) {
    // λ (v + bias) - λ bias is one multiply-add and rounds once, as λ v does.
    constexpr T bias = byte_bias<pack>;
    const T rest = T(1) - lam;
    biased(packs[0], first);
    biased(packs[1], second);
#pragma unroll
    for (int i = 0; i < pack; ++i) {
      const T mixed = (first[i] * lam - bias * lam) + (second[i] * rest - bias * rest);
      first[i] = mixed * affine[i % channels].scale + affine[i % channels].shift;
    }
  } else {
    widened(packs[0], first);
    widened(packs[1], second);
#pragma unroll
    for (int i = 0; i < pack; ++i) first[i] = mix(first[i], second[i], lam);
  }
  *out = narrowed<Out>(first);
}

template <bool flips, typename In, typename Out, int channels>
__global__ void __launch_bounds__(most_threads, flips ? 2 : least_threads / most_threads)
    mix_aligned(const AlignedJob<In, Out> job) {
  begin_kernel();
  using T = Accumulate<In>;
  using OutPack = Vec<Out, aligned_pack<In>>;
  constexpr int each = packs_each<In, channels>;
  const MixSamples<In>& samples = job.samples;
  const int64_t row = blockIdx.x, plane = sizeof(In) == 1 ? blockIdx.z : 0;  // only bytes are scaled by channel
  const int first = static_cast<int>(blockIdx.y * job.packs_per_tile + threadIdx.x), end = job.packs;
  const int64_t own_row = flips ? row : samples.own(row);
  const int64_t other_row = flips ? samples.batch - 1 - row : samples.other(row, own_row);
  const T lam = samples.lam[row], mirror_lam = flips ? samples.lam[other_row] : lam;
  const bool are_rows = is_row(own_row, samples.batch) && is_row(other_row, samples.batch);
  const bool are_weights = lam >= T(0) && lam <= T(1) && mirror_lam >= T(0) && mirror_lam <= T(1);
  assert(are_rows && are_weights && "partner and rows must be rows of x, and lam must be in [0, 1]");
  const auto* own = reinterpret_cast<const Words*>(samples.x + own_row * samples.stride + plane * job.plane);
  const auto* other = reinterpret_cast<const Words*>(samples.x + other_row * samples.stride + plane * job.plane);
  Affine<T> affine[channels];
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    const int64_t channel = channels == 1 ? plane : (threadIdx.x + i) % channels;
    affine[i] = samples.scale ? Affine<T>{samples.scale[channel], samples.shift[channel]} : Affine<T>{T(1), T(0)};
  }
  const bool own_read = flips || lam != T(0), other_read = flips || lam != T(1);
  Words firsts[each], seconds[each];
#pragma unroll
  for (int d = 0; d < each; ++d) {
    const int p = first + d * blockDim.x;
    firsts[d] = seconds[d] = nothing<In>();
    if (own_read && p < end) firsts[d] = own[p];
    if (other_read && p < end) seconds[d] = other[p];
  }
  auto* out = reinterpret_cast<OutPack*>(job.out + row * job.out_stride + plane * job.plane);
  auto* mirror = reinterpret_cast<OutPack*>(job.out + other_row * job.out_stride + plane * job.plane);
#pragma unroll
  for (int d = 0; d < each; ++d) {
    const int p = first + d * blockDim.x;
    if (p >= end) return;
    if constexpr (flips) {
      // The two are read for one another, whatever their weights.
      const auto write = [&](const Words& ours, const Words& theirs, T weight, OutPack* to) {
        write_mixed<In, Out>(choose(weight == T(0), nothing<In>(), ours), choose(weight == T(1), nothing<In>(), theirs),
                             weight, affine, to);
      };
      write(firsts[d], seconds[d], lam, out + p);
      if (other_row != row) write(seconds[d], firsts[d], mirror_lam, mirror + p);
    } else {
      write_mixed<In, Out>(firsts[d], seconds[d], lam, affine, out + p);
    }
  }
}

inline bool are_multiples(int64_t of, std::initializer_list<int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [=](int64_t number) { return number % of == 0; });
}

// Launches mix_aligned, if packs of planes of this size are aligned and whole.
template <int channels, typename In, typename Out>
bool run_planes(const MixSamples<In>& samples, int64_t plane, const Tensor& out) {
  constexpr int pack = aligned_pack<In>;
  const auto x = static_cast<int64_t>(reinterpret_cast<uintptr_t>(samples.x));
  const auto to = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out.const_data_ptr()));
  if (plane == 0 || plane / pack > INT32_MAX || !are_multiples(vector_bytes, {x, to}) ||
      !are_multiples(pack, {plane, samples.stride, out.stride(0)}))
    return false;
  const int64_t rows = samples.flips() ? (samples.count + 1) / 2 : samples.count;
  const Tiling tiling(rows, plane, pack, packs_each<In, channels>, 32 * channels);
  const Grid grid{rows, tiling.tiles, samples.sample / plane};
  if (grid.y > UINT16_MAX || grid.z > UINT16_MAX) return false;
  const AlignedJob<In, Out> job{samples,
                                data<Out>(out),
                                out.stride(0),
                                plane,
                                static_cast<int>(plane / pack),
                                static_cast<unsigned>(tiling.packs_per_tile)};
  launch(samples.flips() ? mix_aligned<true, In, Out, channels> : mix_aligned<false, In, Out, channels>, grid,
         tiling.threads, out, job);
  return true;
}

// Launches mix_aligned if it serves the call.
template <typename In, typename Out>
bool run_aligned(const MixSamples<In>& samples, const Tensor& out) {
  if (samples.box) return false;
  if (!samples.scale) return run_planes<1, In, Out>(samples, samples.sample, out);
  if constexpr (sizeof(In) == 1) {
    if (samples.channel_stride * samples.channels == samples.sample)
      return run_planes<1, In, Out>(samples, samples.channel_stride, out);
    if (samples.channels == 3) return run_planes<3, In, Out>(samples, samples.sample, out);
  }
  return false;
}

// The pairs of dtypes that are common.
template <typename In>
bool run_common(const MixSamples<In>& samples, const Tensor& out) {
  if constexpr (std::is_same_v<In, double>) return false;
  const ScalarType dtype = out.scalar_type();
  if constexpr (sizeof(In) == 1) {
    if (dtype == ScalarType::BFloat16) return run_aligned<In, BFloat16>(samples, out);
    if (dtype == ScalarType::Half) return run_aligned<In, Half>(samples, out);
    return dtype == ScalarType::Float && run_aligned<In, float>(samples, out);
  } else {
    return dtype == dtype_of<In>() && run_aligned<In, In>(samples, out);
  }
}

template <typename In>
void run_mix(const MixSamples<In>& samples, const Tensor& out) {
  if (run_common(samples, out)) return;
  const bool pairs = samples.flips();
  const auto element = static_cast<int64_t>(out.element_size());
  const MixJob<In> job{Tiling(pairs ? (samples.count + 1) / 2 : samples.count, samples.sample, pack_of<In>),
                       samples,
                       {data<char>(out), out.stride(0) * element, element, out.scalar_type()}};
  launch(pairs ? flip_rows<In> : mix_rows<In>, job.tiling.blocks(), job.tiling.threads, out, job);
}

}  // namespace
}  // namespace mixupe

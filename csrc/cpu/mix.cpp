// mix on the CPU.
#include "../operators/mix.h"

#include <algorithm>
#include <vector>

#include "tiling.h"
#include "values.h"

namespace mixupe {
namespace {

template <typename In, typename T>
MIXUPE_SIMD void mix_block(const In* own, const In* other, T lam, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = mix(T(widen(own[i])), T(widen(other[i])), lam);
}

template <typename T>
MIXUPE_SIMD void affine_block(T scale, T shift, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = block[i] * scale + shift;
}

template <typename T>
MIXUPE_SIMD void affine_pattern(const T* scale, const T* shift, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = block[i] * scale[i] + shift[i];
}

// v·scale + shift per channel, for elements in the order of memory: channel(i) = i / channel_stride mod channels.
template <typename T>
class Affine {
 public:
  Affine() = default;
  Affine(Vector<T> scale, Vector<T> shift, int64_t channels, int64_t channel_stride)
      : scale_(scale), shift_(shift), channels_(channels), stride_(channel_stride) {
    if (!scale || stride_ >= 64 || channels == 0) return;
    // Short runs of a channel (channels_last: single elements): the factors of every element, over one period and as
    // much more as a block needs from any phase.
    const int64_t length = period() + block_size;
    pattern_.resize(2 * length);
    for (int64_t i = 0; i < length; ++i) {
      pattern_[i] = scale[i / stride_ % channels_];
      pattern_[length + i] = shift[i / stride_ % channels_];
    }
  }

  void operator()(int64_t start, int64_t n, T* block) const {
    if (!scale_) return;
    if (!pattern_.empty()) {
      const T* scale = pattern_.data() + start % period();
      return affine_pattern(scale, scale + pattern_.size() / 2, n, block);
    }
    for (int64_t i = 0; i < n;) {
      const int64_t channel = (start + i) / stride_ % channels_;
      const int64_t run = std::min(stride_ - (start + i) % stride_, n - i);
      affine_block(scale_[channel], shift_[channel], run, block + i);
      i += run;
    }
  }

 private:
  int64_t period() const { return channels_ * stride_; }

  Vector<T> scale_, shift_;
  int64_t channels_ = 0, stride_ = 0;
  std::vector<T> pattern_;
};

// How many elements from this one on are inside the box as it is, or outside as it is; at least one.
int64_t run_length(const Box& box, int64_t line, int64_t column) {
  const int64_t left = box.left();
  if (box.contains(line, column)) return box.right() - column;
  const int64_t entered = std::max(column < left ? line : line + 1, box.top());
  const bool again = entered < box.bottom();
  return (again ? entered * box.line_size + left : box.height * box.line_size) - (line * box.line_size + column);
}

template <typename In>
struct MixJob {
  using T = Accumulate<In>;
  const MixSamples<In>& samples;
  Affine<T> affine;
  char* out;
  int64_t out_stride, out_size;  // bytes of a sample and of an element
  WriteBlock<T> write;
  bool stream, direct;  // direct: out holds T and is written in place
  std::vector<int64_t> order = {};

  char* out_block(int64_t row, int64_t start) const { return out + row * out_stride + start * out_size; }

  void combine(int64_t own, int64_t other, T weight, int64_t start, int64_t n, T* block) const {
    const Box& box = samples.box;
    if (!box) return combine_run(own, other, weight, start, n, block);
    for (int64_t i = 0; i < n;) {
      const int64_t line = box.line_of(start + i), column = box.column_of(start + i);
      const int64_t run = std::min(run_length(box, line, column), n - i);
      combine_run(own, other, box.contains(line, column) ? T(0) : weight, start + i, run, block + i);
      i += run;
    }
  }

  // λ·own + (1 - λ)·other of a block, or of a run of it; a sample of weight 0 is not read.
  void combine_run(int64_t own, int64_t other, T weight, int64_t start, int64_t n, T* block) const {
    const In *first = samples.x + own * samples.stride + start, *second = samples.x + other * samples.stride + start;
    if (weight == T(1)) {
      read_block<In>(first, n, block);
    } else if (weight == T(0)) {
      read_block<In>(second, n, block);
    } else {
      mix_block(first, second, weight, n, block);
    }
    affine(start, n, block);
  }
};

// The rows of out, so that each row's own sample is the partner of the one before it where there is such a row.
template <typename In>
std::vector<int64_t> chained_order(const MixSamples<In>& job) {
  const int64_t count = job.count;
  std::vector<int64_t> order, waiting(job.batch, -1), next(count, -1);  // rows left for each own sample, linked
  std::vector<bool> done(count, false);
  order.reserve(count);
  for (int64_t row = count; row-- > 0;) {
    next[row] = waiting[job.own(row)];
    waiting[job.own(row)] = row;
  }
  for (int64_t row = 0, first = 0; static_cast<int64_t>(order.size()) < count;) {
    if (row < 0) {
      while (done[first]) ++first;
      row = first;
      // `first` heads its list: earlier rows are done, and lists ascend.
    }
    order.push_back(row);
    done[row] = true;
    waiting[job.own(row)] = next[row];
    row = waiting[job.own(row)] >= 0 ? waiting[job.own(row)] : waiting[job.other(row, job.own(row))];
  }
  return order;
}

template <typename In>
void mix_rows(const MixJob<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T buffer[block_size];
  tiling.each_block(begin, end, [&](int64_t index, int64_t start, int64_t n) {
    const int64_t row = job.order.empty() ? index : job.order[index], own = job.samples.own(row);
    char* out = job.out_block(row, start);
    T* block = job.direct ? reinterpret_cast<T*>(out) : buffer;
    job.combine(own, job.samples.other(row, own), job.samples.lam[row], start, n, block);
    if (!job.direct) job.write(block, n, job.stream, out);
  });
  if (job.stream) finish_streaming();
}

// The flip pairing of a whole batch, two rows at a time: each pair is read before either is written, so that out may
// be x. Rows of the tiling are pairs.
template <typename In>
void flip_rows(const MixJob<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T first[block_size], second[block_size];
  tiling.each_block(begin, end, [&](int64_t row, int64_t start, int64_t n) {
    const int64_t mirror = job.samples.batch - 1 - row;
    job.combine(row, mirror, job.samples.lam[row], start, n, first);
    job.combine(mirror, row, job.samples.lam[mirror], start, n, second);
    job.write(first, n, job.stream, job.out_block(row, start));
    job.write(second, n, job.stream, job.out_block(mirror, start));
  });
  if (job.stream) finish_streaming();
}

template <typename T>
WriteBlock<T> block_writer(ScalarType dtype) {
  WriteBlock<T> write = nullptr;
  with_mixable_type(dtype, [&](auto type) { write = write_block<T, decltype(type)>; });
  return write;
}

template <typename In>
void run_mix(const MixSamples<In>& samples, const Tensor& out) {
  using T = Accumulate<In>;
  const int64_t count = samples.count, size = static_cast<int64_t>(out.element_size());
  check_rows("partner", samples.partner, count, samples.batch);
  check_rows("rows", samples.rows, count, samples.batch);
  check_weights(samples.lam, count);
  if (count == 0 || samples.sample == 0) return;
  const bool stream = count * samples.sample * size > last_level_cache, pairs = samples.flips();
  MixJob<In> job{samples,
                 Affine<T>(samples.scale, samples.shift, samples.channels, samples.channel_stride),
                 data<char>(out),
                 out.stride(0) * size,
                 size,
                 block_writer<T>(out.scalar_type()),
                 stream,
                 !stream && out.scalar_type() == dtype_of<T>()};
  const int64_t element = std::max<int64_t>(sizeof(In), size);
  const Tiling tiling(samples.sample, pairs ? (count + 1) / 2 : count, element);
  if (!pairs && count * tiling.tile * element > 4 * tile_bytes) job.order = chained_order(samples);
  tiling.parallel([&](int64_t begin, int64_t end) {
    pairs ? flip_rows(job, tiling, begin, end) : mix_rows(job, tiling, begin, end);
  });
}

}  // namespace
}  // namespace mixupe

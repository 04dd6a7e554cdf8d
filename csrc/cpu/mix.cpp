// mix on the CPU.
#include "../operators/mix.h"

#include <algorithm>
#include <vector>

#include "streaming.h"
#include "tiling.h"
#include "values.h"

namespace mixupe {
namespace {

template <typename In, typename Out>
struct Row {
  const In *own, *other;
  Accumulate<In> weight;
  Out* out;
};

// λ·own + (1 - λ)·other; a sample of weight 0 is not read.
template <typename In, typename T>
MIXUPE_FN void mix_values(const In* own, const In* other, T weight, int64_t n, T* values) {
  if (weight == T(1) || weight == T(0)) {
    const In* only = weight == T(1) ? own : other;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = widen(only[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = mix(T(widen(own[i])), T(widen(other[i])), weight);
  }
}

template <typename In, typename T>
MIXUPE_SIMD void mix_part(const In* own, const In* other, T weight, int64_t n, T* values) {
  mix_values(own, other, weight, n, values);
}

// v·scale + shift: one number for a part of a sample, or one for each of its elements.
template <typename T>
struct Factors {
  bool none = true;
  T scale = 1, shift = 0;
  const T *scales = nullptr, *shifts = nullptr;

  Factors from(int64_t start) const {
    return scales ? Factors{none, scale, shift, scales + start, shifts + start} : *this;
  }

  MIXUPE_FN void apply(int64_t start, int64_t n, T* values) const {
    if (scales) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) values[i] = values[i] * scales[start + i] + shifts[start + i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) values[i] = values[i] * scale + shift;
    }
  }
};

template <typename T>
MIXUPE_SIMD void normalise_part(const Factors<T>& factors, int64_t n, T* values) {
  factors.apply(0, n, values);
}

// How many elements from this one on are inside the box as it is, or outside as it is; at least one.
int64_t run_length(const Box& box, int64_t line, int64_t column) {
  const int64_t left = box.left();
  if (box.contains(line, column)) return box.right() - column;
  const int64_t entered = std::max(column < left ? line : line + 1, box.top());
  const bool again = entered < box.bottom();
  return (again ? entered * box.line_size + left : box.height * box.line_size) - (line * box.line_size + column);
}

// Mixes n elements of a row from `start` on, which may lie on both sides of the box.
template <typename In, typename Out, typename T>
void mix_sides(const Row<In, Out>& row, const Box& box, int64_t start, int64_t n, T* values) {
  const In *own = row.own + start, *other = row.other + start;
  if (!box) return mix_part(own, other, row.weight, n, values);
  for (int64_t i = 0, run; i < n; i += run) {
    const int64_t line = box.line_of(start + i), column = box.column_of(start + i);
    run = std::min(run_length(box, line, column), n - i);
    mix_part(own + i, other + i, box.contains(line, column) ? T(0) : row.weight, run, values + i);
  }
}

// The elements [start, start + n) of a row, at most a block; `factors` begin at start.
template <typename In, typename Out>
MIXUPE_FN void mix_block(const Row<In, Out>& row, const Box& box, const Factors<Accumulate<In>>& factors, int64_t start,
                         int64_t n) {
  using T = Accumulate<In>;
  constexpr bool direct = std::is_same_v<T, Out>;
  alignas(64) T buffer[direct ? 1 : block_size];
  T* values = buffer;
  if constexpr (direct) values = row.out + start;
  mix_sides(row, box, start, n, values);
  if (!factors.none) normalise_part(factors, n, values);
  if constexpr (!direct) write_block(values, n, row.out + start);
}

// The same of two rows that are each other's partners: both are read before either is written, so that out may be x.
template <typename In, typename Out>
void mix_pair(const Row<In, Out>* rows, const Box& box, const Factors<Accumulate<In>>& factors, int64_t start,
              int64_t n) {
  alignas(64) Accumulate<In> values[2][block_size];
  for (int i = 0; i < 2; ++i) {
    mix_sides(rows[i], box, start, n, values[i]);
    if (!factors.none) normalise_part(factors, n, values[i]);
  }
  for (int i = 0; i < 2; ++i) write_block(values[i], n, rows[i].out + start);
}

// Several rows whose result leaves the caches: each step is read from all of them, then written to all, so that loads and
// non-temporal stores take turns and rows may be each other's partners. On an AMD EPYC a batch of images took 0.75 of the time of
// torch's copy_ so, and 1.2 in blocks, where reading waited for writing and writing for reading. Steps of two or eight rows, or of
// 32 or 128 elements, took longer; with prefetches or wider stores it was the same.
constexpr int rows_together = 4;
constexpr int64_t step_size = 64;

template <typename In, typename Out>
MIXUPE_SIMD void mix_streamed(const Row<In, Out>* rows, int count, const Box& box,
                              const Factors<Accumulate<In>>& factors, int64_t start, int64_t steps) {
  using T = Accumulate<In>;
  alignas(64) T values[rows_together][step_size];
  alignas(64) Out narrowed[step_size];
  for (int64_t i = 0; i < steps * step_size; i += step_size) {
    const int64_t at = start + i;
    for (int r = 0; r < count; ++r) {
      if (box) {
        mix_sides(rows[r], box, at, step_size, values[r]);
      } else {
        mix_values(rows[r].own + at, rows[r].other + at, rows[r].weight, step_size, values[r]);
      }
      if (!factors.none) factors.apply(i, step_size, values[r]);
    }
    for (int r = 0; r < count; ++r) {
      const void* step = values[r];
      if constexpr (!std::is_same_v<T, Out>) {
        store_block(values[r], step_size, narrowed);
        step = narrowed;
      }
      stream_bytes(rows[r].out + at, step, sizeof narrowed);
    }
  }
}

// Elements of one row, or of several that are mixed together; two that are `partners` are each other's.
template <typename In, typename Out>
void mix_several(const Row<In, Out>* rows, int count, bool partners, bool stream, const Box& box,
                 const Factors<Accumulate<In>>& factors, int64_t start, int64_t n) {
  const auto in_blocks = [&](int64_t from, int64_t length) {
    const auto of_part = factors.from(from - start);
    if (partners && count == 2) return mix_pair(rows, box, of_part, from, length);
    for (int r = 0; r < count; ++r) mix_block(rows[r], box, of_part, from, length);
  };
  if (!stream) return in_blocks(start, n);
  // Steps go from one line of the cache to another.
  const int64_t head = std::min<int64_t>(n, (-reinterpret_cast<uintptr_t>(rows->out + start) & 63) / sizeof(Out));
  const int64_t steps = (n - head) / step_size, end = head + steps * step_size;
  if (head > 0) in_blocks(start, head);
  mix_streamed(rows, count, box, factors.from(head), start + head, steps);
  if (end < n) in_blocks(start + end, n - end);
}

// The factors of each channel, for elements in the order of memory: channel(i) = i / channel_stride mod channels.
template <typename T>
class Affine {
 public:
  Affine(Vector<T> scale, Vector<T> shift, int64_t channels, int64_t channel_stride)
      : scale_(scale), shift_(shift), channels_(channels), stride_(channel_stride) {
    if (!scale || stride_ >= 64) return;
    // Short runs of a channel (channels_last: single elements): the factors of every element, over one period and as
    // much more as a block needs from any phase.
    const int64_t length = period() + block_size;
    pattern_.resize(2 * length);
    for (int64_t i = 0; i < length; ++i) {
      pattern_[i] = scale[i / stride_ % channels_];
      pattern_[length + i] = shift[i / stride_ % channels_];
    }
  }

  // Calls f(start, n, factors) for the parts of a block that have factors of one kind.
  template <typename F>
  MIXUPE_FN void each_part(int64_t start, int64_t n, const F& f) const {
    if (!scale_) return f(start, n, Factors<T>{});
    if (!pattern_.empty()) {
      const T* scale = pattern_.data() + start % period();
      return f(start, n, Factors<T>{false, 1, 0, scale, scale + pattern_.size() / 2});
    }
    for (const int64_t end = start + n; start < end;) {
      const int64_t channel = start / stride_ % channels_;
      const int64_t part = std::min(stride_ - start % stride_, end - start);
      f(start, part, Factors<T>{false, scale_[channel], shift_[channel]});
      start += part;
    }
  }

 private:
  int64_t period() const { return channels_ * stride_; }

  Vector<T> scale_, shift_;
  int64_t channels_ = 0, stride_ = 0;
  std::vector<T> pattern_;
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
  int64_t partner = 0;  // of the last row that has another: a clean row after it leaves it in the cache
  for (int64_t row = 0, first = 0; static_cast<int64_t>(order.size()) < count;) {
    if (row < 0) {
      while (done[first]) ++first;
      row = first;
      // `first` heads its list: earlier rows are done, and lists ascend.
    }
    order.push_back(row);
    done[row] = true;
    const int64_t own = job.own(row), other = job.other(row, own);
    waiting[own] = next[row];
    if (other != own) partner = other;
    row = waiting[own] >= 0 ? waiting[own] : waiting[partner];
  }
  return order;
}

template <typename Out, typename In>
void run_mix_to(const MixSamples<In>& samples, const Tensor& out) {
  using T = Accumulate<In>;
  const int64_t count = samples.count, stride = out.stride(0), element = std::max(sizeof(In), sizeof(Out));
  Out* const to = data<Out>(out);
  const bool pairs = samples.flips();
  // Non-temporal stores are for whole lines, of all rows that are mixed together. Rows that begin at different places within
  // lines, streamed one at a time, gained images nothing, and rows of 100 floats took 1.7 of the time.
  const bool lines_agree = stride * sizeof(Out) % 64 == 0;
  const bool stream = lines_agree && count * samples.sample * int64_t(sizeof(Out)) > last_level_cache;
  const int64_t together = pairs ? 2 : stream ? rows_together : 1;
  const Tiling tiling(samples.sample, (count + together - 1) / together, element, together);
  const Affine<T> affine(samples.scale, samples.shift, samples.channels, samples.channel_stride);
  std::vector<int64_t> order;
  // Rows under 2 KB are found faster in the order of memory than they are read again: 500 000 of 16 floats took 0.4 of the time.
  if (!pairs && samples.sample * element >= 2048 && count * tiling.tile * element > 4 * tile_bytes)
    order = chained_order(samples);

  const auto row_at = [&](int64_t index) -> Row<In, Out> {
    const int64_t own = samples.own(index), other = samples.other(index, own);
    return {samples.x + own * samples.stride, samples.x + other * samples.stride, samples.lam[index],
            to + index * stride};
  };
  const auto mix_item = [&](int64_t item, int64_t start, int64_t n) {
    if (!stream && !pairs) {  // as below for one row: without it 100 rows of 64 took a fifth longer
      const auto row = row_at(order.empty() ? item : order[item]);
      return affine.each_part(start, n, [&](int64_t from, int64_t length, const Factors<T>& factors) {
        mix_block(row, samples.box, factors, from, length);
      });
    }
    Row<In, Out> rows[rows_together];
    int here = 0;
    if (pairs) {
      rows[here++] = row_at(item);
      if (item != count - 1 - item) rows[here++] = row_at(count - 1 - item);
    } else {
      for (int64_t i = item * together; i < std::min((item + 1) * together, count); ++i)
        rows[here++] = row_at(order.empty() ? i : order[i]);
    }
    affine.each_part(start, n, [&](int64_t from, int64_t length, const Factors<T>& factors) {
      mix_several(rows, here, pairs, stream, samples.box, factors, from, length);
    });
  };
  tiling.parallel([&](int64_t begin, int64_t end) {
    tiling.each_block(begin, end, mix_item);
    if (stream) finish_streaming();
  });
}

template <typename In>
void run_mix(const MixSamples<In>& samples, const Tensor& out) {
  check_rows("partner", samples.partner, samples.count, samples.batch);
  check_rows("rows", samples.rows, samples.count, samples.batch);
  check_weights(samples.lam, samples.count);
  if (samples.count == 0 || samples.sample == 0) return;
  with_mixable_type(out.scalar_type(), [&](auto type) { run_mix_to<decltype(type)>(samples, out); });
}

}  // namespace
}  // namespace mixupe

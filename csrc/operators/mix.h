// mix and mix_out on the host, over the run_mix that each backend defines: its loops or its launch.
#pragma once
#include "layout.h"

namespace mixupe {
namespace {

// CutMix's box, in which λ is 0, over the elements of a sample in the order of memory. An image has `height`
// lines of `line_size` elements, `pixel` of them a pixel: its channels where these are innermost.
struct Box {
  Vector<int64_t> edges;  // top, bottom, left, right, in pixels
  int64_t height = 1, line_size = 1, pixel = 1;

  MIXUPE_FN explicit operator bool() const { return static_cast<bool>(edges); }
  MIXUPE_FN int64_t line_of(int64_t k) const { return k / line_size % height; }
  MIXUPE_FN int64_t column_of(int64_t k) const { return k % line_size; }
  // Edges within the image, whatever the caller's: lines, and elements of a line.
  MIXUPE_FN int64_t top() const { return edge(0, height); }
  MIXUPE_FN int64_t bottom() const { return edge(1, height); }
  MIXUPE_FN int64_t left() const { return edge(2, line_size / pixel) * pixel; }
  MIXUPE_FN int64_t right() const { return edge(3, line_size / pixel) * pixel; }
  MIXUPE_FN bool contains(int64_t line, int64_t column) const {
    return line >= top() && line < bottom() && column >= left() && column < right();
  }

  MIXUPE_FN int64_t edge(int which, int64_t most) const {
    const int64_t given = edges[which];
    return given < 0 ? 0 : given < most ? given : most;
  }
};

// Samples of x as flat runs of elements, and what `count` samples of the result are made of.
template <typename In>
struct MixSamples {
  using T = Accumulate<In>;
  const In* x;
  int64_t stride, batch, count,
      sample;  // of x: elements between samples, samples; samples of the result, elements of one
  Vector<int64_t> partner, rows;
  Vector<T> lam, scale, shift;
  int64_t channels, channel_stride;
  Box box;

  // A whole batch paired with itself reversed: two samples are each other's partners, and the result may be x.
  MIXUPE_FN bool flips() const { return !partner && !rows; }
  MIXUPE_FN int64_t own(int64_t row) const { return rows ? rows[row] : row; }
  // Takes the row's own sample too: a kernel has it by then.
  MIXUPE_FN int64_t other(int64_t row, int64_t own) const { return partner ? partner[row] : batch - 1 - own; }
};

// Writes to `out`, whose samples are dense in the order of memory of the job's.
template <typename In>
void run_mix(const MixSamples<In>& job, const Tensor& out);

struct MixArguments {
  const OptionalTensor &partner, &rows;
  const Tensor& lam;
  const OptionalTensor &scale, &shift, &box;
};

// One call of mix, its layout settled: `x` and `out` hold samples in the same memory order.
struct MixCall {
  Tensor x, out;
  MemoryFormat format;
};

// The number of samples of the result.
inline int64_t check_mix(const Tensor& x, const MixArguments& arguments, ScalarType dtype) {
  const auto& rows = arguments.rows;
  require_mixable("x", x.scalar_type());
  require_mixable("dtype", dtype);
  require(x.dim() >= 1, "x must have a batch dimension");
  require(!rows || rows->dim() == 1, "rows must have one dimension");
  const int64_t count = rows ? rows->size(0) : x.size(0);
  vector_of<int64_t>("rows", rows, count, {"x", x});
  vector_of<int64_t>("partner", arguments.partner, count, {"x", x});
  require(arguments.scale.has_value() == arguments.shift.has_value(), "scale and shift must be given together");
  if (arguments.scale) require(x.dim() >= 2, "scale and shift need x to have channels (dimension 1)");
  return count;
}

inline MixCall plan_mix(const Tensor& x, int64_t count, ScalarType dtype,
                        const std::optional<MemoryFormat>& memory_format) {
  const MemoryFormat format = memory_format ? *memory_format : row_format(x);
  require(format == MemoryFormat::Contiguous || format == channels_last_format(x.dim()),
          "memory_format must be contiguous_format, or channels_last of x's number of dimensions");
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[0] = count;
  return {with_samples(x, format), allocate(x, dtype, sizes, dense_strides(sizes, format)), format};
}

// Into a caller's buffer: samples dense in either order are written in place; for another layout `call.out` is a
// buffer of its own, to be copied to `out`.
inline MixCall plan_mix_out(const Tensor& x, int64_t count, const Tensor& out, bool flip) {
  require_device("out", out, {"x", x});
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[0] = count;
  if (sizes_of(out) != sizes) fail("out must have shape ", shape_text(sizes), ", got ", shape_text(out.sizes()));
  require_no_shared_elements("out", out);
  require(!overlap(x, out) || (flip && same_memory(x, out)),
          "out must not overlap x, except that it may be x itself where partner and rows are None");
  const MemoryFormat channels_last = channels_last_format(x.dim());
  const bool contiguous = samples_are(out, MemoryFormat::Contiguous);
  const bool apart = count <= 1 || out.stride(0) >= sample_size(x);
  if (!apart || (!contiguous && !samples_are(out, channels_last)))
    return plan_mix(x, count, out.scalar_type(), MemoryFormat::Contiguous);
  // Where the order of out's samples is both, x's decides: it then needs no copy.
  const bool both = contiguous && samples_are(out, channels_last);
  const MemoryFormat format = both ? row_format(x) : contiguous ? MemoryFormat::Contiguous : channels_last;
  return {with_samples(x, format), out, format};
}

inline Box box_of(const MixCall& call, int64_t channels, const OptionalTensor& edges) {
  if (!edges) return {};
  const Tensor& x = call.x;
  require(x.dim() >= 3, "box needs x of at least 3 dimensions (samples, height, width), got ", x.dim());
  const int64_t pixel = call.format == MemoryFormat::Contiguous ? 1 : channels;
  return {vector_of<int64_t>("box", edges, 4, {"x", x}), x.size(x.dim() - 2), x.size(x.dim() - 1) * pixel, pixel};
}

void mix_into(const MixCall& call, int64_t count, const MixArguments& arguments) {
  const Tensor& x = call.x;
  const Beside beside{"x", x};
  const int64_t sample = sample_size(x), channels = x.dim() >= 2 ? x.size(1) : 1;
  const int64_t channel_stride =
      call.format == MemoryFormat::Contiguous && channels ? std::max<int64_t>(sample / channels, 1) : 1;
  with_mixable_type(x.scalar_type(), [&](auto type) {
    using In = decltype(type);
    using T = Accumulate<In>;
    const MixSamples<In> job{static_cast<const In*>(x.const_data_ptr()),
                             x.stride(0),
                             x.size(0),
                             count,
                             sample,
                             vector_of<int64_t>("partner", arguments.partner, count, beside),
                             vector_of<int64_t>("rows", arguments.rows, count, beside),
                             row_weights<T>("lam", arguments.lam, count, beside),
                             vector_of<T>("scale", arguments.scale, channels, beside),
                             vector_of<T>("shift", arguments.shift, channels, beside),
                             channels,
                             channel_stride,
                             box_of(call, channels, arguments.box)};
    run_mix(job, call.out);
  });
}

Tensor mix_samples(const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
                   const OptionalTensor& scale, const OptionalTensor& shift, std::optional<ScalarType> dtype,
                   std::optional<MemoryFormat> memory_format, const OptionalTensor& box) {
  const MixArguments arguments{partner, rows, lam, scale, shift, box};
  const ScalarType out_dtype = dtype ? *dtype : x.scalar_type();
  const int64_t count = check_mix(x, arguments, out_dtype);
  const MixCall call = plan_mix(x, count, out_dtype, memory_format);
  mix_into(call, count, arguments);
  return call.out;
}

void mix_samples_out(const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
                     const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& box, Tensor out) {
  const MixArguments arguments{partner, rows, lam, scale, shift, box};
  const int64_t count = check_mix(x, arguments, out.scalar_type());
  const MixCall call = plan_mix_out(x, count, out, !partner && !rows);
  mix_into(call, count, arguments);
  if (call.out.get() != out.get()) torch::stable::copy_(out, call.out);
}

STABLE_TORCH_LIBRARY_IMPL(mixupe, MIXUPE_KEY, m) {
  m.impl("mix", TORCH_BOX(&mix_samples));
  m.impl("mix_out", TORCH_BOX(&mix_samples_out));
}

}  // namespace
}  // namespace mixupe

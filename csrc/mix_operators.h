// mix and mix_out on the host, over the run_mix that each backend defines: its loops or its launch.
#pragma once
#include "checks.h"

namespace mixupe {
namespace {

struct MixArguments {
  const OptionalTensor &partner, &rows;
  const Tensor& lam;
  const OptionalTensor &scale, &shift, &box;
};

// CutMix's box, in which λ is 0, over the elements of a sample in the order of memory. An image has `height`
// lines of `line_size` elements, `pixel` of them a pixel: its channels where these are innermost.
struct Box {
  Vector<int64_t> edges;  // top, bottom, left, right, in pixels
  int64_t height = 1, line_size = 1, pixel = 1;

  MIXUPE_FN explicit operator bool() const { return static_cast<bool>(edges); }
  MIXUPE_FN int64_t line_of(int64_t k) const { return k / line_size % height; }
  MIXUPE_FN int64_t column_of(int64_t k) const { return k % line_size; }
  MIXUPE_FN bool contains(int64_t line, int64_t column) const {
    return line >= edges[0] && line < edges[1] && column >= edges[2] * pixel && column < edges[3] * pixel;
  }
};

inline Box box_of(const MixCall& call, const OptionalTensor& edges) {
  if (!edges) return {};
  require(call.x.dim() >= 3, "box needs x of at least 3 dimensions (samples, height, width), got ", call.x.dim());
  const int64_t pixel = call.format == MemoryFormat::Contiguous ? 1 : call.channels;
  return {vector_of<int64_t>("box", edges, 4, call.x), call.x.size(call.x.dim() - 2),
          call.x.size(call.x.dim() - 1) * pixel, pixel};
}

void run_mix(const MixCall& call, const MixArguments& arguments);

Tensor mix_samples(
    const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
    const OptionalTensor& scale, const OptionalTensor& shift, std::optional<ScalarType> dtype,
    std::optional<MemoryFormat> memory_format, const OptionalTensor& box) {
  const ScalarType out_dtype = dtype ? *dtype : x.scalar_type();
  const int64_t count = check_mix(x, partner, rows, scale, shift, out_dtype);
  const MixCall call = plan_mix(x, count, out_dtype, memory_format);
  run_mix(call, {partner, rows, lam, scale, shift, box});
  return call.out;
}

void mix_samples_out(
    const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& box, Tensor out) {
  const int64_t count = check_mix(x, partner, rows, scale, shift, out.scalar_type());
  const MixCall call = plan_mix_out(x, count, out, !partner && !rows);
  run_mix(call, {partner, rows, lam, scale, shift, box});
  if (call.out.get() != out.get()) torch::stable::copy_(out, call.out);
}

}  // namespace
}  // namespace mixupe

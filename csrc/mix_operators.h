// mix and mix_out on the host, over the run_mix that each backend defines: its loops or its launch.
#pragma once
#include "checks.h"

namespace mixupe {
namespace {

struct MixArguments {
  const OptionalTensor &partner, &rows;
  const Tensor& lam;
  const OptionalTensor &scale, &shift;
};

void run_mix(const MixCall& call, const MixArguments& arguments);

Tensor mix_samples(
    const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
    const OptionalTensor& scale, const OptionalTensor& shift, std::optional<ScalarType> dtype,
    std::optional<MemoryFormat> memory_format) {
  const ScalarType out_dtype = dtype ? *dtype : x.scalar_type();
  const int64_t count = check_mix(x, partner, rows, scale, shift, out_dtype);
  const MixCall call = plan_mix(x, count, out_dtype, memory_format);
  run_mix(call, {partner, rows, lam, scale, shift});
  return call.out;
}

void mix_samples_out(
    const Tensor& x, const OptionalTensor& partner, const Tensor& lam, const OptionalTensor& rows,
    const OptionalTensor& scale, const OptionalTensor& shift, Tensor out) {
  const int64_t count = check_mix(x, partner, rows, scale, shift, out.scalar_type());
  const MixCall call = plan_mix_out(x, count, out, !partner && !rows);
  run_mix(call, {partner, rows, lam, scale, shift});
  if (call.out.get() != out.get()) torch::stable::copy_(out, call.out);
}

}  // namespace
}  // namespace mixupe

// gather_sum and row_dot on the host, over what each backend defines: the sums and dot products of rows that the gradients of
// mix are made of.
#pragma once
#include "layout.h"

namespace mixupe {
namespace {

// Row r of out is the sum of weight[t]·src[index[t]] for t from offsets[r] to offsets[r + 1].
template <typename In>
struct GatherRows {
  const In* src;
  In* out;
  int64_t src_stride, out_stride, sample;
  int64_t sources, rows, terms;  // rows of src, rows of out, elements of index
  Vector<int64_t> index, offsets;
  Vector<Accumulate<In>> weight;
};

template <typename In>
void run_gather(const GatherRows<In>& job, const Tensor& like);

// Rows of a tensor of a dtype known at run time.
struct Operand {
  const char* data;
  int64_t stride, element, rows;  // strides and elements in bytes
  ScalarType dtype;
  Vector<int64_t> index;

  MIXUPE_FN const char* at(int64_t row, int64_t k) const { return data + row * stride + k * element; }
};

template <typename T>
struct DotRows {
  Operand a, b;
  int64_t count, sample;
  T* out;
};

template <typename T>
void run_dot(const DotRows<T>& job, const Tensor& like);

Tensor gather_sum(const Tensor& src_argument, const Tensor& index, const Tensor& weight, const Tensor& offsets) {
  require_float("src", src_argument.scalar_type());
  require(src_argument.dim() >= 1, "src must have at least one dimension");
  require(index.dim() == 1, "index must have one dimension");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must have one dimension and at least one element");
  const Tensor src = with_samples(src_argument, MemoryFormat::Contiguous);
  const int64_t terms = index.size(0), rows = offsets.size(0) - 1;
  require(rows > 0 || terms == 0, "offsets must go from 0 to ", terms);
  std::vector<int64_t> sizes = sizes_of(src);
  sizes[0] = rows;
  const Beside beside{"src", src};
  const Tensor out = allocate(src, src.scalar_type(), sizes);
  with_float_type(src.scalar_type(), [&](auto type) {
    using In = decltype(type);
    const GatherRows<In> job{static_cast<const In*>(src.const_data_ptr()),
                             data<In>(out),
                             src.stride(0),
                             out.stride(0),
                             sample_size(src),
                             src.size(0),
                             rows,
                             terms,
                             vector_of<int64_t>("index", index, terms, beside),
                             vector_of<int64_t>("offsets", offsets, rows + 1, beside),
                             vector_of<Accumulate<In>>("weight", weight, terms, beside)};
    run_gather(job, src);
  });
  return out;
}

Operand operand_of(const Beside& operand, const char* index_name, const Tensor& index, int64_t count) {
  const Tensor& tensor = operand.tensor;
  const auto element = static_cast<int64_t>(tensor.element_size());
  return {static_cast<const char*>(tensor.const_data_ptr()),
          tensor.stride(0) * element,
          element,
          tensor.size(0),
          tensor.scalar_type(),
          vector_of<int64_t>(index_name, index, count, operand)};
}

Tensor row_dot(const Tensor& a_argument, const Tensor& b_argument, const Tensor& a_index, const Tensor& b_index) {
  require(a_argument.dim() >= 1 && a_argument.dim() == b_argument.dim(), "a and b must have the same dimensions");
  for (int64_t d = 1; d < a_argument.dim(); ++d)
    require(a_argument.size(d) == b_argument.size(d), "a and b must have samples of the same shape");
  require_mixable("a", a_argument.scalar_type());
  require_mixable("b", b_argument.scalar_type());
  require(a_index.dim() == 1, "a_index must have one dimension");
  require_device("b", b_argument, {"a", a_argument});
  const MemoryFormat format = row_format(a_argument);
  const Tensor a = with_samples(a_argument, format), b = with_samples(b_argument, format);
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  require(accumulate_dtype(b.scalar_type()) == dtype, "a and b must both be float64, or neither");
  const int64_t count = a_index.size(0);
  const Tensor out = allocate(a, dtype, {count});
  const auto run = [&](auto type) {
    using T = decltype(type);
    const DotRows<T> job{operand_of({"a", a}, "a_index", a_index, count),
                         operand_of({"b", b}, "b_index", b_index, count), count, sample_size(a), data<T>(out)};
    run_dot(job, a);
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(mixupe, MIXUPE_KEY, m) {
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
  m.impl("row_dot", TORCH_BOX(&row_dot));
}

}  // namespace
}  // namespace mixupe

// Orders of memory: strides, copies where a kernel needs another order, and whether tensors share memory.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"

namespace mixupe {

// The (N, C) argument with its last dimension dense; rows may be any distance apart.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline MemoryFormat channels_last_format(int64_t dim) {
  return dim == 4 ? MemoryFormat::ChannelsLast : dim == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous;
}

// Strides of a dense tensor of these sizes in the given order of memory.
inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return contiguous_strides(sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  strides[1] = stride;
  stride *= sizes[1] > 1 ? sizes[1] : 1;
  for (size_t d = sizes.size() - 1; d > 1; stride *= sizes[d] > 1 ? sizes[d] : 1, --d) strides[d] = stride;
  strides[0] = stride;
  return strides;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// Whether each sample (dimensions 1, 2, ...) is dense in the given order.
inline bool samples_are(const Tensor& tensor, MemoryFormat format) {
  const auto sizes = tensor.sizes(), actual = tensor.strides();
  if (tensor.numel() == 0) return format == MemoryFormat::Contiguous;
  const std::vector<int64_t> expected = dense_strides({sizes.begin(), sizes.end()}, format);
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] != 1 && actual[d] != expected[d]) return false;
  return true;
}

// reference.row_format
inline MemoryFormat row_format(const Tensor& x) {
  const MemoryFormat channels_last = channels_last_format(x.dim());
  const bool keeps = channels_last != MemoryFormat::Contiguous && !samples_are(x, MemoryFormat::Contiguous) &&
                     samples_are(x, channels_last);
  return keeps ? channels_last : MemoryFormat::Contiguous;
}

inline Tensor with_samples(const Tensor& x, MemoryFormat format) {
  return samples_are(x, format) ? x : torch::stable::contiguous(x, format);
}

inline int64_t sample_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) size *= x.size(d);
  return size;
}

// First and one past the last byte a tensor of positive strides touches.
inline std::pair<uintptr_t, uintptr_t> byte_range(const Tensor& tensor) {
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {start, start};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {start, start + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto [a_start, a_end] = byte_range(a);
  const auto [b_start, b_end] = byte_range(b);
  return a_start < b_end && b_start < a_end;
}

// Each element of a tensor to be written has memory of its own, as far as strides tell: sorted, each exceeds what the smaller
// ones reach.
inline void require_no_shared_elements(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= reached)
      fail(name, " must not have elements that share memory, got strides ", shape_text(tensor.strides()));
    reached += (size - 1) * stride;
  }
}

inline bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type() || a.dim() != b.dim())
    return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

}  // namespace mixupe

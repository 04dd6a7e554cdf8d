// Checks of an operator's arguments and allocation of its results, shared by both backends: what reaches a kernel has
// the dtype, shape and device the kernel reads, also when the operator is called directly. Errors are
// std::runtime_error with the argument's name, its value and what was expected.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <charconv>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "row.h"

namespace mixupe {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// The shortest digits that read back as the value, as Python prints it.
inline std::string shortest(double value) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void require_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  const ScalarType actual = tensor.scalar_type();
  if (actual != dtype)
    fail(name, " must be ", torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(actual));
}

inline void require_device(const char* name, const Tensor& tensor, const Tensor& like) {
  require(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
          " must be on the device of the other arguments");
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A one-dimensional argument read in place, whatever its stride: 0 for a value shared by all rows.
template <typename T>
struct Vector {
  const T* data = nullptr;
  int64_t stride = 0;
  MIXUPE_FN T operator[](int64_t i) const { return data[i * stride]; }
  MIXUPE_FN explicit operator bool() const { return data != nullptr; }
};

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long;
}

template <typename T>
Vector<T> vector_of(const char* name, const Tensor& tensor, int64_t length, const Tensor& like) {
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, like);
  require(tensor.dim() == 1 && tensor.size(0) == length, name, " must have ", length, " elements in one dimension");
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

template <typename T>
Vector<T> vector_of(const char* name, const OptionalTensor& tensor, int64_t length, const Tensor& like) {
  return tensor ? vector_of<T>(name, *tensor, length, like) : Vector<T>{};
}

// A weight for each row: (length,), (1,) or a 0-d tensor for all of them.
template <typename T>
Vector<T> row_weights(const char* name, const Tensor& tensor, int64_t length, const Tensor& like) {
  if (tensor.dim() == 1 && tensor.size(0) == length) return vector_of<T>(name, tensor, length, like);
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, like);
  require(tensor.dim() <= 1 && tensor.numel() == 1, name, " must have 1 or ", length, " elements");
  return {static_cast<const T*>(tensor.const_data_ptr()), 0};
}

// A scalar the kernel reads where it lies.
template <typename T>
const T* scalar_of(const char* name, const Tensor& tensor, const Tensor& like) {
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, like);
  require(tensor.numel() == 1, name, " must have one element, got ", tensor.numel());
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  return strides;
}

// A large new result is written once from end to end, and in pages of 4 KB the faults cost more than the writing (154 MB:
// 70 ms, in huge pages 12). A hint, which Linux follows where transparent huge pages are "madvise" or "always".
inline void prefer_huge_pages(const Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), bytes = tensor.numel() * tensor.element_size();
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  if (bytes >= 2 * page && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor allocate(
    const Tensor& like, ScalarType dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle handle;
  const int32_t device_type = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(dtype)), device_type,
      like.get_device_index(), &handle));
  const Tensor tensor(handle);
  if (!like.is_cuda()) prefer_huge_pages(tensor);
  return tensor;
}

inline Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& sizes) {
  return allocate(like, dtype, sizes, contiguous_strides(sizes));
}

// Logits and targets

// The (N, C) argument with its last dimension dense; rows may be any distance apart.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor check_logits(const Tensor& logits) {
  require(logits.dim() == 2, "logits must have 2 dimensions (rows, classes), got ", logits.dim());
  require(is_float(logits.scalar_type()), "logits must be float32, float64, bfloat16 or float16, got ",
          torch::headeronly::toString(logits.scalar_type()));
  require(logits.size(1) > 0, "logits must have at least one class");
  return with_dense_rows(logits);
}

// The targets of every row, as the kernels read them: class indices (two with `partner`) or dense (N, C) rows.
template <typename T>
struct Targets {
  Vector<int64_t> own, partner;
  Vector<T> lam;
  const T* dense = nullptr;
  int64_t dense_stride = 0;
  const T* class_weight = nullptr;
  int64_t classes = 0, ignore_index = 0;
  T label_smoothing = 0;

  // Whether the row's target has weight outside its label columns, or weights that differ between classes.
  MIXUPE_FN bool everywhere() const { return dense || class_weight || label_smoothing != T(0); }

  MIXUPE_FN Labels<T> row_labels(int64_t row) const {
    if (dense) return {0, 0, T(0), T(0), T(0), T(1)};
    const int64_t first = own[row];
    Labels<T> l = labels<T>(first, partner ? partner[row] : first, partner ? lam[row] : T(1), ignore_index,
                            label_smoothing, classes);
    if (class_weight) l.own_weight *= class_weight[l.own], l.partner_weight *= class_weight[l.partner];
    return l;
  }
};

// The tensors `Targets` points into: copies where an argument had to be made dense.
struct TargetTensors {
  Tensor target;
  OptionalTensor class_weight;
};

template <typename T>
Targets<T> check_targets(
    TargetTensors& keep, const Tensor& logits, const OptionalTensor& partner, const OptionalTensor& lam,
    double label_smoothing, int64_t ignore_index) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  require(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
          shortest(label_smoothing));
  Targets<T> t;
  t.classes = classes;
  t.ignore_index = ignore_index;
  t.label_smoothing = static_cast<T>(label_smoothing);
  if (keep.target.dim() == 2) {
    require_dtype("target", keep.target, dtype_of<T>());
    require_device("target", keep.target, logits);
    require(keep.target.size(0) == rows && keep.target.size(1) == classes, "target must have the shape of logits");
    keep.target = with_dense_rows(keep.target);
    t.dense = static_cast<const T*>(keep.target.const_data_ptr());
    t.dense_stride = keep.target.stride(0);
  } else {
    require(partner.has_value() == lam.has_value(), "partner and lam must be given together");
    t.own = vector_of<int64_t>("target", keep.target, rows, logits);
    t.partner = vector_of<int64_t>("partner", partner, rows, logits);
    t.lam = lam ? row_weights<T>("lam", *lam, rows, logits) : Vector<T>{};
  }
  if (keep.class_weight) {
    keep.class_weight = torch::stable::contiguous(*keep.class_weight);
    t.class_weight = vector_of<T>("class_weight", *keep.class_weight, classes, logits).data;
  }
  return t;
}

// What makes the rows' CE and H a MixupE loss.
template <typename T>
struct LossShape {
  int64_t rows = 0, num_mixed = 0, num_reg = 0;
  int penalty = penalty_abs;
  T threshold = 0;

  // Whether a row with this share of kept labels carries R.
  MIXUPE_FN bool regularizes(int64_t row, T kept) const { return row >= rows - num_reg && kept == T(1); }
};

// Σy where q̂ depends on it: dense targets of a softmax.
template <typename T>
MIXUPE_FN T q_hat_mass(const Targets<T>& t, bool sigmoid, T mass) {
  return t.dense && !sigmoid ? mass : T(1);
}

template <typename T>
LossShape<T> check_loss_shape(
    const Tensor& logits, int64_t num_mixed, int64_t num_reg, int64_t penalty, double threshold) {
  const int64_t rows = logits.size(0);
  require(num_mixed >= 0 && num_mixed <= rows, "num_mixed must be in [0, ", rows, "], got ", num_mixed);
  require(num_reg >= 0 && num_reg <= rows, "num_reg must be in [0, ", rows, "], got ", num_reg);
  require(penalty >= 0 && penalty <= 2, "penalty must be 0, 1 or 2, got ", penalty);
  return {rows, num_mixed, num_reg, static_cast<int>(penalty), static_cast<T>(threshold)};
}

// Mixing: samples as flat runs of elements, in one memory order for the input and the output

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

inline bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

// Where the loss's gradient is written: `out` itself, or a buffer of its own to be copied to it.
struct GradientOutput {
  Tensor buffer;
  bool apart;
};

inline GradientOutput check_gradient_output(const Tensor& logits, const Tensor& out) {
  require_dtype("out", out, logits.scalar_type());
  require_device("out", out, logits);
  require(sizes_of(out) == sizes_of(logits), "out must have the shape of logits");
  require(!overlap(logits, out) || same_memory(logits, out), "out must be logits itself or not overlap it");
  const bool dense = samples_are(out, MemoryFormat::Contiguous) && (out.size(0) <= 1 || out.stride(0) >= out.size(1));
  return dense ? GradientOutput{out, false}
               : GradientOutput{allocate(logits, logits.scalar_type(), sizes_of(logits)), true};
}

// One call of mix, its layout settled: `x` and `out` hold samples in the same memory order.
struct MixCall {
  Tensor x, out;
  MemoryFormat format;
  int64_t batch, count, sample;  // samples of x, samples of out, elements of one
  int64_t channels, channel_stride;
};

inline bool is_mixable(ScalarType dtype) { return is_float(dtype) || dtype == ScalarType::Byte; }

inline int64_t check_mix(
    const Tensor& x, const OptionalTensor& partner, const OptionalTensor& rows, const OptionalTensor& scale,
    const OptionalTensor& shift, ScalarType dtype) {
  require(x.dim() >= 1, "x must have at least one dimension (samples)");
  require(is_mixable(x.scalar_type()), "x must be a float or uint8 tensor, got ",
          torch::headeronly::toString(x.scalar_type()));
  require(is_mixable(dtype), "dtype must be a float or uint8 dtype, got ", torch::headeronly::toString(dtype));
  const int64_t count = rows ? (require(rows->dim() == 1, "rows must have one dimension"), rows->size(0)) : x.size(0);
  vector_of<int64_t>("rows", rows, count, x);
  vector_of<int64_t>("partner", partner, count, x);
  require(scale.has_value() == shift.has_value(), "scale and shift must be given together");
  if (scale) require(x.dim() >= 2, "scale and shift need x to have channels (dimension 1)");
  return count;
}

inline MixCall mix_call(const Tensor& x, Tensor out, MemoryFormat format, int64_t count) {
  MixCall call{with_samples(x, format), std::move(out), format, x.size(0), count, sample_size(x), 1, 1};
  if (x.dim() >= 2) {
    call.channels = x.size(1);
    call.channel_stride = format == MemoryFormat::Contiguous && call.channels ? call.sample / call.channels : 1;
  }
  return call;
}

inline MixCall plan_mix(
    const Tensor& x, int64_t count, ScalarType dtype, const std::optional<MemoryFormat>& memory_format) {
  const MemoryFormat format = memory_format ? *memory_format : row_format(x);
  require(format == MemoryFormat::Contiguous || format == channels_last_format(x.dim()),
          "memory_format must be contiguous_format, or channels_last of x's number of dimensions");
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[0] = count;
  return mix_call(x, allocate(x, dtype, sizes, dense_strides(sizes, format)), format, count);
}

// Into a caller's buffer: samples dense in either order are written in place; for another layout `call.out` is a
// buffer of its own, to be copied to `out`.
inline MixCall plan_mix_out(const Tensor& x, int64_t count, const Tensor& out, bool flip) {
  require_device("out", out, x);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[0] = count;
  require(sizes_of(out) == sizes, "out must have the shape of the result");
  require(!overlap(x, out) || (flip && same_memory(x, out)),
          "out must not overlap x, except that it may be x itself where partner and rows are None");
  const MemoryFormat channels_last = channels_last_format(x.dim());
  const bool contiguous = samples_are(out, MemoryFormat::Contiguous);
  const bool apart = count <= 1 || out.stride(0) >= sample_size(x);
  if (!apart || (!contiguous && !samples_are(out, channels_last)))
    return plan_mix(x, count, out.scalar_type(), MemoryFormat::Contiguous);
  // Where the order of out's samples is both, x's decides: it then needs no copy.
  const bool both = contiguous && samples_are(out, channels_last);
  return mix_call(x, out, both ? row_format(x) : contiguous ? MemoryFormat::Contiguous : channels_last, count);
}

}  // namespace mixupe

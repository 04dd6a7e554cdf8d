// Checks of an operator's arguments and allocation of its results, shared by both backends: what reaches a kernel has
// the dtype, shape and device the kernel reads, also when the operator is called directly. Errors are
// std::runtime_error with the argument's name, its value and what was expected.
#pragma once
#if defined(__CUDACC__) && !defined(USE_CUDA)
#define USE_CUDA  // torch's headers declare their CUDA functions under it
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../row.h"
#include "dtypes.h"

// The dispatch key that the operators are registered for.
#ifndef MIXUPE_KEY
#ifdef __CUDACC__
#define MIXUPE_KEY CUDA
#else
#define MIXUPE_KEY CPU
#endif
#endif

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

inline bool is_mixable(ScalarType dtype) { return is_float(dtype) || dtype == ScalarType::Byte; }

// Calls f with a value of the C++ type that a floating dtype names.
template <typename F>
void with_float_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: fail("expected a floating dtype, got ", torch::headeronly::toString(dtype));
  }
}

template <typename F>
void with_mixable_type(ScalarType dtype, const F& f) {
  dtype == ScalarType::Byte ? f(uint8_t{}) : with_float_type(dtype, f);
}

// Messages name dtypes, shapes and devices as PyTorch prints them, and begin with the argument's name in the schema.

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline int32_t device_type_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline std::string device_text(const Tensor& tensor) {
  const int32_t type = device_type_of(tensor);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  return (type == aoti_torch_device_type_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

// A tensor beside which others must lie, and its name.
struct Beside {
  const char* name;
  const Tensor& tensor;
};

inline void require_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  const ScalarType actual = tensor.scalar_type();
  if (actual != dtype) fail(name, " must have dtype ", name_of(dtype), ", got ", name_of(actual));
}

inline void require_float(const char* name, ScalarType dtype) {
  if (!is_float(dtype)) fail(name, " must have dtype float32, float64, bfloat16, float16, got ", name_of(dtype));
}

inline void require_mixable(const char* name, ScalarType dtype) {
  if (!is_mixable(dtype))
    fail(name, " must have dtype float32, float64, bfloat16, float16, uint8, got ", name_of(dtype));
}

inline void require_device(const char* name, const Tensor& tensor, const Beside& beside) {
  const Tensor& other = beside.tensor;
  if (device_type_of(tensor) != device_type_of(other) || tensor.get_device_index() != other.get_device_index())
    fail(name, " must be on the device of ", beside.name, ", ", device_text(other), ", got ", device_text(tensor));
}

inline void require_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto actual = tensor.sizes();
  if (actual.size() != expected.size() || !std::equal(expected.begin(), expected.end(), actual.begin()))
    fail(name, " must have shape ", shape_text(std::vector<int64_t>(expected)), ", got ", shape_text(actual));
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
  return std::is_same_v<T, double>  ? ScalarType::Double
         : std::is_same_v<T, float> ? ScalarType::Float
                                    : ScalarType::Long;
}

template <typename T>
Vector<T> vector_of(const char* name, const Tensor& tensor, int64_t length, const Beside& beside) {
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, beside);
  require_shape(name, tensor, {length});
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

template <typename T>
Vector<T> vector_of(const char* name, const OptionalTensor& tensor, int64_t length, const Beside& beside) {
  return tensor ? vector_of<T>(name, *tensor, length, beside) : Vector<T>{};
}

// A weight for each row: (length,), (1,) or a 0-d tensor for all of them.
template <typename T>
Vector<T> row_weights(const char* name, const Tensor& tensor, int64_t length, const Beside& beside) {
  if (tensor.dim() > 1 || tensor.numel() != 1) return vector_of<T>(name, tensor, length, beside);
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, beside);
  return {static_cast<const T*>(tensor.const_data_ptr()), 0};
}

// A scalar the kernel reads where it lies.
template <typename T>
const T* scalar_of(const char* name, const Tensor& tensor, const Beside& beside) {
  require_dtype(name, tensor, dtype_of<T>());
  require_device(name, tensor, beside);
  require_shape(name, tensor, {});
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
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()),
             bytes = tensor.numel() * tensor.element_size();
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  if (bytes >= 2 * page && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& sizes,
                       const std::vector<int64_t>& strides) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle handle;
  const int32_t device_type = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  to<int32_t>(from(dtype)), device_type, like.get_device_index(),
                                                  &handle));
  const Tensor tensor(handle);
  if (!like.is_cuda()) prefer_huge_pages(tensor);
  return tensor;
}

inline Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& sizes) {
  return allocate(like, dtype, sizes, contiguous_strides(sizes));
}

}  // namespace mixupe

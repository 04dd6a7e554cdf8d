// float16 on the host: the compiler's own.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  _Float16 value;
};

inline __half __ushort_as_half(uint16_t bits) {
  __half v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline uint16_t __half_as_ushort(__half v) {
  uint16_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float __half2float(__half v) { return v.value; }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

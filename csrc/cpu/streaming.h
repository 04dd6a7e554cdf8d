// Stores past the caches, on the CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "elements.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mixupe {
namespace {

// Beyond the last-level cache a result will be read back from memory anyway, and non-temporal stores spare the read of each
// line before it is written. Linux tells its size. sysconf's is worked out from CPUID: on a share of an AMD EPYC ten times the
// 32 MB that are there. MIXUPE_LAST_LEVEL_CACHE, in bytes, takes its place: with 0 every result is streamed, as tests have it.
const int64_t last_level_cache = [] {
  const char* bytes = std::getenv("MIXUPE_LAST_LEVEL_CACHE");
  if (bytes && *bytes) return int64_t(std::atoll(bytes));
  long kilobytes = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return int64_t(kilobytes > 0 ? kilobytes : 32 << 10) << 10;
}();

// Copies past the caches; `source` is a small buffer in the first-level cache.
MIXUPE_FN void stream_bytes(void* destination, const void* source, int64_t bytes) {
#ifdef __SSE2__
  char* to = static_cast<char*>(destination);
  const char* from = static_cast<const char*>(source);
  const int64_t head = std::min<int64_t>((-reinterpret_cast<uintptr_t>(to)) & 15, bytes);
  std::memcpy(to, from, head);
  const int64_t body = (bytes - head) / 16 * 16;
  for (int64_t i = head; i < head + body; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  std::memcpy(to + head + body, from + head + body, bytes - head - body);
#else
  std::memcpy(destination, source, bytes);
#endif
}

MIXUPE_FN void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace mixupe

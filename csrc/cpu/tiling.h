// Passes over samples that are flat runs of elements, on the CPU: tiles, and the blocks that are read and written.
//
// The floor of mix is one read of x and one write of out. Tiles of a sample come first and samples second, in the order in
// which each sample's partner is the next one's own: a sample is then in cache when it is read again. Tiles are long, because
// memory is read in long runs only: 16 KB tiles in index order took twice the time of a copy in bfloat16.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "elements.h"
#include "parallel.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mixupe {
namespace {

// Beyond the last-level cache a result will be read back from memory anyway, and non-temporal stores spare the read of each
// line before it is written. Linux tells its size. sysconf's is worked out from CPUID: on a share of an AMD EPYC ten times the
// 32 MB that are there. MIXUPE_LAST_LEVEL_CACHE, in bytes, takes its place: with 0 every result is streamed, as tests have it.
const int64_t last_level_cache = [] {
  if (const char* bytes = std::getenv("MIXUPE_LAST_LEVEL_CACHE")) return int64_t(std::atoll(bytes));
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

// Two tiles fit a second-level cache of 1 MB. Against 128 KB, mixed and clean bfloat16 images took 24 % less time, float32
// ones 2 %; 640 KB was no better.
constexpr int64_t tile_bytes = 320 << 10;

// A pass over samples that are flat runs of elements, in tiles: items are (tile, chunk of rows), tiles outermost.
struct Tiling {
  int64_t sample, rows, rows_together, tile, rows_per_chunk, chunks, tiles;

  Tiling(int64_t sample_size, int64_t row_count, int64_t element_size, int64_t together = 1)
      : sample(sample_size), rows(row_count), rows_together(together) {
    // Tiles of one length in whole cache lines, so that the threads' shares are equal.
    tiles = std::max<int64_t>(1, (sample * element_size + tile_bytes - 1) / tile_bytes);
    tile = std::max<int64_t>(1, ((sample + tiles - 1) / tiles + 63) / 64 * 64);
    tiles = std::max<int64_t>(1, (sample + tile - 1) / tile);
    // Few tiles (short samples): rows share the work out as well.
    rows_per_chunk = tiles >= 16 ? rows : std::max<int64_t>(1, elements_per_thread / (tile * together));
    if (tiles > 1) rows_per_chunk = std::max(rows_per_chunk, (rows + 3) / 4);
    chunks = rows ? (rows + rows_per_chunk - 1) / rows_per_chunk : 0;
  }

  template <typename F>
  void parallel(const F& body) const {
    const int64_t elements = tile * rows_together * std::min(rows_per_chunk, rows);
    const int64_t grain = elements > 0 ? std::max<int64_t>(1, elements_per_thread / elements) : 1;
    torch::stable::parallel_for(0, tiles * chunks, grain, body);
  }

  // Calls f(row, start, n) for each block of the items, n ≤ block_size.
  template <typename F>
  void each_block(int64_t begin, int64_t end, const F& f) const {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t tile_start = index / chunks * tile, tile_end = std::min(tile_start + tile, sample);
      const int64_t first = index % chunks * rows_per_chunk, last = std::min(first + rows_per_chunk, rows);
      for (int64_t row = first; row < last; ++row)
        for (int64_t start = tile_start; start < tile_end; start += block_size)
          f(row, start, std::min(block_size, tile_end - start));
    }
  }
};

// Loops over a block are functions of their own, compiled for every SIMD level. Reading is by a pointer to one: a call a block
// costs nothing, and spares compiling every loop for every pair of dtypes.
template <typename T>
using ReadBlock = void (*)(const void* x, int64_t n, T* block);

template <typename In>
MIXUPE_SIMD void read_block(const void* x, int64_t n, Accumulate<In>* block) {
  const In* values = static_cast<const In*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = widen(values[i]);
}

template <typename T, typename Out>
MIXUPE_SIMD void write_block(const T* block, int64_t n, Out* out) {
  if constexpr (std::is_same_v<T, Out>) {
    std::memcpy(out, block, n * sizeof(T));
  } else {
    store_block(block, n, out);
  }
}

}  // namespace
}  // namespace mixupe

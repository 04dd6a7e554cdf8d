// Rows that are too few to fill a device, cut into parts with a block each.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../row.h"

namespace mixupe {

// The columns of a row that a team takes: all of them, or a part.
struct Columns {
  int64_t begin, size;

  MIXUPE_FN bool has(int64_t k) const { return k >= begin && k - begin < size; }
};

// Parts of `width` columns, of which the last may have fewer.
struct Cut {
  // Two blocks for each of some 130 multiprocessors have 32 KB of loads on their way in each; at a latency of 0.8 µs,
  // 4.3 TB/s ask for 26. A constant, so that every device sums in the same order. No GPU has timed it.
  static constexpr int64_t most_blocks = 256;
  // Two packs or more for each thread of a block: a smaller part would be mostly what joins its threads.
  static constexpr int64_t least_width = 4096;
  static constexpr int64_t line =
      64;  // elements of 128 bytes or more: no two parts share a cache line of an aligned row

  int64_t width, parts = 1;

  Cut(int64_t rows, int64_t classes) {
    // Powers of two: batches of nearly the same size sum a row in the same order.
    while (rows * parts * 2 <= most_blocks && parts * 2 * least_width <= classes) parts *= 2;
    const int64_t share = (classes + parts - 1) / parts;
    width = (share + line - 1) / line * line;
    parts = (classes + width - 1) / width;  // so that none is empty
  }
};

// A job over rows that are cut: a block (row, part) takes the part's columns. `sums` has those of each part of each row.
template <typename Job, typename Sums>
struct InParts {
  Job rows;
  Cut cut;
  Sums* sums;

  __device__ Columns columns() const {
    const int64_t begin = blockIdx.y * cut.width, left = rows.targets.classes - begin;
    return {begin, left < cut.width ? left : cut.width};
  }

  __device__ void keep(const Sums& of_part) const { sums[blockIdx.x * cut.parts + blockIdx.y] = of_part; }

  // The sums of a whole row, given to all threads of a team. Every thread of it must call this.
  template <typename Team>
  __device__ Sums joined(int64_t row) const {
    Sums total = Sums::none();
    for (int64_t part = Team::rank(); part < cut.parts; part += Team::threads)
      total = join(total, sums[row * cut.parts + part]);
    return Team::reduce(total, [](const Sums& a, const Sums& b) { return join(a, b); });
  }
};

}  // namespace mixupe

// mix, and the sums and dot products of rows its gradients are made of, on the CPU.
//
// The floor is one read of x and one write of out. Tiles of a sample come first and samples second, in the order in which
// each sample's partner is the next one's own: a sample is then in cache when it is read again. Tiles are long, because
// memory is read in long runs only: 16 KB tiles in index order took twice the time of a copy in bfloat16.
#include <algorithm>

#include "cpu.h"
#include "mix_operators.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif

namespace mixupe {
namespace {

// Beyond the last-level cache a result will be read back from memory anyway, and non-temporal stores spare the read
// of each line before it is written.
const int64_t last_level_cache = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t(32) << 20;
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
  int64_t sample, rows, tile, rows_per_chunk, chunks, tiles;

  Tiling(int64_t sample_size, int64_t row_count, int64_t element_size) : sample(sample_size), rows(row_count) {
    // Tiles of one length, lest the threads' shares differ, in whole cache lines.
    tiles = std::max<int64_t>(1, (sample * element_size + tile_bytes - 1) / tile_bytes);
    tile = std::max<int64_t>(1, ((sample + tiles - 1) / tiles + 63) / 64 * 64);
    tiles = std::max<int64_t>(1, (sample + tile - 1) / tile);
    // Few tiles (short samples): rows share the work out as well.
    rows_per_chunk = tiles >= 16 ? rows : std::max<int64_t>(1, elements_per_thread / tile);
    if (tiles > 1) rows_per_chunk = std::max(rows_per_chunk, (rows + 3) / 4);
    chunks = rows ? (rows + rows_per_chunk - 1) / rows_per_chunk : 0;
  }

  template <typename F>
  void parallel(const F& body) const {
    const int64_t elements = tile * std::min(rows_per_chunk, rows);
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

// Loops over a block are functions of their own, compiled for every SIMD level. Reading and writing are pointers to
// them: a call a block costs nothing, and spares compiling every loop for every pair of dtypes.
template <typename T>
using ReadBlock = void (*)(const void* x, int64_t n, T* block);
template <typename T>
using WriteBlock = void (*)(const T* block, int64_t n, bool stream, void* out);

template <typename In>
MIXUPE_SIMD void read_block(const void* x, int64_t n, Accumulate<In>* block) {
  const In* values = static_cast<const In*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = widen(values[i]);
}

template <typename T, typename Out>
MIXUPE_SIMD void write_block(const T* block, int64_t n, bool stream, void* out) {
  if constexpr (std::is_same_v<T, Out>) {
    if (stream) return stream_bytes(out, block, n * sizeof(T));
    std::memcpy(out, block, n * sizeof(T));
  } else if (stream) {
    alignas(64) Out narrowed[block_size];
    store_block(block, n, narrowed);
    stream_bytes(out, narrowed, n * sizeof(Out));
  } else {
    store_block(block, n, static_cast<Out*>(out));
  }
}

template <typename In, typename T>
MIXUPE_SIMD void mix_block(const In* own, const In* other, T lam, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = mix(T(widen(own[i])), T(widen(other[i])), lam);
}

template <typename T>
MIXUPE_SIMD void affine_block(T scale, T shift, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = block[i] * scale + shift;
}

template <typename T>
MIXUPE_SIMD void affine_pattern(const T* scale, const T* shift, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] = block[i] * scale[i] + shift[i];
}

// v·scale + shift per channel, for elements in the order of memory: channel(i) = i / channel_stride mod channels.
template <typename T>
class Affine {
 public:
  Affine() = default;
  Affine(Vector<T> scale, Vector<T> shift, int64_t channels, int64_t channel_stride)
      : scale_(scale), shift_(shift), channels_(channels), stride_(channel_stride) {
    if (!scale || stride_ >= 64 || channels == 0) return;
    // Short runs of a channel (channels_last: single elements): the factors of every element, over one period and as
    // much more as a block needs from any phase.
    const int64_t length = period() + block_size;
    pattern_.resize(2 * length);
    for (int64_t i = 0; i < length; ++i) {
      pattern_[i] = scale[i / stride_ % channels_];
      pattern_[length + i] = shift[i / stride_ % channels_];
    }
  }

  void operator()(int64_t start, int64_t n, T* block) const {
    if (!scale_) return;
    if (!pattern_.empty()) {
      const T* scale = pattern_.data() + start % period();
      return affine_pattern(scale, scale + pattern_.size() / 2, n, block);
    }
    for (int64_t i = 0; i < n;) {
      const int64_t channel = (start + i) / stride_ % channels_;
      const int64_t run = std::min(stride_ - (start + i) % stride_, n - i);
      affine_block(scale_[channel], shift_[channel], run, block + i);
      i += run;
    }
  }

 private:
  int64_t period() const { return channels_ * stride_; }

  Vector<T> scale_, shift_;
  int64_t channels_ = 0, stride_ = 0;
  std::vector<T> pattern_;
};

// How many elements from this one on are inside the box as it is, or outside as it is; at least one.
int64_t run_length(const Box& box, int64_t line, int64_t column) {
  const int64_t left = std::max<int64_t>(box.edges[2], 0) * box.pixel;
  if (box.contains(line, column)) return std::min(box.edges[3] * box.pixel, box.line_size) - column;
  const int64_t entered = std::max(column < left ? line : line + 1, box.edges[0]);
  const bool again = entered < std::min(box.edges[1], box.height);
  return (again ? entered * box.line_size + left : box.height * box.line_size) - (line * box.line_size + column);
}

template <typename In>
struct MixJob {
  using T = Accumulate<In>;
  const In* x;
  char* out;
  int64_t x_stride, out_stride;  // in elements of x, in bytes of out
  int64_t batch, count;
  Vector<int64_t> partner, rows;
  Vector<T> lam;
  Affine<T> affine;
  Box box;
  int64_t out_size;  // bytes of one element
  WriteBlock<T> write;
  bool stream, direct;  // direct: out holds T and is written in place
  std::vector<int64_t> order;

  int64_t own(int64_t row) const { return rows ? rows[row] : row; }
  int64_t other(int64_t row) const { return partner ? partner[row] : batch - 1 - own(row); }
  char* out_block(int64_t row, int64_t start) const { return out + row * out_stride + start * out_size; }

  void combine(int64_t own, int64_t other, T weight, int64_t start, int64_t n, T* block) const {
    if (!box) return combine_run(own, other, weight, start, n, block);
    for (int64_t i = 0; i < n;) {
      const int64_t line = box.line_of(start + i), column = box.column_of(start + i);
      const int64_t run = std::min(run_length(box, line, column), n - i);
      combine_run(own, other, box.contains(line, column) ? T(0) : weight, start + i, run, block + i);
      i += run;
    }
  }

  // λ·own + (1 - λ)·other of a block, or of a run of it; a sample of weight 0 is not read.
  void combine_run(int64_t own, int64_t other, T weight, int64_t start, int64_t n, T* block) const {
    const In *first = x + own * x_stride + start, *second = x + other * x_stride + start;
    if (weight == T(1)) {
      read_block<In>(first, n, block);
    } else if (weight == T(0)) {
      read_block<In>(second, n, block);
    } else {
      mix_block(first, second, weight, n, block);
    }
    affine(start, n, block);
  }
};

// The rows of out, so that each row's own sample is the partner of the one before it where there is such a row.
template <typename In>
std::vector<int64_t> chained_order(const MixJob<In>& job) {
  std::vector<int64_t> order, waiting(job.batch, -1), next(job.count, -1);  // rows left for each own sample, linked
  std::vector<bool> done(job.count, false);
  order.reserve(job.count);
  for (int64_t row = job.count; row-- > 0;) {
    next[row] = waiting[job.own(row)];
    waiting[job.own(row)] = row;
  }
  for (int64_t row = 0, first = 0; static_cast<int64_t>(order.size()) < job.count;) {
    if (row < 0) {
      while (done[first]) ++first;
      row = first;
      // `first` heads its list: earlier rows are done, and lists ascend.
    }
    order.push_back(row);
    done[row] = true;
    waiting[job.own(row)] = next[row];
    row = waiting[job.own(row)] >= 0 ? waiting[job.own(row)] : waiting[job.other(row)];
  }
  return order;
}

template <typename In>
void mix_rows(const MixJob<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T buffer[block_size];
  tiling.each_block(begin, end, [&](int64_t index, int64_t start, int64_t n) {
    const int64_t row = job.order.empty() ? index : job.order[index];
    char* out = job.out_block(row, start);
    T* block = job.direct ? reinterpret_cast<T*>(out) : buffer;
    job.combine(job.own(row), job.other(row), job.lam[row], start, n, block);
    if (!job.direct) job.write(block, n, job.stream, out);
  });
  if (job.stream) finish_streaming();
}

// The flip pairing of a whole batch, two rows at a time: each pair is read before either is written, so that out may
// be x. Rows of the tiling are pairs.
template <typename In>
void flip_rows(const MixJob<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T first[block_size], second[block_size];
  tiling.each_block(begin, end, [&](int64_t row, int64_t start, int64_t n) {
    const int64_t mirror = job.batch - 1 - row;
    job.combine(row, mirror, job.lam[row], start, n, first);
    job.combine(mirror, row, job.lam[mirror], start, n, second);
    job.write(first, n, job.stream, job.out_block(row, start));
    job.write(second, n, job.stream, job.out_block(mirror, start));
  });
  if (job.stream) finish_streaming();
}

template <typename T>
void check_weights(const Vector<T>& lam, int64_t count) {
  for (int64_t i = 0; i < (lam.stride ? count : std::min<int64_t>(count, 1)); ++i)
    if (!(lam[i] >= T(0) && lam[i] <= T(1))) fail("lam must be in [0, 1], got ", shortest(lam[i]));
}

template <typename T>
WriteBlock<T> block_writer(ScalarType dtype) {
  WriteBlock<T> write = nullptr;
  with_mixable_type(dtype, [&](auto type) { write = write_block<T, decltype(type)>; });
  return write;
}

template <typename In>
MixJob<In> mix_job(const MixCall& call, const MixArguments& arguments) {
  using T = Accumulate<In>;
  MixJob<In> job{};
  job.x = static_cast<const In*>(call.x.const_data_ptr());
  job.out = data<char>(call.out);
  job.out_size = static_cast<int64_t>(call.out.element_size());
  job.x_stride = call.x.stride(0), job.out_stride = call.out.stride(0) * job.out_size;
  job.batch = call.batch, job.count = call.count;
  job.partner = vector_of<int64_t>("partner", arguments.partner, call.count, call.x);
  job.rows = vector_of<int64_t>("rows", arguments.rows, call.count, call.x);
  job.lam = row_weights<T>("lam", arguments.lam, call.count, call.x);
  job.affine = Affine<T>(vector_of<T>("scale", arguments.scale, call.channels, call.x),
                         vector_of<T>("shift", arguments.shift, call.channels, call.x), call.channels,
                         call.channel_stride);
  job.box = box_of(call, arguments.box);
  check_rows("partner", job.partner, call.count, call.batch);
  check_rows("rows", job.rows, call.count, call.batch);
  check_weights(job.lam, call.count);
  job.write = block_writer<T>(call.out.scalar_type());
  job.stream = call.count * call.sample * job.out_size > last_level_cache;
  job.direct = !job.stream && call.out.scalar_type() == dtype_of<T>();
  return job;
}

void run_mix(const MixCall& call, const MixArguments& arguments) {
  with_mixable_type(call.x.scalar_type(), [&](auto type) {
    MixJob<decltype(type)> job = mix_job<decltype(type)>(call, arguments);
    if (call.count == 0 || call.sample == 0) return;
    const bool pairs = !job.partner && !job.rows;
    const auto element = std::max(static_cast<int64_t>(call.x.element_size()), job.out_size);
    const Tiling tiling(call.sample, pairs ? (call.count + 1) / 2 : call.count, element);
    if (!pairs && call.count * tiling.tile * element > 4 * tile_bytes) job.order = chained_order(job);
    tiling.parallel([&](int64_t begin, int64_t end) {
      pairs ? flip_rows(job, tiling, begin, end) : mix_rows(job, tiling, begin, end);
    });
  });
}

template <typename In>
struct GatherJob {
  using T = Accumulate<In>;
  const In* src;
  In* out;
  int64_t src_stride, out_stride;
  Vector<int64_t> index, offsets;
  Vector<T> weight;
};

template <typename In, typename T>
MIXUPE_SIMD void add_block(const In* src, T weight, int64_t n, T* block) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) block[i] += weight * T(widen(src[i]));
}

template <typename In>
void gather_rows(const GatherJob<In>& job, const Tiling& tiling, int64_t begin, int64_t end) {
  using T = Accumulate<In>;
  alignas(64) T block[block_size];
  tiling.each_block(begin, end, [&](int64_t row, int64_t start, int64_t n) {
    std::memset(block, 0, n * sizeof(T));
    for (int64_t t = job.offsets[row]; t < job.offsets[row + 1]; ++t)
      add_block(job.src + job.index[t] * job.src_stride + start, job.weight[t], n, block);
    write_block<T, In>(block, n, false, job.out + row * job.out_stride + start);
  });
}

Tensor gather_sum(const Tensor& src_argument, const Tensor& index, const Tensor& weight, const Tensor& offsets) {
  require(src_argument.dim() >= 1 && is_float(src_argument.scalar_type()),
          "src must be a float tensor of at least one dimension");
  require(index.dim() == 1, "index must have one dimension");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must have one dimension and at least one element");
  const Tensor src = with_samples(src_argument, MemoryFormat::Contiguous);
  const int64_t terms = index.size(0), rows = offsets.size(0) - 1, sample = sample_size(src);
  std::vector<int64_t> sizes = sizes_of(src);
  sizes[0] = rows;
  Tensor out = allocate(src, src.scalar_type(), sizes);
  with_float_type(src.scalar_type(), [&](auto type) {
    using In = decltype(type);
    const GatherJob<In> job{static_cast<const In*>(src.const_data_ptr()), data<In>(out),
                            src.stride(0), out.stride(0), vector_of<int64_t>("index", index, terms, src),
                            vector_of<int64_t>("offsets", offsets, rows + 1, src),
                            vector_of<Accumulate<In>>("weight", weight, terms, src)};
    check_rows("index", job.index, terms, src.size(0));
    require(job.offsets[0] == 0 && job.offsets[rows] == terms, "offsets must go from 0 to ", terms);
    for (int64_t row = 0; row < rows; ++row)
      require(job.offsets[row] <= job.offsets[row + 1], "offsets must ascend");
    if (sample == 0) return;
    const Tiling tiling(sample, rows, sizeof(In));
    tiling.parallel([&](int64_t begin, int64_t end) { gather_rows(job, tiling, begin, end); });
  });
  return out;
}

template <typename T>
struct DotJob {
  const char *a, *b;
  int64_t a_stride, b_stride, a_size, b_size, sample;  // strides and sizes in bytes
  ReadBlock<T> read_a, read_b;
  Vector<int64_t> a_index, b_index;
  T* out;
};

template <typename T>
MIXUPE_SIMD T dot_block(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
void dot_rows(const DotJob<T>& job, int64_t begin, int64_t end) {
  alignas(64) T a[block_size], b[block_size];
  for (int64_t row = begin; row < end; ++row) {
    double total = 0;
    for (int64_t start = 0; start < job.sample; start += block_size) {
      const int64_t n = std::min(block_size, job.sample - start);
      job.read_a(job.a + job.a_index[row] * job.a_stride + start * job.a_size, n, a);
      job.read_b(job.b + job.b_index[row] * job.b_stride + start * job.b_size, n, b);
      total += dot_block(a, b, n);
    }
    job.out[row] = static_cast<T>(total);
  }
}

template <typename T>
ReadBlock<T> block_reader(ScalarType dtype) {
  ReadBlock<T> read = nullptr;
  with_mixable_type(dtype, [&](auto type) {
    if constexpr (std::is_same_v<Accumulate<decltype(type)>, T>) read = read_block<decltype(type)>;
  });
  require(read, "a and b must both be float64, or neither");
  return read;
}

Tensor row_dot(const Tensor& a_argument, const Tensor& b_argument, const Tensor& a_index, const Tensor& b_index) {
  require(a_argument.dim() >= 1 && a_argument.dim() == b_argument.dim(), "a and b must have the same dimensions");
  for (int64_t d = 1; d < a_argument.dim(); ++d)
    require(a_argument.size(d) == b_argument.size(d), "a and b must have samples of the same shape");
  require(a_index.dim() == 1, "a_index must have one dimension");
  require_device("b", b_argument, a_argument);
  const MemoryFormat format = row_format(a_argument);
  const Tensor a = with_samples(a_argument, format), b = with_samples(b_argument, format);
  const int64_t count = a_index.size(0), sample = sample_size(a);
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  Tensor out = allocate(a, dtype, {count});
  with_float_type(dtype, [&](auto type) {
    using T = Accumulate<decltype(type)>;
    const auto a_size = static_cast<int64_t>(a.element_size()), b_size = static_cast<int64_t>(b.element_size());
    const DotJob<T> job{static_cast<const char*>(a.const_data_ptr()), static_cast<const char*>(b.const_data_ptr()),
                        a.stride(0) * a_size, b.stride(0) * b_size, a_size, b_size, sample,
                        block_reader<T>(a.scalar_type()), block_reader<T>(b.scalar_type()),
                        vector_of<int64_t>("a_index", a_index, count, a),
                        vector_of<int64_t>("b_index", b_index, count, a), data<T>(out)};
    check_rows("a_index", job.a_index, count, a.size(0));
    check_rows("b_index", job.b_index, count, b.size(0));
    parallel_rows(count, sample, [&](int64_t begin, int64_t end) { dot_rows(job, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixupe, CPU, m) {
  m.impl("mix", TORCH_BOX(&mix_samples));
  m.impl("mix_out", TORCH_BOX(&mix_samples_out));
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
  m.impl("row_dot", TORCH_BOX(&row_dot));
}

}  // namespace mixupe

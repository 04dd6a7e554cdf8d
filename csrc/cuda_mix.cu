// mix, and the sums and dot products of rows its gradients are made of, on CUDA.
//
// Blocks are numbered samples first and tiles second: all samples' first tiles run before their second ones, so that
// when a sample meets its partner the partner's tile is still in the L2 cache, and memory sees one read of x and one
// write of out (the floor) whatever the pairing.
#include <algorithm>

#include "cuda.h"
#include "mix_operators.h"

namespace mixupe {
namespace {

// Threads of a block and packs for each of them: 16 KB of a sample are a tile.
constexpr int most_threads = 256, packs_per_thread = 4;

// A pass over samples that are flat runs of elements: a block takes one tile of one sample.
struct Tiling {
  int64_t samples, tiles, packs_per_tile;
  int threads;

  Tiling(int64_t sample_count, int64_t sample_size, int pack) : samples(sample_count) {
    const int64_t packs = sample_size / pack, share = (packs + packs_per_thread - 1) / packs_per_thread;
    threads = static_cast<int>(std::clamp<int64_t>((share + 31) / 32 * 32, 32, most_threads));
    packs_per_tile = int64_t(threads) * packs_per_thread;
    tiles = sample_size == 0 ? 0 : std::max<int64_t>(1, (packs + packs_per_tile - 1) / packs_per_tile);
  }

  int64_t blocks() const { return samples * tiles; }
  MIXUPE_FN int64_t sample_of(int64_t block) const { return block % samples; }

  // The packs of the block's tile, cut to those the sample has.
  MIXUPE_FN int64_t first_pack(int64_t block) const { return block / samples * packs_per_tile; }
  MIXUPE_FN int64_t last_pack(int64_t block, const Span& span) const {
    const int64_t end = first_pack(block) + packs_per_tile;
    return end < span.packs ? end : span.packs;
  }
};

template <int pack, typename F>
__device__ __forceinline__ void for_each_in_tile(const Tiling& tiling, const Span& span, const F& body) {
  const int64_t begin = tiling.first_pack(blockIdx.x), end = tiling.last_pack(blockIdx.x, span);
  for_each_pack<pack>(span, begin, end, threadIdx.x, blockDim.x, body);
}

// A dtype that a kernel learns at run time.
enum class Dtype { float32, float64, bfloat16, float16, uint8 };

Dtype dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Byte: return Dtype::uint8;
    default: fail("expected a float or uint8 dtype, got ", torch::headeronly::toString(dtype));
  }
}

// Calls f with a pointer of the dtype's type; kernels branch so once a pack, which spares compiling every kernel for
// every pair of dtypes.
template <typename Pointer, typename F>
__device__ __forceinline__ void with_dtype(Dtype dtype, Pointer* p, const F& f) {
  using Const = std::is_const<Pointer>;
  const auto as = [p](auto type) {
    using V = decltype(type);
    return reinterpret_cast<std::conditional_t<Const::value, const V, V>*>(p);
  };
  switch (dtype) {
    case Dtype::float32: return f(as(float{}));
    case Dtype::float64: return f(as(double{}));
    case Dtype::bfloat16: return f(as(__nv_bfloat16{}));
    case Dtype::float16: return f(as(__half{}));
    case Dtype::uint8: return f(as(uint8_t{}));
  }
}

// Where a kernel writes rows of a dtype known at run time.
struct Output {
  char* data;
  int64_t stride, element;  // in bytes
  Dtype dtype;

  MIXUPE_FN char* at(int64_t row, int64_t k) const { return data + row * stride + k * element; }
};

template <int pack>
__device__ Span span_of_output(const Output& out, int64_t row, int64_t size) {
  Span span{};
  with_dtype(out.dtype, out.at(row, 0), [&](auto* p) {
    span = span_of<std::remove_pointer_t<decltype(p)>, pack>(p, size);
  });
  return span;
}

template <int count, typename T>
__device__ __forceinline__ void store_output(const T (&values)[count], const Output& out, int64_t row, int64_t k) {
  with_dtype(out.dtype, out.at(row, k), [&](auto* p) { store(values, p); });
}

template <typename In>
struct MixJob {
  using T = Accumulate<In>;
  Tiling tiling;
  const In* x;
  int64_t stride, batch, sample;
  Output out;
  Vector<int64_t> partner, rows;
  Vector<T> lam, scale, shift;
  int64_t channels, channel_stride;
  Box box;
};

template <typename T>
__device__ __forceinline__ T checked_weight(const Vector<T>& lam, int64_t row) {
  const T weight = lam[row];
  assert(weight >= T(0) && weight <= T(1) && "lam must be in [0, 1]");
  return weight;
}

// Which of the elements k, ..., k + count - 1 of a sample are inside the box, a bit each.
template <int count>
__device__ __forceinline__ unsigned inside(const Box& box, int64_t k) {
  if (!box) return 0;
  unsigned bits = 0;
  int64_t line = box.line_of(k), column = box.column_of(k);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bits |= static_cast<unsigned>(box.contains(line, column)) << i;
    if (++column == box.line_size) column = 0, line = line + 1 == box.height ? 0 : line + 1;
  }
  return bits;
}

// A weight of 1 or 0 copies exactly, whatever the other sample holds; it is 0 where `cut` has a bit.
template <int count, typename T>
__device__ __forceinline__ void blend(
    const T (&own)[count], const T (&other)[count], T lam, unsigned cut, T (&out)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const T weight = cut >> i & 1 ? T(0) : lam;
    out[i] = weight == T(1) ? own[i] : weight == T(0) ? other[i] : mix(own[i], other[i], weight);
  }
}

// v·scale + shift by the channel of each of the elements k, ..., k + count - 1 of a sample.
template <int count, typename In, typename T>
__device__ __forceinline__ void normalise(const MixJob<In>& job, int64_t k, T (&values)[count]) {
  if (!job.scale) return;
  int64_t channel = k / job.channel_stride % job.channels, left = job.channel_stride - k % job.channel_stride;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = values[i] * job.scale[channel] + job.shift[channel];
    if (--left == 0) left = job.channel_stride, channel = channel + 1 == job.channels ? 0 : channel + 1;
  }
}

template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) mix_rows(const MixJob<In> job) {
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const int64_t row = job.tiling.sample_of(blockIdx.x);
  const int64_t own_row = checked_row(job.rows ? job.rows[row] : row, job.batch);
  const int64_t other_row = checked_row(job.partner ? job.partner[row] : job.batch - 1 - own_row, job.batch);
  const T lam = checked_weight(job.lam, row);
  const In *own = job.x + own_row * job.stride, *other = job.x + other_row * job.stride;
  const Span span = span_of_output<pack>(job.out, row, job.sample);
  for_each_in_tile<pack>(job.tiling, span, [&](auto count, int64_t k) {
    // A sample is not read where all its weights are 0.
    T first[count.value] = {}, second[count.value] = {}, mixed[count.value];
    const unsigned cut = inside<count.value>(job.box, k);
    if (lam != T(0) && cut != (1u << count.value) - 1) load(own + k, first);
    if (lam != T(1) || cut) load(other + k, second);
    blend(first, second, lam, cut, mixed);
    normalise(job, k, mixed);
    store_output(mixed, job.out, row, k);
  });
}

// The flip pairing of a whole batch: a block takes the samples i and B - 1 - i and reads each element of the two before
// it writes either, so that out may be x. Samples of the tiling are pairs.
template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) flip_rows(const MixJob<In> job) {
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const int64_t row = job.tiling.sample_of(blockIdx.x), mirror = job.batch - 1 - row;
  const T lam = checked_weight(job.lam, row), mirror_lam = checked_weight(job.lam, mirror);
  const In *own = job.x + row * job.stride, *other = job.x + mirror * job.stride;
  const Span span = span_of_output<pack>(job.out, row, job.sample);
  for_each_in_tile<pack>(job.tiling, span, [&](auto count, int64_t k) {
    T first[count.value], second[count.value], mixed[count.value];
    const unsigned cut = inside<count.value>(job.box, k);
    load(own + k, first);
    load(other + k, second);
    blend(first, second, lam, cut, mixed);
    normalise(job, k, mixed);
    store_output(mixed, job.out, row, k);
    if (mirror == row) return;
    blend(second, first, mirror_lam, cut, mixed);
    normalise(job, k, mixed);
    store_output(mixed, job.out, mirror, k);
  });
}

void run_mix(const MixCall& call, const MixArguments& arguments) {
  with_mixable_type(call.x.scalar_type(), [&](auto type) {
    using In = decltype(type);
    using T = Accumulate<In>;
    const bool pairs = !arguments.partner && !arguments.rows;
    const auto element = static_cast<int64_t>(call.out.element_size());
    const MixJob<In> job{
        Tiling(pairs ? (call.count + 1) / 2 : call.count, call.sample, pack_of<In>),
        static_cast<const In*>(call.x.const_data_ptr()),
        call.x.stride(0),
        call.batch,
        call.sample,
        {data<char>(call.out), call.out.stride(0) * element, element, dtype_code(call.out.scalar_type())},
        vector_of<int64_t>("partner", arguments.partner, call.count, call.x),
        vector_of<int64_t>("rows", arguments.rows, call.count, call.x),
        row_weights<T>("lam", arguments.lam, call.count, call.x),
        vector_of<T>("scale", arguments.scale, call.channels, call.x),
        vector_of<T>("shift", arguments.shift, call.channels, call.x),
        call.channels,
        call.channel_stride,
        box_of(call, arguments.box)};
    launch(pairs ? flip_rows<In> : mix_rows<In>, job.tiling.blocks(), job.tiling.threads, call.x, job);
  });
}

template <typename In>
struct GatherJob {
  Tiling tiling;
  const In* src;
  In* out;
  int64_t src_stride, out_stride, sample;
  int64_t sources, terms;  // rows of src, elements of index
  Vector<int64_t> index, offsets;
  Vector<Accumulate<In>> weight;
};

template <typename In>
__global__ void __launch_bounds__(most_threads, least_threads / most_threads) gather_rows(const GatherJob<In> job) {
  using T = Accumulate<In>;
  constexpr int pack = pack_of<In>;
  const int64_t row = job.tiling.sample_of(blockIdx.x), begin = job.offsets[row], end = job.offsets[row + 1];
  assert(begin >= 0 && begin <= end && end <= job.terms && "offsets must ascend from 0 to the length of index");
  assert((row > 0 || begin == 0) && (row < job.tiling.samples - 1 || end == job.terms) &&
         "offsets must go from 0 to the length of index");
  In* out = job.out + row * job.out_stride;
  for_each_in_tile<pack>(job.tiling, span_of<In, pack>(out, job.sample), [&](auto count, int64_t k) {
    T sum[count.value] = {}, values[count.value];
    for (int64_t t = begin; t < end; ++t) {
      load(job.src + checked_row(job.index[t], job.sources) * job.src_stride + k, values);
      const T weight = job.weight[t];
#pragma unroll
      for (int i = 0; i < count.value; ++i) sum[i] += weight * values[i];
    }
    store(sum, out + k);
  });
}

Tensor gather_sum(const Tensor& src_argument, const Tensor& index, const Tensor& weight, const Tensor& offsets) {
  require(src_argument.dim() >= 1 && is_float(src_argument.scalar_type()),
          "src must be a float tensor of at least one dimension");
  require(index.dim() == 1, "index must have one dimension");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must have one dimension and at least one element");
  const Tensor src = with_samples(src_argument, MemoryFormat::Contiguous);
  const int64_t terms = index.size(0), rows = offsets.size(0) - 1, sample = sample_size(src);
  require(rows > 0 || terms == 0, "offsets must go from 0 to ", terms);
  std::vector<int64_t> sizes = sizes_of(src);
  sizes[0] = rows;
  const Tensor out = allocate(src, src.scalar_type(), sizes);
  with_float_type(src.scalar_type(), [&](auto type) {
    using In = decltype(type);
    const GatherJob<In> job{
        Tiling(rows, sample, pack_of<In>),
        static_cast<const In*>(src.const_data_ptr()),
        data<In>(out),
        src.stride(0),
        out.stride(0),
        sample,
        src.size(0),
        terms,
        vector_of<int64_t>("index", index, terms, src),
        vector_of<int64_t>("offsets", offsets, rows + 1, src),
        vector_of<Accumulate<In>>("weight", weight, terms, src)};
    launch(gather_rows<In>, job.tiling.blocks(), job.tiling.threads, src, job);
  });
  return out;
}

// Rows of a tensor of a dtype known at run time.
struct Input {
  const char* data;
  int64_t stride, element, rows;  // strides and elements in bytes
  Dtype dtype;
  Vector<int64_t> index;

  MIXUPE_FN const char* at(int64_t row, int64_t k) const { return data + row * stride + k * element; }
};

template <typename T>
struct DotJob {
  Input a, b;
  int64_t count, sample;
  T* out;
};

template <int count, typename T>
__device__ __forceinline__ void load_input(const Input& input, int64_t row, int64_t k, T (&values)[count]) {
  with_dtype(input.dtype, input.at(row, k), [&](const auto* p) { load(p, values); });
}

template <typename Team, typename T>
__global__ void __launch_bounds__(Team::block, Team::blocks_at_once) dot_rows(const DotJob<T> job) {
  constexpr int pack = 8;  // 16 bytes of the narrowest dtype that occurs often
  const int64_t t = Team::row();
  if (t >= job.count) return;  // whole teams
  const int64_t a_row = checked_row(job.a.index[t], job.a.rows), b_row = checked_row(job.b.index[t], job.b.rows);
  Span span{};
  with_dtype(job.a.dtype, job.a.at(a_row, 0), [&](const auto* p) {
    span = span_of<std::remove_const_t<std::remove_pointer_t<decltype(p)>>, pack>(p, job.sample);
  });
  T sum = 0;
  for_each_pack<pack>(span, 0, span.packs, Team::rank(), Team::threads, [&](auto count, int64_t k) {
    T a[count.value], b[count.value];
    load_input(job.a, a_row, k, a);
    load_input(job.b, b_row, k, b);
#pragma unroll
    for (int i = 0; i < count.value; ++i) sum += a[i] * b[i];
  });
  const double total = Team::reduce(static_cast<double>(sum), [](double x, double y) { return x + y; });
  if (Team::rank() == 0) job.out[t] = static_cast<T>(total);
}

Input input_of(const Tensor& tensor, const char* index_name, const Tensor& index, int64_t count) {
  const auto element = static_cast<int64_t>(tensor.element_size());
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * element, element, tensor.size(0),
          dtype_code(tensor.scalar_type()), vector_of<int64_t>(index_name, index, count, tensor)};
}

Tensor row_dot(const Tensor& a_argument, const Tensor& b_argument, const Tensor& a_index, const Tensor& b_index) {
  require(a_argument.dim() >= 1 && a_argument.dim() == b_argument.dim(), "a and b must have the same dimensions");
  for (int64_t d = 1; d < a_argument.dim(); ++d)
    require(a_argument.size(d) == b_argument.size(d), "a and b must have samples of the same shape");
  require(a_index.dim() == 1, "a_index must have one dimension");
  require_device("b", b_argument, a_argument);
  const MemoryFormat format = row_format(a_argument);
  const Tensor a = with_samples(a_argument, format), b = with_samples(b_argument, format);
  const ScalarType dtype = accumulate_dtype(a.scalar_type());
  require(accumulate_dtype(b.scalar_type()) == dtype, "a and b must both be float64, or neither");
  const int64_t count = a_index.size(0), sample = sample_size(a);
  const Tensor out = allocate(a, dtype, {count});
  const auto run = [&](auto type) {
    using T = decltype(type);
    const DotJob<T> job{input_of(a, "a_index", a_index, count), input_of(b, "b_index", b_index, count), count, sample,
                        data<T>(out)};
    with_team(sample, [&](auto team) {
      using Rows = decltype(team);
      launch(dot_rows<Rows, T>, Rows::blocks(count), Rows::block, a, job);
    });
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixupe, CUDA, m) {
  m.impl("mix", TORCH_BOX(&mix_samples));
  m.impl("mix_out", TORCH_BOX(&mix_samples_out));
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
  m.impl("row_dot", TORCH_BOX(&row_dot));
}

}  // namespace mixupe

// The kernel gradient of a two-dimensional convolution: shards of the batch are summed on their own, then added up.

#include "common.h"
#include "winograd.h"

namespace kmq {
namespace {

// sum[in][out] += x[position][in] * gradient[position][out] over `rows` x `columns` positions.
template <class Type>
void kernel_gradient_tile(const Unit* x, int row_step, int column_step, const Bits* gradient, int rows, int columns,
                          Vector* sums, bool begin) {
  Vector sum[kIn][2] = {};
  if (!begin) std::memcpy(sum, sums, sizeof(sum));
  for (int row = 0; row < rows; ++row) {
    const Unit* from = x + size_t(row) * row_step;
    for (int column = 0; column < columns; ++column, from += column_step, gradient += 2) {
      Bits low = gradient[0], high = gradient[1];
#pragma GCC unroll 16
      for (int n = 0; n < kIn; ++n) {
        Bits value = splat(from[n]);
        sum[n][0] = multiply_add<Type::kPair>(sum[n][0], value, low);
        sum[n][1] = multiply_add<Type::kPair>(sum[n][1], value, high);
      }
    }
  }
  std::memcpy(sums, sum, sizeof(sum));
}

// Copies `columns` columns of one row of one utterance (or of a pair) into blocks of kBlock channels, `block_step`
// apart.
template <class Type, int kBlock>
void pack_row(const typename Type::Element* low, const typename Type::Element* high, int columns, int channels,
              Unit* to, size_t block_step) {
  using Element = typename Type::Element;
  for (int block = 0; block * kBlock < channels; ++block) {
    Unit* out = to + block * block_step;
    const int count = std::min(kBlock, channels - block * kBlock);
    for (int column = 0; column < columns; ++column, out += kBlock) {
      const Element *a = low + column * channels + block * kBlock, *b = high + column * channels + block * kBlock;
      if (count == kBlock) {
        for (int c = 0; c < kBlock; ++c) out[c] = make_unit<Type>(a[c], b[c]);
      } else {
        for (int c = 0; c < kBlock; ++c) out[c] = c < count ? make_unit<Type>(a[c], b[c]) : 0;
      }
    }
  }
}

// Everything about one call but its data. Where matrix tiles compute, columns of x stand along the rows of a tile: x is
// buffered as [row, phase of the stride, channel, column], and the columns of both are padded with zeros.
struct Plan {
  int batch, in_rows, in_columns, in_channels, out_rows, out_columns, out_channels, time_taps, freq_taps;
  int time_stride, freq_stride;
  bool matrix, winograd;
  int parts, taps;            // of the kernel; Winograd makes four parts of three time taps
  int in_size;                // input channels of a block
  int in_blocks, out_blocks;  // of in_size and of kOut channels
  int groups, shards;         // utterances, or pairs of them; tasks that sum over some groups each
  int rows, width;            // rows of the gradient at a time; columns of a buffered row of x (of a phase)
  int columns;                // of a buffered row of the gradient
  int buffer_rows;            // rows of x that so many rows of the gradient meet
  size_t x_row, gradient_row, x_block, gradient_block;  // units in the buffers
  size_t shard_size;          // sums of one shard: [out block, in block, tap, in_size, kOut]
};

Plan make_plan(ffi::Span<const int64_t> x, ffi::Span<const int64_t> gradient, ffi::Span<const int64_t> kernel,
               int time_stride, int freq_stride, int pair, int64_t threads) {
  Plan p{};
  p.batch = x[0], p.in_rows = x[1], p.in_columns = x[2], p.in_channels = x[3];
  p.out_rows = gradient[1], p.out_columns = gradient[2], p.out_channels = gradient[3];
  p.time_taps = kernel[0], p.freq_taps = kernel[1], p.time_stride = time_stride, p.freq_stride = freq_stride;
  p.matrix = pair == 2 && p.in_channels % (2 * kTileRows) == 0 && have_matrix_tiles();
  p.winograd = pair == 1 && use_winograd(p.time_taps, time_stride, p.in_channels);
  p.parts = p.winograd ? 4 : p.time_taps, p.taps = p.parts * p.freq_taps;
  p.in_size = p.matrix ? 2 * kTileRows : kIn;
  p.in_blocks = divide_up(p.in_channels, p.in_size), p.out_blocks = divide_up(p.out_channels, kOut);
  p.groups = divide_up(p.batch, pair);
  p.shards = std::min<int64_t>(p.groups, threads);
  p.columns = p.matrix ? divide_up(p.out_columns, kTileUnits) * kTileUnits : p.out_columns;
  const int most_rows = std::max(2, 640 / p.columns) & ~1, chunks = divide_up(p.out_rows, most_rows);
  p.rows = (divide_up(p.out_rows, chunks) + 1) & ~1;
  p.width = std::max((p.out_columns - 1) * freq_stride + p.freq_taps, p.in_columns + p.freq_taps / 2);
  p.buffer_rows = (p.rows - 1) * time_stride + p.time_taps;
  if (p.matrix) p.width = divide_up(p.columns + (p.freq_taps - 1) / freq_stride, kTileUnits) * kTileUnits;
  p.x_row = size_t(p.width) * p.in_size * (p.matrix ? freq_stride : 1), p.gradient_row = size_t(p.columns) * kOut;
  p.x_block = (p.buffer_rows + (p.winograd ? 2 * p.rows : 0)) * p.x_row;
  p.gradient_block = (p.winograd ? 3 : 1) * p.rows * p.gradient_row;
  p.shard_size = size_t(p.out_blocks) * p.in_blocks * p.taps * p.in_size * kOut;
  return p;
}

// The utterances of one group: one, or a pair, of which the second is silent where the batch is odd.
template <class Type>
struct Group {
  using Element = typename Type::Element;
  int low;
  bool alone;
  const Element* silence;

  // The places `at` in both utterances of an array that has `size` elements an utterance.
  std::pair<const Element*, const Element*> rows(const Element* base, size_t size, size_t at) const {
    const Element* first = base + low * size + at;
    return {first, alone ? silence : Type::kPair == 2 ? first + size : first};
  }
};

// Packs the rows of x that gradient rows from `top` on meet, with the zeros around them.
template <class Type>
void pack_x(const Plan& p, const Group<Type>& group, const typename Type::Element* x, int top, int count,
            Unit* buffer) {
  const int left = p.freq_taps / 2;
  const size_t row_size = size_t(p.in_columns) * p.in_channels;
  for (int r = 0; r < (count - 1) * p.time_stride + p.time_taps; ++r) {
    const int row = top * p.time_stride - p.time_taps / 2 + r;
    Unit* to = buffer + r * p.x_row;
    const bool real = row >= 0 && row < p.in_rows;
    for (int block = 0; block < p.in_blocks; ++block) {
      Unit* start = to + block * p.x_block;
      std::fill(start, start + (real ? left : p.width) * kIn, 0);
      if (real) std::fill(start + (left + p.in_columns) * kIn, start + p.width * kIn, 0);
    }
    if (!real) continue;
    auto [a, b] = group.rows(x, p.in_rows * row_size, row * row_size);
    pack_row<Type, kIn>(a, b, p.in_columns, p.in_channels, to + left * kIn, p.x_block);
  }
}

#if defined(KMQ_MATRIX_TILES)
// Turns 16 vectors of 16 lanes. Each round moves the highest bit of [vector, lane] to the end; after four, they are
// [lane, vector].
inline void transpose(Bits (&block)[kTileUnits]) {
  const Bits low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  for (int round = 0; round < 4; ++round) {
    Bits next[kTileUnits];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i a = (__m512i)block[i], b = (__m512i)block[i + 8];
      next[2 * i] = (Bits)_mm512_permutex2var_epi32(a, (__m512i)low, b);
      next[2 * i + 1] = (Bits)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
    std::memcpy(block, next, sizeof(block));
  }
}

// `pack_x` for matrix tiles.
void pack_x_by_matrix(const Plan& p, const Group<Bfloat16>& group, const Bf16* x, int top, int count, Unit* buffer) {
  const size_t row_size = size_t(p.in_columns) * p.in_channels;
  for (int r = 0; r < (count - 1) * p.time_stride + p.time_taps; ++r) {
    const int row = top * p.time_stride - p.time_taps / 2 + r;
    const bool real = row >= 0 && row < p.in_rows;
    auto [low, high] = group.rows(x, p.in_rows * row_size, real ? row * row_size : 0);
    for (int phase = 0; phase < p.freq_stride; ++phase)
      for (int channel = 0; channel < p.in_channels; channel += kTileRows)
        for (int first = 0; first < p.width; first += kTileUnits) {
          Bits block[kTileUnits] = {};
          for (int i = 0; i < kTileUnits; ++i) {
            const int column = (first + i) * p.freq_stride + phase - p.freq_taps / 2;
            if (!real || column < 0 || column >= p.in_columns) continue;
            Halves a, b;
            std::memcpy(&a, low + size_t(column) * p.in_channels + channel, sizeof(a));
            std::memcpy(&b, high + size_t(column) * p.in_channels + channel, sizeof(b));
            block[i] = __builtin_convertvector(a, Bits) | __builtin_convertvector(b, Bits) << 16;
          }
          transpose(block);
          Unit* to = buffer + channel / p.in_size * p.x_block + r * p.x_row + first +
                     size_t(phase * p.in_size + channel % p.in_size) * p.width;
          for (int i = 0; i < kTileUnits; ++i) std::memcpy(to + size_t(i) * p.width, &block[i], sizeof(Bits));
        }
  }
}

// `add_products` by matrix tiles: 32 input channels by kOut output channels at a time.
void add_products_by_matrix(const Plan& p, int rows, const Unit* x_buffer, const Unit* gradient_buffer, float* sum,
                            bool begin) {
  MatrixTiles::see_memory(x_buffer);
  const size_t half = size_t(kTileRows) * p.width;
  for (int out = 0; out < p.out_blocks; ++out)
    for (int in = 0; in < p.in_blocks; ++in)
      for (int tap = 0; tap < p.taps; ++tap, sum += p.in_size * kOut) {
        const int freq_tap = tap % p.freq_taps;
        const Unit* from = x_buffer + in * p.x_block + tap / p.freq_taps * p.x_row +
                           size_t(freq_tap % p.freq_stride) * p.in_size * p.width + freq_tap / p.freq_stride;
        const Unit* with = gradient_buffer + out * p.gradient_block;
        float* second = sum + kTileRows * kOut;
        if (begin) {
          MatrixTiles::zero();
        } else {
          MatrixTiles::load(sum, second);
        }
        for (int row = 0; row < rows; ++row, from += p.time_stride * p.x_row)
          for (int column = 0; column < p.columns; column += kTileUnits, with += kTileUnits * kOut)
            MatrixTiles::multiply_add(from + column, from + half + column, p.width, with);
        MatrixTiles::store(sum, second);
      }
}
#endif

// Replaces `count` rows of the gradient and the rows of x that they meet by Winograd's combinations, which stand behind
// them in the buffers.
template <class Type>
void combine_rows(const Plan& p, int real_rows, int count, Unit* x_buffer, Unit* gradient_buffer) {
  for (int block = 0; block < p.out_blocks; ++block) {
    Unit* rows = gradient_buffer + block * p.gradient_block;
    if (count > real_rows) std::fill(rows + real_rows * p.gradient_row, rows + count * p.gradient_row, 0);
    winograd_gradient_rows(rows, p.gradient_row, count / 2, rows + p.rows * p.gradient_row);
  }
  for (int block = 0; block < p.in_blocks; ++block)
    for (int pair = 0; pair < count / 2; ++pair) {
      Unit* rows = x_buffer + block * p.x_block;
      winograd_rows<Type>(rows + 2 * pair * p.x_row, p.x_row, p.x_row, rows + (p.buffer_rows + 4 * pair) * p.x_row);
    }
}

// Adds the products of `count` buffered rows to all sums of a shard.
template <class Type>
void add_products(const Plan& p, int count, const Unit* x_buffer, const Unit* gradient_buffer, Vector* sum,
                  bool begin) {
  const int x_first = p.winograd ? p.buffer_rows : 0, rows = p.winograd ? count / 2 : count;
  for (int out = 0; out < p.out_blocks; ++out)
    for (int in = 0; in < p.in_blocks; ++in)
      for (int tap = 0; tap < p.taps; ++tap, sum += kIn * 2) {
        const int part = tap / p.freq_taps, freq_tap = tap % p.freq_taps;
        const int gradient_first = p.winograd ? p.rows + part * rows : 0;
        const Unit* from = x_buffer + in * p.x_block + (x_first + part) * p.x_row + freq_tap * kIn;
        const Unit* with = gradient_buffer + out * p.gradient_block + gradient_first * p.gradient_row;
        kernel_gradient_tile<Type>(from, (p.winograd ? 4 : p.time_stride) * p.x_row, p.freq_stride * kIn,
                                   reinterpret_cast<const Bits*>(with), rows, p.out_columns, sum, begin);
      }
}

// Sums over the groups of one shard.
template <class Type>
void sum_shard(const Plan& p, const typename Type::Element* x, const typename Type::Element* gradient,
               const typename Type::Element* silence, int shard, float* sums) {
  Unit* x_buffer = scratch<1>(p.in_blocks * p.x_block + p.out_blocks * p.gradient_block + kLanes);
  Unit* gradient_buffer = x_buffer + (p.in_blocks * p.x_block + kLanes - 1) / kLanes * kLanes;
  const size_t row_size = size_t(p.out_columns) * p.out_channels;
#if defined(KMQ_MATRIX_TILES)
  std::optional<MatrixTiles> tiles;
  if (p.matrix) tiles.emplace(kTileRows);
#endif
  bool begin = true;
  for (int g = p.groups * shard / p.shards; g < p.groups * (shard + 1) / p.shards; ++g) {
    const int low = g * Type::kPair;
    const Group<Type> group{low, Type::kPair == 2 && low + 1 == p.batch, silence};
    for (int top = 0; top < p.out_rows; top += p.rows) {
      const int real_rows = std::min(p.rows, p.out_rows - top);
      const int count = p.winograd ? real_rows + real_rows % 2 : real_rows;
      for (int r = 0; r < real_rows; ++r) {
        auto [a, b] = group.rows(gradient, p.out_rows * row_size, (top + r) * row_size);
        pack_row<Type, kOut>(a, b, p.out_columns, p.out_channels, gradient_buffer + r * p.gradient_row,
                             p.gradient_block);
        for (int block = 0; block < p.out_blocks; ++block) {
          Unit* row = gradient_buffer + block * p.gradient_block + r * p.gradient_row;
          std::fill(row + p.out_columns * kOut, row + p.gradient_row, 0);
        }
      }
#if defined(KMQ_MATRIX_TILES)
      if constexpr (Type::kPair == 2) {
        if (p.matrix) {
          pack_x_by_matrix(p, group, x, top, count, x_buffer);
          add_products_by_matrix(p, count, x_buffer, gradient_buffer, sums, begin);
          begin = false;
          continue;
        }
      }
#endif
      pack_x<Type>(p, group, x, top, count, x_buffer);
      if (p.winograd) combine_rows<Type>(p, real_rows, count, x_buffer, gradient_buffer);
      add_products<Type>(p, count, x_buffer, gradient_buffer, reinterpret_cast<Vector*>(sums), begin);
      begin = false;
    }
  }
}

// Adds the shards up, for one tap in frequency and one block of input channels, and undoes Winograd's combinations.
void add_shards(const Plan& p, const float* sums, int freq_tap, int in, float* result) {
  const size_t part_step = size_t(p.freq_taps) * p.in_size * kOut;
  const size_t tap_step = size_t(p.freq_taps) * p.in_channels * p.out_channels;
  for (int c = 0; c < std::min(p.in_size, p.in_channels - in * p.in_size); ++c)
    for (int out = 0; out < p.out_blocks; ++out) {
      const float* from = sums + (((size_t(out) * p.in_blocks + in) * p.taps + freq_tap) * p.in_size + c) * kOut;
      float* to = result + (size_t(freq_tap) * p.in_channels + in * p.in_size + c) * p.out_channels + out * kOut;
      for (int n = 0; n < std::min(kOut, p.out_channels - out * kOut); ++n) {
        auto total = [&](int part) {
          float value = 0;
          for (int shard = 0; shard < p.shards; ++shard) value += from[shard * p.shard_size + part * part_step + n];
          return value;
        };
        if (p.winograd) {
          const float m1 = total(1), m2 = total(2);
          to[n] = total(0) + 0.5f * (m1 + m2), to[tap_step + n] = 0.5f * (m1 - m2);
          to[2 * tap_step + n] = 0.5f * (m1 + m2) + total(3);
        } else {
          for (int part = 0; part < p.parts; ++part) to[part * tap_step + n] = total(part);
        }
      }
    }
}

template <class Type>
void kernel_gradient(ffi::ThreadPool pool, const Plan& p, const typename Type::Element* x,
                     const typename Type::Element* gradient, float* result) {
  float* sums = reinterpret_cast<float*>(scratch<0>(p.shards * p.shard_size));
  const std::vector<typename Type::Element> silence(
      Type::kPair == 2 ? size_t(std::max(p.in_columns * p.in_channels, p.out_columns * p.out_channels)) : 0);
  parallel(pool, p.shards, [&](int64_t shard) {
    sum_shard<Type>(p, x, gradient, silence.data(), shard, sums + shard * p.shard_size);
  });
  parallel(pool, p.freq_taps * p.in_blocks,
           [&](int64_t task) { add_shards(p, sums, task / p.in_blocks, task % p.in_blocks, result); });
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gradient,
               ffi::Result<ffi::Buffer<ffi::F32>> result, int64_t time_stride, int64_t freq_stride) {
  auto run_as = [&](auto type) {
    using Type = decltype(type);
    using Element = typename Type::Element;
    const Plan plan = make_plan(x.dimensions(), gradient.dimensions(), result->dimensions(), time_stride, freq_stride,
                                Type::kPair, pool.num_threads());
    kernel_gradient<Type>(pool, plan, static_cast<const Element*>(x.untyped_data()),
                          static_cast<const Element*>(gradient.untyped_data()), result->typed_data());
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32 && gradient.element_type() == ffi::F32) return run_as(Float32{});
  if (x.element_type() == ffi::BF16 && gradient.element_type() == ffi::BF16) return run_as(Bfloat16{});
  return ffi::Error::InvalidArgument("input and gradient must both be float32 or both be bfloat16");
}

}  // namespace
}  // namespace kmq

XLA_FFI_DEFINE_HANDLER_SYMBOL(KernelGradient, kmq::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("time_stride")
                                  .Attr<int64_t>("freq_stride"));

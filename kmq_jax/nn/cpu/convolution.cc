// Two-dimensional convolution, and its input gradient, by tiles whose sums stay in registers.

#include "common.h"
#include "winograd.h"

namespace kmq {
namespace {

// One axis of a convolution, or of one phase of a strided input gradient:
// output[first + u * out_step] sums input[u * in_step + offset] * kernel[tap] over (tap, offset).
struct Axis {
  int outputs, first, out_step, in_step;
  std::vector<std::pair<int, int>> taps;
};

std::vector<Axis> forward_axis(int outputs, int taps, int stride) {
  Axis axis{outputs, 0, 1, stride, {}};
  for (int tap = 0; tap < taps; ++tap) axis.taps.push_back({tap, tap - taps / 2});
  return {axis};
}
std::vector<Axis> input_gradient_axis(int outputs, int taps, int stride) {
  std::vector<Axis> phases;
  for (int phase = 0; phase < std::min(stride, outputs); ++phase) {
    Axis axis{divide_up(outputs - phase, stride), phase, stride, 1, {}};
    for (int tap = 0; tap < taps; ++tap) {
      int distance = phase + taps / 2 - tap;
      if (distance % stride == 0) axis.taps.push_back({tap, distance / stride});
    }
    phases.push_back(axis);
  }
  return phases;
}
// First and one past the last input that outputs [begin, end) of these phases read.
std::pair<int, int> reads(const std::vector<Axis>& phases, int begin, int end) {
  int low = 1 << 30, high = -(1 << 30);
  for (const Axis& axis : phases)
    for (auto [tap, offset] : axis.taps) {
      low = std::min(low, begin * axis.in_step + offset);
      high = std::max(high, (end - 1) * axis.in_step + offset + 1);
    }
  return {low, high};
}

// The inputs and kernels that one tile of outputs sums over: `count` taps of `units` each. Neighbouring outputs read
// inputs `step` apart.
struct Taps {
  std::vector<int> offsets;
  std::vector<const Bits*> kernels;
  int units, step;
};

// Sums kOut channels of kTile outputs in registers, over taps [begin, end) and all input channels.
template <class Type, int kTile>
inline void accumulate(const Unit* in, const Taps& taps, int begin, int end, Vector (&result)[kTile][2]) {
  Vector sum[kTile][2] = {};
  const int units = taps.units, step = taps.step;
  for (int tap = begin; tap < end; ++tap) {
    const Unit* from = in + taps.offsets[tap];
    const Bits* kernel = taps.kernels[tap];
    for (int c = 0; c < units; ++c) {
      Bits low = kernel[2 * c], high = kernel[2 * c + 1];
#pragma GCC unroll 16
      for (int n = 0; n < kTile; ++n) {
        Bits value = splat(from[n * step + c]);
        sum[n][0] = multiply_add<Type::kPair>(sum[n][0], value, low);
        sum[n][1] = multiply_add<Type::kPair>(sum[n][1], value, high);
      }
    }
  }
  std::memcpy(result, sum, sizeof(sum));
}

template <class Element, int kTile>
inline void store_tile(const Vector (&sum)[kTile][2], Element* out, int out_step, int channels) {
  for (int n = 0; n < kTile; ++n) {
    store(out + n * out_step, sum[n][0], std::min(channels, kLanes));
    if (channels > kLanes) store(out + n * out_step + kLanes, sum[n][1], std::min(channels - kLanes, kLanes));
  }
}

// Computes one tile of a row, or, by Winograd's F(2, 3), of two rows; then the taps are in four equal parts.
template <class Type, int kTile>
void convolution_tile(const Unit* in, const Taps& taps, typename Type::Element* out, typename Type::Element* next_row,
                      int out_step, int channels, bool winograd) {
  const int count = taps.offsets.size();
  Vector sum[kTile][2];
  if (!winograd) {
    accumulate<Type>(in, taps, 0, count, sum);
    return store_tile(sum, out, out_step, channels);
  }
  Vector first[kTile][2], second[kTile][2];
  auto add = [&sum](Vector(&total)[kTile][2], float sign) {
    for (int n = 0; n < kTile; ++n) total[n][0] += sign * sum[n][0], total[n][1] += sign * sum[n][1];
  };
  accumulate<Type>(in, taps, 0, count / 4, first);
  accumulate<Type>(in, taps, count / 4, count / 2, second);
  std::memcpy(sum, second, sizeof(sum)), add(first, 1);
  accumulate<Type>(in, taps, count / 2, count / 4 * 3, sum), add(first, 1), add(second, -1);
  accumulate<Type>(in, taps, count / 4 * 3, count, sum), add(second, -1);
  store_tile(first, out, out_step, channels);
  if (next_row) store_tile(second, next_row, out_step, channels);
}
template <class Type, int kTile = kMaxTile, class... Args>
void convolution_tiles(int tile, Args&&... args) {
  if constexpr (kTile > 0) {
    if (tile == kTile) return convolution_tile<Type, kTile>(args...);
    convolution_tiles<Type, kTile - 1>(tile, args...);
  }
}

// Everything about one call but its data. In an input gradient (`transposed`) input and output change places.
struct Plan {
  int batch, in_rows, in_columns, in_channels, out_rows, out_columns, out_channels, time_taps, freq_taps;
  bool transposed, winograd;
  std::vector<Axis> time, freq;
  int parts, taps;          // of the kernel; Winograd makes four parts of three time taps
  int units, blocks;        // of the input channels; of kOut output channels each
  int matrix_rows;          // outputs of a matrix tile; 0: vectors compute
  size_t tap_units;         // units of one tap of one block
  int first_column, width;  // of a buffered row: the first column it holds, and how many
  int rows, chunks;         // rows of output in one task; tasks an utterance

  size_t row_units() const { return size_t(width) * units; }
};

Plan make_plan(ffi::Span<const int64_t> in, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> out,
               int time_stride, int freq_stride, bool transposed, int pair) {
  Plan p{};
  p.batch = in[0], p.in_rows = in[1], p.in_columns = in[2], p.in_channels = in[3];
  p.out_rows = out[1], p.out_columns = out[2], p.out_channels = out[3];
  p.time_taps = kernel[0], p.freq_taps = kernel[1], p.transposed = transposed;
  const auto make_axis = transposed ? input_gradient_axis : forward_axis;
  p.time = make_axis(p.out_rows, p.time_taps, time_stride);
  p.freq = make_axis(p.out_columns, p.freq_taps, freq_stride);
  p.units = divide_up(p.in_channels, pair), p.blocks = divide_up(p.out_channels, kOut);
  if (pair == 2 && p.units % kTileUnits == 0 && have_matrix_tiles()) {
    const int fewest = p.freq.back().outputs;  // of all phases: a tile must fit in each
    p.matrix_rows = divide_up(fewest, divide_up(fewest, kTileRows));
  }
  // Matrix tiles are so fast that fewer multiplications would save nothing.
  p.winograd = p.matrix_rows == 0 && use_winograd(p.time_taps, time_stride, p.in_channels);
  p.parts = p.winograd ? 4 : p.time_taps, p.taps = p.parts * p.freq_taps;
  p.tap_units = size_t(p.units) * kOut;
  const auto [first, end] = reads(p.freq, 0, p.freq[0].outputs);
  p.first_column = first, p.width = end - first;
  // As many rows as fit half a megabyte, at most 16.
  const int fit = (1 << 19) / (4 * p.width * p.units * p.time[0].in_step * (p.winograd ? 2 : 1));
  p.rows = std::min((std::max(fit - p.time_taps, 1) + 1) & ~1, 16);
  p.chunks = divide_up(p.time[0].outputs, p.rows);
  return p;
}

// Packs one tap of one block of output channels as [unit, kOut]; `task` counts blocks x taps.
template <class Type>
void pack_tap(const Plan& p, const typename Type::Element* kernel, int task, Unit* to) {
  using Element = typename Type::Element;
  const int block = task / p.taps, part = task % p.taps / p.freq_taps, freq_tap = task % p.freq_taps;
  const int in_channels = p.in_channels, units = p.units;
  const size_t channels = std::min(kOut, p.out_channels - block * kOut);
  const size_t in_step = p.transposed ? 1 : p.out_channels, out_step = p.transposed ? p.in_channels : 1;
  const size_t tap_step = size_t(p.in_channels) * p.out_channels, row_step = tap_step * p.freq_taps;
  const Element* from = kernel + freq_tap * tap_step + block * kOut * out_step;
  const float outer = part == 0 || part == 3 ? 1 : 0.5, inner = part == 1 ? 0.5 : part == 2 ? -0.5 : 0;
  for (int unit = 0; unit < units; ++unit, to += kOut, from += Type::kPair * in_step) {
    const bool has_high = Type::kPair * unit + 1 < in_channels;
    if (p.winograd) {
      // The input gradient convolves with the taps in reverse order.
      const Element *k0 = from + (p.transposed ? 2 * row_step : 0), *k1 = from + row_step,
                    *k2 = from + (p.transposed ? 0 : 2 * row_step);
      auto combined = [&](size_t at) {
        return (part != 3 ? outer * to_float(k0[at]) : 0) + inner * to_float(k1[at]) +
               (part != 0 ? outer * to_float(k2[at]) : 0);
      };
      for (size_t c = 0; c < channels; ++c) {
        if constexpr (Type::kPair == 1) {
          to[c] = single(combined(c * out_step));
        } else {
          to[c] = make_unit<Type>(rounded(combined(c * out_step)),
                                  has_high ? rounded(combined(c * out_step + in_step)) : Element{});
        }
      }
    } else {
      const Element* low = from + part * row_step;
      for (size_t c = 0; c < channels; ++c)
        to[c] = make_unit<Type>(low[c * out_step], has_high ? low[c * out_step + in_step] : Element{});
    }
    std::fill(to + channels, to + kOut, 0);
  }
}

// Copies one row of an utterance, with the zeros around it, as [column, unit].
template <class Type>
void copy_row(const Plan& p, const typename Type::Element* utterance, int row, Unit* to) {
  using Element = typename Type::Element;
  const int units = p.units, in_channels = p.in_channels, end_column = p.first_column + p.width;
  const int left = std::max(p.first_column, 0), right = std::min(end_column, p.in_columns);
  if (row < 0 || row >= p.in_rows || right <= left) {
    std::fill(to, to + p.row_units(), 0);
    return;
  }
  std::fill(to, to + (left - p.first_column) * units, 0);
  std::fill(to + (right - p.first_column) * units, to + p.row_units(), 0);
  to += (left - p.first_column) * units;
  const Element* from = utterance + (size_t(row) * p.in_columns + left) * in_channels;
  const size_t count = size_t(right - left) * in_channels;
  if (Type::kPair * units == in_channels && sizeof(Unit) == Type::kPair * sizeof(Element)) {
    std::memcpy(to, from, count * sizeof(Element));
  } else if (Type::kPair == 1) {
    for (size_t i = 0; i < count; ++i) to[i] = single(to_float(from[i]));
  } else {
    for (int column = left; column < right; ++column, from += in_channels)
      for (int c = 0; c < in_channels; c += 2, ++to)
        *to = make_unit<Type>(from[c], c + 1 < in_channels ? from[c + 1] : Element{});
  }
}

// The taps that one phase of the outputs sums over. Offsets count from the input of the chunk's first output.
Taps taps_of(const Plan& p, const Unit* packed, int block, const Axis& t, const Axis& f, int begin, int first_row) {
  Taps sums{{}, {}, p.units, f.in_step * p.units};
  auto add_row = [&](int part, int row) {
    for (auto [tap, freq_offset] : f.taps) {
      sums.offsets.push_back(row * int(p.row_units()) + (freq_offset - p.first_column) * p.units);
      const Unit* kernel = packed + (size_t(block * p.parts + part) * p.freq_taps + tap) * p.tap_units;
      sums.kernels.push_back(reinterpret_cast<const Bits*>(kernel));
    }
  };
  if (p.winograd) {
    for (int part = 0; part < 4; ++part) add_row(part, part);
  } else {
    for (auto [tap, time_offset] : t.taps) add_row(tap, begin * t.in_step + time_offset - first_row);
  }
  return sums;
}

// Computes one phase of one block of output rows [begin, last).
template <class Type>
void compute_rows(const Plan& p, const Taps& sums, const Unit* source, int block, const Axis& t, const Axis& f,
                  int begin, int last, typename Type::Element* utterance) {
  using Element = typename Type::Element;
  const int tiles = divide_up(f.outputs, kMaxTile), out_step = f.out_step * p.out_channels;
  const int channels = std::min(kOut, p.out_channels - block * kOut);
  const size_t row_units = p.row_units(), out_row_size = size_t(p.out_columns) * p.out_channels;
  for (int u = begin; u < std::min(last, t.outputs); u += p.winograd ? 2 : 1) {
    const Unit* in_row = source + size_t(u - begin) * (p.winograd ? 2 : t.in_step) * row_units;
    Element* out_row = utterance + size_t(f.first) * p.out_channels + block * kOut +
                       (t.first + size_t(u) * t.out_step) * out_row_size;
    Element* next_row = p.winograd && u + 1 < last ? out_row + out_row_size : nullptr;
    for (int tile = 0; tile < tiles; ++tile) {
      const int left = f.outputs * tile / tiles, size = f.outputs * (tile + 1) / tiles - left;
      convolution_tiles<Type>(size, in_row + size_t(left) * sums.step, sums, out_row + size_t(left) * out_step,
                              next_row ? next_row + size_t(left) * out_step : nullptr, out_step, channels, p.winograd);
    }
  }
}

#if defined(KMQ_MATRIX_TILES)
// The same by matrix tiles, of which two share the kernel that they read. The last tile of a row begins so early that
// it ends with the row.
void compute_rows_by_matrix(const Plan& p, const Taps& sums, const Unit* source, int block, const Axis& t,
                            const Axis& f, int begin, int last, Bf16* utterance) {
  const int tiles = divide_up(f.outputs, p.matrix_rows), count = (std::min(last, t.outputs) - begin) * tiles;
  const int channels = std::min(kOut, p.out_channels - block * kOut);
  const size_t out_row_size = size_t(p.out_columns) * p.out_channels, taps = sums.offsets.size();
  MatrixTiles::see_memory(source);
  for (int pair = 0; pair < count; pair += 2) {
    const Unit* in[2];
    Bf16* out[2];
    for (int i = 0; i < 2; ++i) {
      const int tile = std::min(pair + i, count - 1), row = tile / tiles;  // an odd last one is computed twice
      const size_t left = std::min(tile % tiles * p.matrix_rows, f.outputs - p.matrix_rows);
      in[i] = source + row * t.in_step * p.row_units() + left * sums.step;
      out[i] = utterance + (t.first + size_t(begin + row) * t.out_step) * out_row_size +
               (f.first + left * f.out_step) * p.out_channels + block * kOut;
    }
    MatrixTiles::zero();
    for (size_t tap = 0; tap < taps; ++tap)
      for (int c = 0; c < sums.units; c += kTileUnits) {
        const int at = sums.offsets[tap] + c;
        MatrixTiles::multiply_add(in[0] + at, in[1] + at, sums.step, sums.kernels[tap] + 2 * c);
      }
    Vector result[2][kTileRows][2];
    MatrixTiles::store(reinterpret_cast<float*>(result[0]), reinterpret_cast<float*>(result[1]));
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < p.matrix_rows; ++n)
        store_tile<Bf16, 1>({{result[i][n][0], result[i][n][1]}}, out[i] + size_t(n) * f.out_step * p.out_channels, 0,
                            channels);
  }
}
#endif

// One task: some rows of output of one utterance, all channels.
template <class Type>
void compute_chunk(const Plan& p, const Unit* packed, const typename Type::Element* input,
                   typename Type::Element* output, int begin) {
  const int last = std::min(begin + p.rows, p.time[0].outputs);
  const int end = p.winograd ? last + (last - begin) % 2 : last;
  const auto [first_row, end_row] = reads(p.time, begin, end);
  const size_t row_units = p.row_units();
  Unit* buffer = scratch<1>((end_row - first_row + (p.winograd ? 2 * (end - begin) : 0)) * row_units);
  for (int row = first_row; row < end_row; ++row)
    copy_row<Type>(p, input, row, buffer + (row - first_row) * row_units);
  const Unit* source = buffer;
  if (p.winograd) {
    Unit* combined = buffer + (end_row - first_row) * row_units;
    source = combined;
    for (int pair = 0; pair < (end - begin) / 2; ++pair)
      winograd_rows<Type>(buffer + 2 * pair * row_units, row_units, row_units, combined + 4 * pair * row_units);
  }
#if defined(KMQ_MATRIX_TILES)
  std::optional<MatrixTiles> tiles;
  if (p.matrix_rows) tiles.emplace(p.matrix_rows);
#endif
  for (int block = 0; block < p.blocks; ++block)
    for (const Axis& t : p.time)
      for (const Axis& f : p.freq) {
        const Taps sums = taps_of(p, packed, block, t, f, begin, first_row);
#if defined(KMQ_MATRIX_TILES)
        if constexpr (Type::kPair == 2) {
          if (tiles) {
            compute_rows_by_matrix(p, sums, source, block, t, f, begin, last, output);
            continue;
          }
        }
#endif
        compute_rows<Type>(p, sums, source, block, t, f, begin, last, output);
      }
}

template <class Type>
void convolve(ffi::ThreadPool pool, const Plan& p, const typename Type::Element* input,
              const typename Type::Element* kernel, typename Type::Element* output) {
  const int tasks = p.blocks * p.taps;
  Unit* packed = scratch<0>(tasks * p.tap_units);  // [block, part, freq tap, unit, kOut]
  parallel(pool, tasks, [&](int64_t task) { pack_tap<Type>(p, kernel, task, packed + task * p.tap_units); });
  const size_t in_size = size_t(p.in_rows) * p.in_columns * p.in_channels;
  const size_t out_size = size_t(p.out_rows) * p.out_columns * p.out_channels;
  parallel(pool, int64_t{p.batch} * p.chunks, [&](int64_t task) {
    const size_t utterance = task / p.chunks;
    const int begin = task % p.chunks * p.rows;
    compute_chunk<Type>(p, packed, input + utterance * in_size, output + utterance * out_size, begin);
  });
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer input, ffi::AnyBuffer kernel, ffi::Result<ffi::AnyBuffer> output,
               int64_t time_stride, int64_t freq_stride, bool transposed) {
  auto run_as = [&](auto type) {
    using Type = decltype(type);
    using Element = typename Type::Element;
    advise_huge_pages(output->untyped_data(), output->size_bytes());
    const Plan plan = make_plan(input.dimensions(), kernel.dimensions(), output->dimensions(), time_stride, freq_stride,
                                transposed, Type::kPair);
    convolve<Type>(pool, plan, static_cast<const Element*>(input.untyped_data()),
                   static_cast<const Element*>(kernel.untyped_data()), static_cast<Element*>(output->untyped_data()));
    return ffi::Error::Success();
  };
  if (input.element_type() == ffi::F32 && kernel.element_type() == ffi::F32) return run_as(Float32{});
  if (input.element_type() == ffi::BF16 && kernel.element_type() == ffi::BF16) return run_as(Bfloat16{});
  return ffi::Error::InvalidArgument("input and kernel must both be float32 or both be bfloat16");
}

}  // namespace
}  // namespace kmq

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution, kmq::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("time_stride")
                                  .Attr<int64_t>("freq_stride")
                                  .Attr<bool>("transposed"));

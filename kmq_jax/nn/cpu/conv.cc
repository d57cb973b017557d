// Two-dimensional convolution and its two gradients on a CPU, and the sums over positions that batch normalisation
// needs, called from JAX through XLA's foreign-function interface.
//
// Why: XLA's own weight gradient of large, early convolutions runs at a tenth of the machine's speed. These kernels run
// near its peak. nn/native.py compiles this file for the machine at hand and falls back to XLA where it cannot.
//
// Layout: activations [batch, time, freq, channel], kernels [time taps, freq taps, in, out], padding of taps / 2 on
// each side. Activations are float32 or bfloat16, sums are float32. The convolutions share one plan: copy a few
// zero-padded input rows into a buffer that stays in the second-level cache, then compute tiles whose sums stay in
// registers.
//
// A `Unit` is four bytes, what one lane of a vector holds: one float32, or (where the machine multiplies pairs of
// bfloat16) two bfloat16 neighbours along the axis that is summed over: channels in the convolution, utterances in the
// kernel gradient. So one set of loops serves both.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxTile = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kMaxTile = 6;
#else
constexpr int kLanes = 4, kMaxTile = 10;
#endif
constexpr int kOut = 2 * kLanes;           // output channels of a tile
constexpr int kIn = 8 < kMaxTile ? 8 : 6;  // input channels of a kernel-gradient tile

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
using Unit = uint32_t;
using Bf16 = uint16_t;

// What the element type of the activations means for the loops.
struct Float32 {
  using Element = float;
  static constexpr int kPair = 1;
};
struct Bfloat16 {
  using Element = Bf16;
#if defined(__AVX512BF16__)
  static constexpr int kPair = 2;
#else
  static constexpr int kPair = 1;
#endif
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline Unit single(float value) {
  Unit unit;
  std::memcpy(&unit, &value, 4);
  return unit;
}
template <class Type>
inline Unit make_unit(typename Type::Element low, typename Type::Element high) {
  if constexpr (Type::kPair == 2) return Unit{low} | Unit{high} << 16;
  return single(to_float(low));
}

// sum + a * b in each lane, over the pair where a unit is one.
template <int kPair>
inline Vector multiply_add(Vector sum, Bits a, Bits b) {
#if defined(__AVX512BF16__)
  if constexpr (kPair == 2) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + (Vector)a * (Vector)b;
}
inline Bits splat(Unit unit) { return unit - Bits{}; }

inline void store(float* out, Vector sum, int channels) { std::memcpy(out, &sum, 4 * channels); }
inline void store(Bf16* out, Vector sum, int channels) {
#if defined(__AVX512BF16__)
  Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)sum);
#else
  Bits bits = (Bits)sum;
  bits = (sum != sum) ? splat(0x7fc00000) : bits + 0x7fff + (bits >> 16 & 1);  // round to nearest even, keep NaN
  Halves halves = __builtin_convertvector(bits >> 16, Halves);
#endif
  std::memcpy(out, &halves, 2 * channels);
}

inline Bf16 rounded(float value) {
  Bf16 result;
  store(&result, Vector{value}, 1);
  return result;
}

inline Vector load(const float* from, int channels) {
  Vector value = {};
  std::memcpy(&value, from, 4 * channels);
  return value;
}
inline Vector load(const Bf16* from, int channels) {
  Halves halves = {};
  std::memcpy(&halves, from, 2 * channels);
  return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

// A buffer that each thread keeps, so that no call pays for fresh pages.
template <int kWhich>
Unit* scratch(size_t units) {
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (size < units) {
    size_t bytes = (units * sizeof(Unit) + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(4096, bytes));
    if (!buffer) throw std::bad_alloc();
    size = units;
  }
  return static_cast<Unit*>(buffer.get());
}

// Runs work(0) ... work(count - 1) on XLA's threads and on this one, which never waits for a task nobody has begun.
template <class Work>
void parallel(ffi::ThreadPool pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, &work] {
    for (int64_t task; (task = state->next.fetch_add(1)) < count;) {
      work(task);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_one();
      }
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), count); ++i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == count; });
}

// Asks for huge pages in the whole mapping that holds a large result: XLA takes its working memory anew for each step,
// and a step would otherwise pay for some hundred thousand page faults. This is advice only, and given once a step.
void advise_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kHuge = 2 << 20;
  const uintptr_t address = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  unsigned char resident = 0;
  if (bytes < 4 * kHuge || sysconf(_SC_PAGESIZE) != kPage) return;
  if (mincore(reinterpret_cast<void*>(address), kPage, &resident) != 0 || (resident & 1)) return;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin, end;
    if (std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) == 2 && begin <= address && address < end) {
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
      return;
    }
  }
#endif
}

// One axis of a convolution, or of one phase of a strided input gradient:
// output[first + u * out_step] sums input[u * in_step + offset] * kernel[tap] over (tap, offset).
struct Axis {
  int outputs, first, out_step, in_step;
  std::vector<std::pair<int, int>> taps;
};
int divide_up(int a, int b) { return (a + b - 1) / b; }

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

// Winograd's F(2, 3) along time saves a third of the multiplications of three taps: of two rows of output
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3,  where
//   m0 = (d0 - d2) k0,  m1 = (d1 + d2) (k0 + k1 + k2) / 2,  m2 = (d2 - d1) (k0 - k1 + k2) / 2,  m3 = (d1 - d3) k2.
// Pairs of bfloat16 hold the combinations rounded to bfloat16, an error like that of the activations themselves.
bool use_winograd(int time_taps, int time_stride, int in_channels) {
  return in_channels >= 8 && time_taps == 3 && time_stride == 1;
}
// The four combinations of four rows d0 ... d3 of `size` units, `step` apart in `to`.
template <class Type>
void winograd_rows(const Unit* rows, size_t size, size_t step, Unit* to) {
  if constexpr (Type::kPair == 2) {
    const Bf16* d = reinterpret_cast<const Bf16*>(rows);
    Bf16* t = reinterpret_cast<Bf16*>(to);
    size *= 2, step *= 2;
    auto combine = [&](size_t i, int count) {
      const Vector d0 = load(d + i, count), d1 = load(d + size + i, count), d2 = load(d + 2 * size + i, count),
                   d3 = load(d + 3 * size + i, count);
      store(t + i, d0 - d2, count), store(t + step + i, d1 + d2, count);
      store(t + 2 * step + i, d2 - d1, count), store(t + 3 * step + i, d1 - d3, count);
    };
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) combine(i, kLanes);
    if (i < size) combine(i, size - i);
    return;
  }
  const float* d = reinterpret_cast<const float*>(rows);
  float* t = reinterpret_cast<float*>(to);
  for (size_t i = 0; i < size; ++i) t[i] = d[i] - d[2 * size + i];
  for (size_t i = 0; i < size; ++i) t[step + i] = d[size + i] + d[2 * size + i];
  for (size_t i = 0; i < size; ++i) t[2 * step + i] = d[2 * size + i] - d[size + i];
  for (size_t i = 0; i < size; ++i) t[3 * step + i] = d[size + i] - d[3 * size + i];
}

// What goes with them in the kernel gradient: e0, e0 + e1, e0 - e1 and -e1 of each pair of rows; [part, pair, size].
void winograd_gradient_rows(const Unit* rows, size_t size, int pairs, Unit* to) {
  float* t = reinterpret_cast<float*>(to);
  const size_t step = pairs * size;
  for (int pair = 0; pair < pairs; ++pair, t += size) {
    const float *e0 = reinterpret_cast<const float*>(rows) + 2 * pair * size, *e1 = e0 + size;
    for (size_t i = 0; i < size; ++i) {
      const float first = e0[i], second = e1[i];
      t[i] = first, t[step + i] = first + second, t[2 * step + i] = first - second, t[3 * step + i] = -second;
    }
  }
}

// The convolution (transposed = false), or its input gradient, in which input and output change places.
template <class Type>
void convolve(ffi::ThreadPool pool, const typename Type::Element* input, const typename Type::Element* kernel,
              typename Type::Element* output, ffi::Span<const int64_t> in_dims, ffi::Span<const int64_t> kernel_dims,
              ffi::Span<const int64_t> out_dims, int time_stride, int freq_stride, bool transposed) {
  using Element = typename Type::Element;
  const int batch = in_dims[0], in_rows = in_dims[1], in_columns = in_dims[2], in_channels = in_dims[3];
  const int out_rows = out_dims[1], out_columns = out_dims[2], out_channels = out_dims[3];
  const int time_taps = kernel_dims[0], freq_taps = kernel_dims[1];
  auto make_axis = transposed ? input_gradient_axis : forward_axis;
  const std::vector<Axis> time = make_axis(out_rows, time_taps, time_stride);
  const std::vector<Axis> freq = make_axis(out_columns, freq_taps, freq_stride);

  const bool winograd = use_winograd(time_taps, time_stride, in_channels);
  const int parts = winograd ? 4 : time_taps, taps = parts * freq_taps;
  const int units = divide_up(in_channels, Type::kPair), blocks = divide_up(out_channels, kOut);
  const size_t tap_units = size_t(units) * kOut;
  Unit* packed = scratch<0>(blocks * taps * tap_units);  // [block, part, freq tap, unit, kOut]
  parallel(pool, blocks * taps, [&](int64_t task) {
    const int block = task / taps, part = task % taps / freq_taps, freq_tap = task % freq_taps;
    const int channels = std::min(kOut, out_channels - block * kOut);
    const size_t in_step = transposed ? 1 : out_channels, out_step = transposed ? in_channels : 1;
    const size_t tap_step = size_t(in_channels) * out_channels, row_step = tap_step * freq_taps;
    const Element* from = kernel + freq_tap * tap_step + block * kOut * out_step;
    Unit* to = packed + task * tap_units;
    for (int unit = 0; unit < units; ++unit, to += kOut, from += Type::kPair * in_step) {
      const bool has_high = Type::kPair * unit + 1 < in_channels;
      if (winograd) {
        // The input gradient convolves with the taps in reverse order.
        const Element *k0 = from + (transposed ? 2 * row_step : 0), *k1 = from + row_step,
                      *k2 = from + (transposed ? 0 : 2 * row_step);
        const float outer = part == 0 || part == 3 ? 1 : 0.5, inner = part == 1 ? 0.5 : part == 2 ? -0.5 : 0;
        auto combined = [&](size_t at) {
          return (part != 3 ? outer * to_float(k0[at]) : 0) + inner * to_float(k1[at]) +
                 (part != 0 ? outer * to_float(k2[at]) : 0);
        };
        for (size_t c = 0; c < size_t(channels); ++c) {
          if constexpr (Type::kPair == 1) {
            to[c] = single(combined(c * out_step));
          } else {
            to[c] = make_unit<Type>(rounded(combined(c * out_step)),
                                    has_high ? rounded(combined(c * out_step + in_step)) : Element{});
          }
        }
      } else {
        const Element* low = from + part * row_step;
        for (size_t c = 0; c < size_t(channels); ++c)
          to[c] = make_unit<Type>(low[c * out_step], has_high ? low[c * out_step + in_step] : Element{});
      }
      std::fill(to + channels, to + kOut, 0);
    }
  });

  const auto [first_column, end_column] = reads(freq, 0, freq[0].outputs);
  const int width = end_column - first_column;
  // Rows in one task: as many as fit half a megabyte, at most 16.
  const int fit = (1 << 19) / (4 * width * units * time[0].in_step * (winograd ? 2 : 1));
  const int rows = std::min((std::max(fit - time_taps, 1) + 1) & ~1, 16), chunks = divide_up(time[0].outputs, rows);
  parallel(pool, int64_t{batch} * chunks, [&](int64_t task) {
    const int utterance = task / chunks, begin = task % chunks * rows, last = std::min(begin + rows, time[0].outputs);
    const int end = winograd ? last + (last - begin) % 2 : last;
    const auto [first_row, end_row] = reads(time, begin, end);
    const size_t row_units = size_t(width) * units;
    Unit* buffer = scratch<1>((end_row - first_row + (winograd ? 2 * (end - begin) : 0)) * row_units);
    for (int row = first_row; row < end_row; ++row) {
      Unit* to = buffer + (row - first_row) * row_units;
      const int left = std::max(first_column, 0), right = std::min(end_column, in_columns);
      if (row < 0 || row >= in_rows || right <= left) {
        std::fill(to, to + row_units, 0);
        continue;
      }
      std::fill(to, to + (left - first_column) * units, 0);
      std::fill(to + (right - first_column) * units, to + row_units, 0);
      to += (left - first_column) * units;
      const Element* from = input + ((size_t(utterance) * in_rows + row) * in_columns + left) * in_channels;
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
    const Unit* source = buffer;
    if (winograd) {
      Unit* combined = buffer + (end_row - first_row) * row_units;
      source = combined;
      for (int pair = 0; pair < (end - begin) / 2; ++pair)
        winograd_rows<Type>(buffer + 2 * pair * row_units, row_units, row_units, combined + 4 * pair * row_units);
    }
    Taps sums;
    sums.units = units;
    for (int block = 0; block < blocks; ++block)
      for (const Axis& t : time)
        for (const Axis& f : freq) {
          sums.offsets.clear(), sums.kernels.clear(), sums.step = f.in_step * units;
          auto add_row = [&](int part, int row) {
            for (auto [tap, freq_offset] : f.taps) {
              sums.offsets.push_back(row * int(row_units) + (freq_offset - first_column) * units);
              sums.kernels.push_back(
                  reinterpret_cast<const Bits*>(packed + (size_t(block * parts + part) * freq_taps + tap) * tap_units));
            }
          };
          if (winograd) {
            for (int part = 0; part < 4; ++part) add_row(part, part);
          } else {
            for (auto [tap, time_offset] : t.taps) add_row(tap, begin * t.in_step + time_offset - first_row);
          }
          const int tiles = divide_up(f.outputs, kMaxTile), out_step = f.out_step * out_channels;
          for (int u = begin; u < std::min(last, t.outputs); u += winograd ? 2 : 1) {
            const Unit* in_row = source + size_t(u - begin) * (winograd ? 2 : t.in_step) * row_units;
            Element* out_row =
                output + size_t(f.first) * out_channels + block * kOut +
                (size_t(utterance) * out_rows + t.first + size_t(u) * t.out_step) * out_columns * out_channels;
            Element* next_row = winograd && u + 1 < last ? out_row + size_t(out_columns) * out_channels : nullptr;
            for (int tile = 0; tile < tiles; ++tile) {
              const int left = f.outputs * tile / tiles, size = f.outputs * (tile + 1) / tiles - left;
              convolution_tiles<Type>(size, in_row + size_t(left) * sums.step, sums, out_row + size_t(left) * out_step,
                                      next_row ? next_row + size_t(left) * out_step : nullptr, out_step,
                                      std::min(kOut, out_channels - block * kOut), winograd);
            }
          }
        }
  });
}

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

template <class Type>
void kernel_gradient(ffi::ThreadPool pool, const typename Type::Element* x, const typename Type::Element* gradient,
                     float* result, ffi::Span<const int64_t> x_dims, ffi::Span<const int64_t> gradient_dims,
                     ffi::Span<const int64_t> kernel_dims, int time_stride, int freq_stride) {
  using Element = typename Type::Element;
  const int batch = x_dims[0], in_rows = x_dims[1], in_columns = x_dims[2], in_channels = x_dims[3];
  const int out_rows = gradient_dims[1], out_columns = gradient_dims[2], out_channels = gradient_dims[3];
  const int time_taps = kernel_dims[0], freq_taps = kernel_dims[1];
  const bool winograd = Type::kPair == 1 && use_winograd(time_taps, time_stride, in_channels);
  const int parts = winograd ? 4 : time_taps, taps = parts * freq_taps;
  const int in_blocks = divide_up(in_channels, kIn), out_blocks = divide_up(out_channels, kOut);
  const int groups = divide_up(batch, Type::kPair);  // an utterance, or a pair
  const int shards = std::min<int64_t>(groups, pool.num_threads());
  const int most_rows = std::max(2, 640 / out_columns) & ~1, chunks = divide_up(out_rows, most_rows);
  const int rows = (divide_up(out_rows, chunks) + 1) & ~1;
  const int width = std::max((out_columns - 1) * freq_stride + freq_taps, in_columns + freq_taps / 2);
  const int buffer_rows = (rows - 1) * time_stride + time_taps;
  const size_t x_row = size_t(width) * kIn, gradient_row = size_t(out_columns) * kOut;
  const size_t x_block = (buffer_rows + (winograd ? 2 * rows : 0)) * x_row,
               gradient_block = (winograd ? 3 : 1) * rows * gradient_row;
  const size_t shard_size = size_t(out_blocks) * in_blocks * taps * kIn * kOut;
  // [shard, out block, in block, tap, kIn, kOut]
  float* sums = reinterpret_cast<float*>(scratch<0>(shards * shard_size));
  const std::vector<Element> silence(
      Type::kPair == 2 ? size_t(std::max(in_columns * in_channels, out_columns * out_channels)) : 0);

  parallel(pool, shards, [&](int64_t shard) {
    Unit* x_buffer = scratch<1>(in_blocks * x_block + out_blocks * gradient_block + kLanes);
    Unit* gradient_buffer = x_buffer + (in_blocks * x_block + kLanes - 1) / kLanes * kLanes;
    bool begin = true;
    for (int group = groups * shard / shards; group < groups * (shard + 1) / shards; ++group) {
      const int low = group * Type::kPair;
      const bool alone = Type::kPair == 2 && low + 1 == batch;
      auto pair = [&](const Element* base, size_t size, size_t at) {
        const Element* first = base + low * size + at;
        return std::make_pair(first, alone ? silence.data() : Type::kPair == 2 ? first + size : first);
      };
      for (int top = 0; top < out_rows; top += rows) {
        const int real_rows = std::min(rows, out_rows - top), count = winograd ? real_rows + real_rows % 2 : real_rows;
        for (int r = 0; r < (count - 1) * time_stride + time_taps; ++r) {
          const int row = top * time_stride - time_taps / 2 + r, left = freq_taps / 2;
          Unit* to = x_buffer + r * x_row;
          const bool real = row >= 0 && row < in_rows;
          for (int block = 0; block < in_blocks; ++block) {
            Unit* start = to + block * x_block;
            std::fill(start, start + (real ? left : width) * kIn, 0);
            if (real) std::fill(start + (left + in_columns) * kIn, start + width * kIn, 0);
          }
          if (!real) continue;
          auto [a, b] = pair(x, size_t(in_rows) * in_columns * in_channels, size_t(row) * in_columns * in_channels);
          pack_row<Type, kIn>(a, b, in_columns, in_channels, to + left * kIn, x_block);
        }
        for (int r = 0; r < real_rows; ++r) {
          auto [a, b] = pair(gradient, size_t(out_rows) * out_columns * out_channels,
                             size_t(top + r) * out_columns * out_channels);
          pack_row<Type, kOut>(a, b, out_columns, out_channels, gradient_buffer + r * gradient_row, gradient_block);
        }
        if (winograd) {
          for (int block = 0; block < out_blocks; ++block) {
            Unit* rows_of = gradient_buffer + block * gradient_block;
            if (count > real_rows) std::fill(rows_of + real_rows * gradient_row, rows_of + count * gradient_row, 0);
            winograd_gradient_rows(rows_of, gradient_row, count / 2, rows_of + rows * gradient_row);
          }
          for (int block = 0; block < in_blocks; ++block)
            for (int pair = 0; pair < count / 2; ++pair)
              winograd_rows<Type>(x_buffer + block * x_block + 2 * pair * x_row, x_row, x_row,
                            x_buffer + block * x_block + (buffer_rows + 4 * pair) * x_row);
        }
        Vector* sum = reinterpret_cast<Vector*>(sums + shard * shard_size);
        for (int out = 0; out < out_blocks; ++out)
          for (int in = 0; in < in_blocks; ++in)
            for (int tap = 0; tap < taps; ++tap, sum += kIn * 2) {
              const int part = tap / freq_taps, freq_tap = tap % freq_taps;
              const Unit* from =
                  x_buffer + in * x_block + ((winograd ? buffer_rows : 0) + part) * x_row + freq_tap * kIn;
              const Unit* with =
                  gradient_buffer + out * gradient_block + (winograd ? rows + part * (count / 2) : 0) * gradient_row;
              kernel_gradient_tile<Type>(from, (winograd ? 4 : time_stride) * x_row, freq_stride * kIn,
                                         reinterpret_cast<const Bits*>(with), winograd ? count / 2 : count, out_columns,
                                         sum, begin);
            }
        begin = false;
      }
    }
  });
  parallel(pool, freq_taps * in_blocks, [&](int64_t task) {
    const int freq_tap = task / in_blocks, in = task % in_blocks;
    const size_t part_step = size_t(freq_taps) * kIn * kOut, tap_step = size_t(freq_taps) * in_channels * out_channels;
    for (int c = 0; c < std::min(kIn, in_channels - in * kIn); ++c)
      for (int out = 0; out < out_blocks; ++out) {
        const float* from = sums + (((size_t(out) * in_blocks + in) * taps + freq_tap) * kIn + c) * kOut;
        float* to = result + (size_t(freq_tap) * in_channels + in * kIn + c) * out_channels + out * kOut;
        for (int n = 0; n < std::min(kOut, out_channels - out * kOut); ++n) {
          auto total = [&](int part) {
            float value = 0;
            for (int shard = 0; shard < shards; ++shard) value += from[shard * shard_size + part * part_step + n];
            return value;
          };
          if (winograd) {
            const float m1 = total(1), m2 = total(2);
            to[n] = total(0) + 0.5f * (m1 + m2), to[tap_step + n] = 0.5f * (m1 - m2);
            to[2 * tap_step + n] = 0.5f * (m1 + m2) + total(3);
          } else {
            for (int part = 0; part < parts; ++part) to[part * tap_step + n] = total(part);
          }
        }
      }
  });
}

// result[0][c] sums x[row][c], result[1][c] sums x[row][c] * y[row][c]: in float32 over a few rows, then in double.
template <class Element>
void channel_sums(ffi::ThreadPool pool, const Element* x, const Element* y, float* result, int64_t rows,
                  int channels) {
  constexpr int64_t kRows = 256;  // of one task
  const int64_t tasks = (rows + kRows - 1) / kRows;
  std::vector<float> sums(tasks * 2 * channels);
  parallel(pool, tasks, [&](int64_t task) {
    const int64_t begin = task * kRows, end = std::min(begin + kRows, rows);
    for (int first = 0; first < channels; first += kOut) {
      const int low = std::min(channels - first, kLanes), high = std::min(channels - first - low, kLanes);
      Vector sum[2] = {}, product[2] = {};
      auto add = [&](int low, int high) {
        for (int64_t at = begin * channels + first; at < end * channels; at += channels) {
          const Vector a = load(x + at, low), b = load(x + at + low, high);
          sum[0] += a, product[0] += a * load(y + at, low);
          sum[1] += b, product[1] += b * load(y + at + low, high);
        }
      };
      if (high == kLanes) add(kLanes, kLanes);  // lengths known to the compiler
      else add(low, high);
      float* to = sums.data() + task * 2 * channels + first;
      store(to, sum[0], low), store(to + low, sum[1], high);
      store(to + channels, product[0], low), store(to + channels + low, product[1], high);
    }
  });
  std::vector<double> total(2 * channels);
  for (int64_t task = 0; task < tasks; ++task)
    for (int i = 0; i < 2 * channels; ++i) total[i] += sums[task * 2 * channels + i];
  std::copy(total.begin(), total.end(), result);
}

ffi::Error run_channel_sums(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y,
                            ffi::Result<ffi::Buffer<ffi::F32>> result) {
  auto run = [&](auto element) {
    using Element = decltype(element);
    const int channels = x.dimensions().back();
    channel_sums(pool, static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(y.untyped_data()),
                 result->typed_data(), x.element_count() / channels, channels);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32 && y.element_type() == ffi::F32) return run(float{});
  if (x.element_type() == ffi::BF16 && y.element_type() == ffi::BF16) return run(Bf16{});
  return ffi::Error::InvalidArgument("both operands must be float32 or both be bfloat16");
}

ffi::Error run_convolution(ffi::ThreadPool pool, ffi::AnyBuffer input, ffi::AnyBuffer kernel,
                           ffi::Result<ffi::AnyBuffer> output, int64_t time_stride, int64_t freq_stride,
                           bool transposed) {
  auto run = [&](auto type) {
    using Type = decltype(type);
    using Element = typename Type::Element;
    advise_huge_pages(output->untyped_data(), output->size_bytes());
    convolve<Type>(pool, static_cast<const Element*>(input.untyped_data()),
                   static_cast<const Element*>(kernel.untyped_data()), static_cast<Element*>(output->untyped_data()),
                   input.dimensions(), kernel.dimensions(), output->dimensions(), time_stride, freq_stride, transposed);
    return ffi::Error::Success();
  };
  if (input.element_type() == ffi::F32 && kernel.element_type() == ffi::F32) return run(Float32{});
  if (input.element_type() == ffi::BF16 && kernel.element_type() == ffi::BF16) return run(Bfloat16{});
  return ffi::Error::InvalidArgument("input and kernel must both be float32 or both be bfloat16");
}

ffi::Error run_kernel_gradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gradient,
                               ffi::Result<ffi::Buffer<ffi::F32>> result, int64_t time_stride, int64_t freq_stride) {
  auto run = [&](auto type) {
    using Type = decltype(type);
    using Element = typename Type::Element;
    kernel_gradient<Type>(pool, static_cast<const Element*>(x.untyped_data()),
                          static_cast<const Element*>(gradient.untyped_data()), result->typed_data(), x.dimensions(),
                          gradient.dimensions(), result->dimensions(), time_stride, freq_stride);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32 && gradient.element_type() == ffi::F32) return run(Float32{});
  if (x.element_type() == ffi::BF16 && gradient.element_type() == ffi::BF16) return run(Bfloat16{});
  return ffi::Error::InvalidArgument("input and gradient must both be float32 or both be bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution, run_convolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("time_stride")
                                  .Attr<int64_t>("freq_stride")
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KernelGradient, run_kernel_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("time_stride")
                                  .Attr<int64_t>("freq_stride"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ChannelSums, run_channel_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// What the kernels of this directory share: vectors, pairs of bfloat16, buffers, threads.
//
// Why kernels of our own: on a CPU, XLA's weight gradient of large, early convolutions runs at a tenth of the machine's
// speed; these run near its peak. library.py compiles them for the machine at hand; where it cannot, XLA computes.
//
// Layout: activations [batch, time, freq, channel], kernels [time taps, freq taps, in, out], padding of taps / 2 on each
// side. Activations are float32 or bfloat16, sums are float32. Both convolution kernels copy a few zero-padded rows into
// a buffer that stays in the second-level cache, then compute tiles whose sums stay in registers.
//
// A `Unit` is four bytes, what one lane of a vector holds: one float32, or (where the machine multiplies pairs of
// bfloat16) two bfloat16 neighbours along the axis that is summed over: channels in the convolution, utterances in the
// kernel gradient. So one set of loops serves both. Loops of their own multiply whole tiles of such pairs by AMX, where
// the processor has it: vectors of pairs are no faster there than vectors of float32.

#pragma once

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
#include <optional>
#include <string>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define KMQ_MATRIX_TILES
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace kmq {

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
inline void advise_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
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

// Matrix tiles (AMX) multiply 16 x 16 units by 16 x 16 in one instruction. Linux lends them to a process that asks;
// where it does not, or the compiler knows of none, vectors do the work.
constexpr int kTileRows = 16, kTileUnits = 16;
#if defined(KMQ_MATRIX_TILES)
inline bool have_matrix_tiles() {
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return granted;
}

// The tiles of one thread, while this lives: sums in 0 to 3, left factors of `rows` rows in 4 and 5, right ones in 6
// and 7. A sum is [row, 16 floats], a left factor [row, 16 units], a right one [16 units, 16 lanes].
class MatrixTiles {
 public:
  explicit MatrixTiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = tile < 6 ? rows : kTileRows;
    see_memory(&shape);
    _tile_loadconfig(&shape);
  }
  ~MatrixTiles() { _tile_release(); }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;

  // GCC does not know what loads of tiles read: all that was written before must be in memory.
  static void see_memory(const void* written) { __asm__ volatile("" ::"r"(written) : "memory"); }

  static void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Adds the products of two left factors, [row, unit] `left_step` units a row, and [unit, kOut] on the right.
  static void multiply_add(const Unit* first, const Unit* second, size_t left_step, const void* right) {
    const char* low = static_cast<const char*>(right);
    _tile_loadd(4, first, 4 * left_step);
    _tile_loadd(6, low, 4 * kOut);
    _tile_loadd(7, low + 4 * kTileUnits, 4 * kOut);
    _tile_loadd(5, second, 4 * left_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // The sums of the first and of the second factor, [row, kOut] each.
  static void load(const float* first, const float* second) {
    _tile_loadd(0, first, 4 * kOut);
    _tile_loadd(1, first + kTileUnits, 4 * kOut);
    _tile_loadd(2, second, 4 * kOut);
    _tile_loadd(3, second + kTileUnits, 4 * kOut);
  }
  static void store(float* first, float* second) {
    _tile_stored(0, first, 4 * kOut);
    _tile_stored(1, first + kTileUnits, 4 * kOut);
    _tile_stored(2, second, 4 * kOut);
    _tile_stored(3, second + kTileUnits, 4 * kOut);
  }
};
#else
inline bool have_matrix_tiles() { return false; }
#endif

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace kmq

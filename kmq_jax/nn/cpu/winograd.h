// Winograd's convolution in time, and what it makes of the rows it reads.

#pragma once

#include "common.h"

namespace kmq {

// Winograd's F(2, 3) along time saves a third of the multiplications of three taps: of two rows of output
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3,  where
//   m0 = (d0 - d2) k0,  m1 = (d1 + d2) (k0 + k1 + k2) / 2,  m2 = (d2 - d1) (k0 - k1 + k2) / 2,  m3 = (d1 - d3) k2.
// Pairs of bfloat16 hold the combinations rounded to bfloat16, an error like that of the activations themselves.
inline bool use_winograd(int time_taps, int time_stride, int in_channels) {
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
inline void winograd_gradient_rows(const Unit* rows, size_t size, int pairs, Unit* to) {
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

}  // namespace kmq

// Sums over the positions of each channel, which batch normalisation and its gradients need.

#include "common.h"

namespace kmq {
namespace {

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

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, ffi::Result<ffi::Buffer<ffi::F32>> result) {
  auto run_as = [&](auto element) {
    using Element = decltype(element);
    const int channels = x.dimensions().back();
    channel_sums(pool, static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(y.untyped_data()),
                 result->typed_data(), x.element_count() / channels, channels);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32 && y.element_type() == ffi::F32) return run_as(float{});
  if (x.element_type() == ffi::BF16 && y.element_type() == ffi::BF16) return run_as(Bf16{});
  return ffi::Error::InvalidArgument("both operands must be float32 or both be bfloat16");
}

}  // namespace
}  // namespace kmq

XLA_FFI_DEFINE_HANDLER_SYMBOL(ChannelSums, kmq::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

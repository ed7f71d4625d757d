#pragma once

#include <algorithm>

namespace tilewright {

// What the GPU's kernels multiply scores by.
struct ScoreScale {
  float before_tanh;  // 0 without softcap
  float to_log2;      // a score, or with softcap its tanh, becomes a power of two

  // Never 0 or infinite: a masked score is -inf, one of zeros 0, and neither may become NaN. 1e-30 times any score of
  // 16-bit elements is as good as 0.
  static ScoreScale of(double scale, double softcap) {
    constexpr double kLog2e = 1.4426950408889634, kLeast = 1e-30, kMost = 1e37;
    const auto bounded = [&](double factor) { return static_cast<float>(std::clamp(factor, kLeast, kMost)); };
    if (softcap > 0) return {bounded(scale / softcap), bounded(softcap * kLog2e)};
    return {0.f, bounded(scale * kLog2e)};
  }
};

}  // namespace tilewright

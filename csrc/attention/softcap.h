#pragma once

#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright {

// The softcap of the scores (Gemma 2, 2024): S ← t = tanh(score_scale S) = 1 - 2 / d, d = 1 + 2^(factor S), to about
// 1e-7. The capped score is the cap times t, and its slope 1 - t².
struct Softcap {
  float factor;

  __device__ __forceinline__ static Softcap of(float score_scale) {
    constexpr float kTwoLog2e = 2.88539008177793f;
    return {score_scale * kTwoLog2e};
  }

  __device__ __forceinline__ float operator()(float s) const {
    return fmaf(-2.f, ptx::reciprocal(1.f + ptx::exp2(s * factor)), 1.f);
  }

  // Each score by itself.
  template <int kColumns>
  __device__ __forceinline__ void each(Accumulator<kColumns>& S) const {
#pragma unroll
    for (int i = 0; i < S.kValues; ++i) S.values[i] = (*this)(S.values[i]);
  }

  // Four scores of a row have one reciprocal, that of the product of their d: reciprocals are computed where
  // exponentials are, of which a score needs two anyway. A NaN among the four becomes all four, so this is for blocks
  // that all rows see.
  template <int kColumns>
  __device__ __forceinline__ void by_fours(Accumulator<kColumns>& S) const {
    static_assert(kColumns % 16 == 0);
#pragma unroll
    for (int i = 0; i < S.kValues / 4; ++i) {
      float* const s = &S.values[i / 2 * 8 + i % 2 * 2];
      const float a = denominator(s[0]), b = denominator(s[1]), c = denominator(s[4]), d = denominator(s[5]);
      const float ab = a * b, cd = c * d;
      const float all = -2.f * ptx::reciprocal(ab * cd);
      const float of_ab = all * cd, of_cd = all * ab;
      s[0] = fmaf(of_ab, b, 1.f), s[1] = fmaf(of_ab, a, 1.f);
      s[4] = fmaf(of_cd, d, 1.f), s[5] = fmaf(of_cd, c, 1.f);
    }
  }

 private:
  // Beyond 2^30 it makes no difference to t; and the product of four must be a float.
  __device__ __forceinline__ float denominator(float s) const {
    return 1.f + ptx::exp2(ptx::minimum(s * factor, 30.f));
  }
};

}  // namespace tilewright

#pragma once

#include <math_constants.h>

#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright {

// The softmax of the two rows a thread holds of an accumulator, block by block, with scores in powers of two:
//
//     P = 2^(to_log2 S - r)      l = Σ P      O = Σ P V
//
// The reference r need not be the row's maximum: P, l and O scale alike, so any r gives the same quotient as long as no
// P overflows. Only raise() searches the maximum, as the online softmax does (Milakov and Gimelshein, arXiv
// 1805.02867); a block that overflows neither needs the search nor changes O. `block_sum` tells whether it did.
template <class Element>
struct FragmentSoftmax {
  // A thread's sum of P over one block stays below this, so each P does: far enough from the element's largest value,
  // and for bfloat16, which has float32's range, also low enough that O, which sums P V, has room for large V.
  static constexpr float kOverflow = std::is_same_v<Element, __half> ? 0x1p15f : 0x1p40f;

  // r is raised when a score passes it by more than this power of two: then O need not be multiplied for every new
  // maximum.
  static constexpr float kSlack = 8.f;

  float row_max[2];    // the largest score that r has been raised to, -inf before the first key
  float reference[2];  // r; NaN before the first key, so that a block without raise() counts as overflowed
  float row_sum[2];    // l, of this thread's columns; the four lanes of a row are added in finish()
  float block_sum[2];  // the last block's share of l, not yet in row_sum

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = -CUDART_INF_F;
      reference[r] = CUDART_NAN_F;
      row_sum[r] = 0.f;
      block_sum[r] = 0.f;
    }
  }

  // r ← the largest score so far, unless r is still close enough; `correction` is what O is to be multiplied by,
  // mostly 1.
  template <int kColumns>
  __device__ __forceinline__ void raise(const Accumulator<kColumns>& S, float to_log2, float (&correction)[2]) {
    // Four maxima a row: one alone would be a chain of dependent instructions as long as the row.
    constexpr int kChains = 4;
    float partial[2][kChains];
#pragma unroll
    for (int i = 0; i < S.kValues; ++i) {
      float& m = partial[S.row_half(i)][i / 4 * 2 % kChains + i % 2];
      m = i < 2 * kChains ? S.values[i] : fmaxf(m, S.values[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(fmaxf(partial[r][0], partial[r][1]), fmaxf(partial[r][2], partial[r][3]));
      m = fmaxf(m, row_max[r]);
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      // A row that still has seen no key: subtract 0, so that its P are 2^-inf = 0.
      const float raised = m == -CUDART_INF_F ? 0.f : m * to_log2;
      // Not for the first key, when the comparison with NaN fails: then O and l are 0, and the NaN must not reach them.
      const bool keep = raised - reference[r] <= kSlack;
      const bool first = row_max[r] == -CUDART_INF_F;
      correction[r] = keep || first ? 1.f : ptx::exp2(reference[r] - raised);
      row_max[r] = keep ? row_max[r] : m;
      reference[r] = keep ? reference[r] : raised;
      row_sum[r] *= correction[r];
    }
  }

  __device__ __forceinline__ void begin_block() { block_sum[0] = block_sum[1] = 0.f; }

  // S → P in the columns [16 step, 16 step + 16).
  template <int kColumns>
  __device__ __forceinline__ void exponentiate(Accumulator<kColumns>& S, int step, float to_log2) {
#pragma unroll
    for (int i = 8 * step; i < 8 * step + 8; ++i) {
      const int r = S.row_half(i);
      S.values[i] = ptx::exp2(fmaf(S.values[i], to_log2, -reference[r]));
      block_sum[r] += S.values[i];
    }
  }

  __device__ __forceinline__ bool block_overflowed() const {
    return !(block_sum[0] < kOverflow && block_sum[1] < kOverflow);
  }
  // Takes the block's sum over; a row that still has no key gets its NaN back.
  __device__ __forceinline__ void settle_block() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += block_sum[r];
      if (row_max[r] == -CUDART_INF_F) reference[r] = CUDART_NAN_F;
    }
  }

  // Ends the rows: what O is to be multiplied by, and lse. `sink_log2` is the learned logit times log2(e), or -inf.
  __device__ __forceinline__ void finish(float sink_log2, float (&normalize)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
      const float m = row_max[r] == -CUDART_INF_F ? -CUDART_INF_F : reference[r];
      const float top = fmaxf(m, sink_log2);
      if (top == -CUDART_INF_F) {  // sees no key, has no sink
        normalize[r] = 0.f;
        lse[r] = -CUDART_INF_F;
      } else {
        constexpr float kLn2 = 0.693147180559945f;
        const float shrink = ptx::exp2(m - top);
        const float sum = fmaf(row_sum[r], shrink, ptx::exp2(sink_log2 - top));
        normalize[r] = shrink * ptx::reciprocal(sum);
        lse[r] = (top + ptx::log2(sum)) * kLn2;
      }
    }
  }
};

}  // namespace tilewright

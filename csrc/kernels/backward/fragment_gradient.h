#pragma once

#include <math_constants.h>

#include "attention/softcap.h"
#include "attention/visible_columns.h"
#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright::backward {

// What happens to the scores between the products, on the transposed fragments: a thread holds two keys (rows) and of
// each the queries 8 j + column() and + 1 of the tile. lse2 and delta are those of the tile, in shared memory.

__device__ __forceinline__ float2 of_two_queries(const float* of_tile, int column, int j) {
  return *reinterpret_cast<const float2*>(of_tile + column + 8 * j);
}

// S ← -inf where the query does not see the key.
template <int kQueries>
__device__ __forceinline__ void mask_scores(Accumulator<kQueries>& S, const VisibleQueries& queries, int first_query,
                                            int first_key, int thread) {
  const int first_column = first_query + S.column(thread);
  ColumnSet seeing[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + S.row(thread) + 8 * r;
    seeing[r] = visible_columns(queries, key, first_column);
  }
  replace_other_columns(S, seeing, -CUDART_INF_F);
}

// softcap: S ← t = tanh(score_scale S), slope ← 1 - t²
template <class Element, int kQueries>
__device__ __forceinline__ void cap_scores(Accumulator<kQueries>& S, OperandA<Element, kQueries>& slope,
                                           float score_scale) {
  Softcap::of(score_scale).each(S);
#pragma unroll
  for (int i = 0; i < S.kValues; i += 2) {
    const float* t = &S.values[i];
    slope.steps[i / 8][i % 8 / 2] = ptx::pack<Element>(fmaf(-t[0], t[0], 1.f), fmaf(-t[1], t[1], 1.f));
  }
}

// P = 2^(to_log2 S - lse2)
template <class Element, int kQueries>
__device__ __forceinline__ void exponentiate(const Accumulator<kQueries>& S, OperandA<Element, kQueries>& P,
                                             const float* lse2, float to_log2, int column) {
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    const float2 lse = of_two_queries(lse2, column, j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* s = &S.values[4 * j + 2 * r];
      P.steps[j / 2][j % 2 * 2 + r] = ptx::pack<Element>(ptx::exp2(fmaf(s[0], to_log2, -lse.x)),  //
                                                         ptx::exp2(fmaf(s[1], to_log2, -lse.y)));
    }
  }
}

// dS = P ∘ (dP - delta). kPacked: the product is taken in packed 16 bits, in half the instructions, fewer registers,
// and one rounding (bfloat16: 2^-9) more. In float16 a dP beyond 65,504 would give inf or NaN where P may make it small
// again.
template <bool kPacked, class Element, int kQueries>
__device__ __forceinline__ void differentiate(const Accumulator<kQueries>& dP, const OperandA<Element, kQueries>& P,
                                              OperandA<Element, kQueries>& dS, const float* delta, int column) {
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    const float2 d = of_two_queries(delta, column, j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = dP.values[4 * j + 2 * r] - d.x, high = dP.values[4 * j + 2 * r + 1] - d.y;
      const uint32_t p = P.steps[j / 2][j % 2 * 2 + r];
      uint32_t& out = dS.steps[j / 2][j % 2 * 2 + r];
      if constexpr (!kPacked) {
        const float2 wide = ptx::unpack<Element>(p);
        out = ptx::pack<Element>(wide.x * low, wide.y * high);
      } else {
        out = ptx::multiply_packed<Element>(p, ptx::pack<Element>(low, high));
      }
    }
  }
}

template <class Element, int kQueries>
__device__ __forceinline__ void multiply(OperandA<Element, kQueries>& a, const OperandA<Element, kQueries>& b) {
#pragma unroll
  for (int i = 0; i < a.kSteps; ++i) {
#pragma unroll
    for (int x = 0; x < 4; ++x) a.steps[i][x] = ptx::multiply_packed<Element>(a.steps[i][x], b.steps[i][x]);
  }
}

}  // namespace tilewright::backward

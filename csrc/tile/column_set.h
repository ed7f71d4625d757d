#pragma once

#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright {

// Some of the columns that a thread holds of one row of an accumulator, the n-th in bit n. A bit a column, because
// seven bits go into predicates by one instruction; a comparison a column would wait for the one before it.
struct ColumnSet {
  uint32_t bits;

  // Those before `end`, which counts from the thread's first.
  __device__ __forceinline__ static ColumnSet before(int end) { return {ptx::low_bits(columns_before(max(end, 0)))}; }
  __device__ __forceinline__ ColumnSet operator&(ColumnSet other) const { return {bits & other.bits}; }
  __device__ __forceinline__ ColumnSet operator|(ColumnSet other) const { return {bits | other.bits}; }
  __device__ __forceinline__ ColumnSet operator~() const { return {~bits}; }
};

// X ← value in the columns that are not in the set of their row, of the thread's two.
template <int kColumns>
__device__ __forceinline__ void replace_other_columns(Accumulator<kColumns>& X, const ColumnSet (&kept)[2],
                                                      float value) {
  static_assert(kColumns / 4 <= 32, "a row's columns of a thread have a bit each");
#pragma unroll
  for (int i = 0; i < X.kValues; ++i) {
    if (!(kept[X.row_half(i)].bits >> X.nth_column(i) & 1)) X.values[i] = value;
  }
}

}  // namespace tilewright

#pragma once

#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright {

// Some of the columns that a thread holds of one row of an accumulator, the n-th in bit n. A bit a column, because
// seven bits go into predicates by one instruction; a comparison a column would wait for the one before it.
struct ColumnSet {
  uint32_t bits;

  // Those before `end`; columns are counted from the thread's first, as in Accumulator::column_of.
  __device__ __forceinline__ static ColumnSet before(int end) {
    const int columns = max(end, 0);
    return {ptx::low_bits(columns / 8 * 2 + min(columns % 8, 2))};
  }
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
    const int column = i / 4 * 2 + i % 2;
    if (!(kept[X.row_half(i)].bits >> column & 1)) X.values[i] = value;
  }
}

}  // namespace tilewright

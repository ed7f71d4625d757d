#pragma once

#include "ptx/math.h"
#include "tile/fragment.h"

namespace tilewright {

// Four lanes hold four pieces of 16 bytes each, every lane 4 bytes of every piece: a 4×4 transpose in two rounds of
// shuffles gives lane i of the four piece i.
__device__ __forceinline__ uint4 gather_row(const uint32_t (&piece)[4], int thread) {
  const bool odd = thread % 2, high = thread / 2 % 2;
  const uint32_t pair0 = __shfl_xor_sync(~0u, odd ? piece[0] : piece[1], 1);
  const uint32_t pair1 = __shfl_xor_sync(~0u, odd ? piece[2] : piece[3], 1);
  const uint32_t x0 = odd ? pair0 : piece[0], x1 = odd ? piece[1] : pair0;
  const uint32_t x2 = odd ? pair1 : piece[2], x3 = odd ? piece[3] : pair1;
  const uint32_t quad0 = __shfl_xor_sync(~0u, high ? x0 : x2, 2);
  const uint32_t quad1 = __shfl_xor_sync(~0u, high ? x1 : x3, 2);
  return high ? make_uint4(quad0, quad1, x2, x3) : make_uint4(x0, x1, quad0, quad1);
}

// Writes factor × an accumulator to rows in global memory, in 16 bits: `to` is the thread's first row, at column 0, and
// its second lies `eight_rows` elements behind. Only the first `rows` of the two are written, and columns below
// `columns`.
//
// Four lanes hold the 16 bytes of 8 columns between them; in the end each has 16 bytes of one row, and the four
// together 64.
template <class Element, int kCols>
__device__ __forceinline__ void store_rows(const Accumulator<kCols>& from, float factor, Element* to,
                                           int64_t eight_rows, int rows, int columns, int thread) {
#pragma unroll
  for (int j = 0; j < kCols / 32; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t piece[4];  // of columns 32 j + 8 i + thread % 4 * 2
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &from.values[16 * j + 4 * i + 2 * r];
        piece[i] = ptx::pack<Element>(pair[0] * factor, pair[1] * factor);
      }
      const uint4 row_piece = gather_row(piece, thread);
      const int column = 32 * j + thread % 4 * 8;
      if (r < rows && column < columns) {
        *reinterpret_cast<uint4*>(to + r * eight_rows + column) = row_piece;
      }
    }
  }
}

}  // namespace tilewright

#pragma once

#include <math_constants.h>

#include "attention/window.h"
#include "tile/fragment.h"

namespace tilewright::forward {

// A block of keys on an edge of the window as a warp (16 rows) and its threads (two of them) see it, in columns of the
// block.
struct Edge {
  int end;         // no row of the warp sees a column from here on,
  int full_begin;  // all rows see [full_begin, full_end)
  int full_end;
  int row_begin[2];  // the thread's rows, its columns counted from its first
  int row_end[2];
  int sinks_end;

  __device__ __forceinline__ static Edge none(int columns) { return {columns, 0, columns, {0, 0}, {0, 0}, 0}; }

  // Of a thread of the warpgroup whose first row is first_query.
  __device__ __forceinline__ static Edge of(const VisibleKeys& keys, int first_query, int first_key, int thread) {
    const int first_row = first_query + thread / 32 * 16;
    const int first_column = first_key + Accumulator<8>::column(thread);
    Edge edge;
    edge.end = keys.end(first_row + 15) - first_key;
    edge.full_begin = keys.begin(first_row + 15) - first_key;
    edge.full_end = keys.end(first_row) - first_key;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + Accumulator<8>::row(thread) + 8 * r;
      edge.row_begin[r] = keys.begin(query) - first_column;
      edge.row_end[r] = keys.end(query) - first_column;
    }
    edge.sinks_end = keys.window.sink_tokens - first_column;
    return edge;
  }
};

// S ← -inf where the row does not see the key. Only steps of 16 columns on an edge are looked at.
template <int kColumns>
__device__ __forceinline__ void mask(Accumulator<kColumns>& S, const Edge& edge) {
  if (edge.full_end < kColumns) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      if (16 * step + 16 <= edge.full_end) continue;
#pragma unroll
      for (int i = 8 * step; i < 8 * step + 8; ++i) {
        if (S.column_of(i) >= edge.row_end[S.row_half(i)]) S.values[i] = -CUDART_INF_F;
      }
    }
  }
  if (edge.full_begin > 0) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      if (16 * step >= edge.full_begin) continue;
#pragma unroll
      for (int i = 8 * step; i < 8 * step + 8; ++i) {
        const int column = S.column_of(i);
        if (column < edge.row_begin[S.row_half(i)] && column >= edge.sinks_end) S.values[i] = -CUDART_INF_F;
      }
    }
  }
}

}  // namespace tilewright::forward

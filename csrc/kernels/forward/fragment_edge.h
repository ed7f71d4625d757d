#pragma once

#include <math_constants.h>

#include "attention/visible_columns.h"

namespace tilewright::forward {

// A block of keys on an edge of the window as a warp (16 rows) and its threads (two of them) see it.
struct Edge {
  int end;       // no row of the warp sees a column of the block from here on
  bool partial;  // not all rows of the warp see all columns
  ColumnSet seen[2];

  // Of a block of `columns` keys that all rows see.
  __device__ __forceinline__ static Edge none(int columns) { return {columns, false, {}}; }

  // Of a thread of the warpgroup whose first row is first_query.
  __device__ __forceinline__ static Edge of(const VisibleKeys& keys, int first_query, int first_key, int columns,
                                            int thread) {
    const int first_row = first_query + thread / 32 * 16;
    const int first_column = first_key + Accumulator<8>::column(thread);
    Edge edge;
    edge.end = keys.end(first_row + 15) - first_key;
    edge.partial = keys.begin(first_row + 15) > first_key || keys.end(first_row) < first_key + columns;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + Accumulator<8>::row(thread) + 8 * r;
      edge.seen[r] = visible_columns(keys, query, first_column);
    }
    return edge;
  }
};

// S ← -inf where the row does not see the key.
template <int kColumns>
__device__ __forceinline__ void mask(Accumulator<kColumns>& S, const Edge& edge) {
  if (edge.partial) replace_other_columns(S, edge.seen, -CUDART_INF_F);
}

}  // namespace tilewright::forward

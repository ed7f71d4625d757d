#pragma once

#include "attention/query_range.h"
#include "attention/window.h"
#include "tile/column_set.h"

namespace tilewright {

// Of the columns of a row that a thread holds, of which its first is key `first_column`, those the query sees.
__device__ __forceinline__ ColumnSet visible_columns(const VisibleKeys& keys, int query, int first_column) {
  return ColumnSet::before(keys.end(query) - first_column) &
         (~ColumnSet::before(keys.begin(query) - first_column) |
          ColumnSet::before(keys.window.sink_tokens - first_column));
}

// Transposed: columns are queries, and a row is the key they see.
__device__ __forceinline__ ColumnSet visible_columns(const VisibleQueries& queries, int key, int first_column) {
  return ColumnSet::before(queries.last(key) - first_column) & ~ColumnSet::before(queries.first(key) - first_column);
}

}  // namespace tilewright

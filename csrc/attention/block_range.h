#pragma once

#include "attention/window.h"

namespace tilewright {

// Which blocks of keys a tile of queries [first_query, last_query] visits, from right to left:
//
//     sinks            left edge         full              right edge
//     [0, sink_end)    [begin, full_begin)  [full_begin, full_end)  [full_end, end)
//
// Every row of the tile sees every key of a full block; the blocks of the other three ranges need the mask. Blocks
// outside the four ranges are seen by no row.
struct BlockRange {
  int sink_end;
  int begin;
  int full_begin;
  int full_end;
  int end;

  TILEWRIGHT_HOST_DEVICE static BlockRange of(const VisibleKeys& keys, int first_query, int last_query, int block) {
    BlockRange range;
    const int end_of_keys = keys.end(last_query);
    range.end = ceil_div(end_of_keys, block);
    range.begin = min_of(keys.begin(first_query) / block, range.end);
    range.full_begin = clamp(ceil_div(keys.begin(last_query), block), range.begin, range.end);
    range.full_end = clamp(keys.end(first_query) / block, range.full_begin, range.end);
    range.sink_end = min_of(ceil_div(min_of(keys.window.sink_tokens, end_of_keys), block), range.begin);
    return range;
  }

  TILEWRIGHT_HOST_DEVICE int count() const { return end - begin + sink_end; }
  // The block visited at a step 0 … count() - 1.
  TILEWRIGHT_HOST_DEVICE int block_at(int step) const {
    return step < end - begin ? end - 1 - step : sink_end - 1 - (step - (end - begin));
  }
  // Steps [0, right_edge_steps()) and [full_steps_end(), count()) are masked.
  TILEWRIGHT_HOST_DEVICE int right_edge_steps() const { return end - full_end; }
  TILEWRIGHT_HOST_DEVICE int full_steps_end() const { return end - full_begin; }
};

}  // namespace tilewright

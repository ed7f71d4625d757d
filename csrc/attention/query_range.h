#pragma once

#include "attention/window.h"

namespace tilewright {

// VisibleKeys the other way round: which queries see a key. Because begin(i) and end(i) never decrease with i, they are
// an interval for each key:
//
//     query i sees key j  <=>  first(j) <= i < last(j)        0 <= i < seqlen_q, 0 <= j < seqlen_k
struct VisibleQueries {
  Window window;
  int seqlen_k;
  int offset;  // seqlen_k - seqlen_q

  TILEWRIGHT_HOST_DEVICE VisibleQueries(const Window& window, int seqlen_q, int seqlen_k)
      : window(window), seqlen_k(seqlen_k), offset(seqlen_k - seqlen_q) {}

  // Neither is clamped to the queries there are.
  TILEWRIGHT_HOST_DEVICE int first(int key) const { return key - offset - window.right; }
  TILEWRIGHT_HOST_DEVICE int last(int key) const {
    constexpr int kAll = (1 << 30) + 1;  // behind every query
    if (key >= seqlen_k) return -kAll;
    return key < window.sink_tokens ? kAll : key - offset + window.left + 1;
  }
};

// Which tiles of queries a tile of keys [first_key, first_key + keys) visits:
//
//     begin … full_begin    masked (causal edge)
//     full_begin … full_end every query sees every key
//     full_end … end        masked (left edge of the window)
//
// Tiles outside are seen by no key, and each inside by one at least. A tile of keys that reaches behind the end of the
// sequence is masked throughout. Queries behind the end of theirs need no mask: their lse is +inf.
struct QueryRange {
  int begin;
  int full_begin;
  int full_end;
  int end;

  TILEWRIGHT_HOST_DEVICE static QueryRange of(const Window& window, int seqlen_q, int seqlen_k, int first_key, int keys,
                                              int tile) {
    const VisibleQueries queries(window, seqlen_q, seqlen_k);
    const int last_key = min_of(first_key + keys, seqlen_k) - 1;
    QueryRange range{0, 0, 0, 0};
    if (last_key < first_key) return range;
    // Of the keys the first is seen from the earliest query on. Sink tokens are seen to the end, the others longer the
    // later they stand.
    const int last = first_key < window.sink_tokens ? seqlen_q : clamp(queries.last(last_key), 0, seqlen_q);
    const int first = clamp(queries.first(first_key), 0, last);
    range.begin = first / tile;
    range.end = first == last ? range.begin : ceil_div(last, tile);
    // The last key is seen from the latest query on; the first that is no sink is lost first.
    const int full_first = clamp(queries.first(last_key), 0, seqlen_q);
    const int first_lost = max_of(first_key, window.sink_tokens);
    const int full_last = first_lost > last_key ? seqlen_q : clamp(queries.last(first_lost), 0, seqlen_q);
    range.full_begin = clamp(ceil_div(full_first, tile), range.begin, range.end);
    range.full_end = full_last == seqlen_q ? range.end : clamp(full_last / tile, range.full_begin, range.end);
    if (range.full_end < range.full_begin || first_key + keys > seqlen_k) range.full_end = range.full_begin;
    return range;
  }

  TILEWRIGHT_HOST_DEVICE int count() const { return end - begin; }

  // The tiles of queries from this one on to `end` are visited by no tile of keys before the one that starts with
  // first_key: their first query has lost the key before it, and there are no sink tokens, which the first tile holds.
  TILEWRIGHT_HOST_DEVICE int first_fresh(const Window& window, int seqlen_q, int seqlen_k, int first_key,
                                         int tile) const {
    if (first_key == 0) return begin;
    if (window.sink_tokens > 0) return end;
    const int lost = clamp(VisibleQueries(window, seqlen_q, seqlen_k).last(first_key - 1), 0, seqlen_q);
    return clamp(ceil_div(lost, tile), begin, end);
  }
};

// The order in which a tile of keys visits its tiles of queries.
struct QueryWalk {
  int count;
  int full_begin;  // the steps [full_begin, full_end) need no mask
  int full_end;
  int first;
  int direction;
  int wrap;  // the tile behind the last, where an upward walk goes on at the beginning

  // Upwards; where nothing is masked from tile `shift` of the range on, so that blocks which work on the same head at
  // the same time add to different parts of dQ.
  TILEWRIGHT_HOST_DEVICE static QueryWalk upwards(const QueryRange& range, int shift) {
    const int count = range.count();
    const bool masked = range.full_begin > range.begin || range.full_end < range.end;
    const int start = masked || count == 0 ? 0 : shift % count;
    return {count, range.full_begin - range.begin, range.full_end - range.begin, range.begin + start, 1, range.end};
  }
  TILEWRIGHT_HOST_DEVICE static QueryWalk downwards(const QueryRange& range) {
    return {range.count(), range.end - range.full_end, range.end - range.full_begin, range.end - 1, -1, range.end};
  }

  TILEWRIGHT_HOST_DEVICE bool is_full(int step) const { return step >= full_begin && step < full_end; }
  TILEWRIGHT_HOST_DEVICE int tile_at(int step) const {
    const int tile = first + direction * step;
    return tile < wrap ? tile : tile - count;
  }
};

// How many tiles of keys before number `key_tile` visit the tile of queries that starts with first_query, given that
// key_tile does. These are the tiles with sink tokens and those of the window, each an interval.
TILEWRIGHT_HOST_DEVICE int key_tiles_before(const VisibleKeys& keys, int first_query, int last_query, int key_tile,
                                            int tile_keys) {
  const int window_begin = keys.begin(first_query) / tile_keys;
  if (key_tile < window_begin) return key_tile;
  const int sink_end = ceil_div(min_of(keys.window.sink_tokens, keys.end(last_query)), tile_keys);
  return key_tile - window_begin + min_of(sink_end, window_begin);
}

}  // namespace tilewright

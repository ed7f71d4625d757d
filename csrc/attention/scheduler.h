#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/host_device.h"

namespace tilewright {

// Division by a number known beforehand, for 0 <= n < 2^31: a multiplication.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  int shift;

  // With 2^k >= divisor, q = n (2^(31 + k) / divisor rounded up) / 2^(31 + k) is exact (Granlund and Montgomery, 1994).
  TILEWRIGHT_HOST_DEVICE static constexpr Divisor of(int divisor) {
    int k = 0;
    while ((int64_t{1} << k) < divisor) ++k;
    const uint64_t power = uint64_t{1} << (31 + k);
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((power + divisor - 1) / divisor), 31 + k};
  }
  TILEWRIGHT_HOST_DEVICE constexpr int divide(int n) const {
    return static_cast<int>((uint64_t{static_cast<uint32_t>(n)} * multiplier) >> shift);
  }
};
static_assert(Divisor::of(1).divide(0x7fffffff) == 0x7fffffff && Divisor::of(7).divide(0x7fffffff) == 306783378 &&
              Divisor::of(3).divide(8) == 2 && Divisor::of(0x7fffffff).divide(0x7ffffffe) == 0);

// So many tiles a call may have at most: each block takes a number behind the last, and all of them are ints.
constexpr int64_t kMostTiles = INT32_MAX - (1 << 16);

// The order in which tiles of queries are worked off: group after group of heads, in a group the longest tiles first
// (the last rows of a causal sequence see the most keys), and of equally long tiles one of each head: heads that share
// keys and values run at the same time.
struct TileOrder {
  int heads;           // (head, batch) pairs; packed: heads
  Divisor head_group;  // of them in a group

  struct Tile {
    int tile;  // 0 is the longest
    int head;
  };

  TILEWRIGHT_HOST_DEVICE Tile at(int index, int tiles) const {
    const int in_group = static_cast<int>(head_group.divisor);
    const int per_group = in_group * tiles;
    const int group = per_group < heads * tiles ? index / per_group : 0;
    const int rest = index - group * per_group;
    const int size = min_of(in_group, heads - group * in_group);
    const int tile = size == in_group ? head_group.divide(rest) : rest / size;
    return {tile, group * in_group + rest - tile * size};
  }

  // The same groups, but the shorter half of a group's tiles takes turns with the longer half of the next one's: tiles
  // of all lengths at any time, with few heads. For each head the tiles come in the same order as above.
  TILEWRIGHT_HOST_DEVICE constexpr Tile at_overlapping(int index, int tiles) const {
    const int in_group = static_cast<int>(head_group.divisor);
    const int longer = (tiles + 1) / 2, shorter = tiles - longer;
    // Stage n holds the longer tiles of group n and the shorter ones of group n - 1. The last has only shorter ones,
    // the first only longer ones.
    const int last = ceil_div(heads, in_group);
    const int begin_of_last = heads * longer + (last - 1) * in_group * shorter;
    int stage = 0;
    if (index >= begin_of_last) {
      stage = last;
      index -= begin_of_last;
    } else if (index >= in_group * longer) {
      index -= in_group * longer;
      stage = 1 + index / (in_group * tiles);
      index -= (stage - 1) * in_group * tiles;
    }
    const int with_longer = clamp(heads - stage * in_group, 0, in_group);
    const int with_shorter = stage == 0 ? 0 : min_of(heads - (stage - 1) * in_group, in_group);
    const int row = min_of(index / (with_longer + with_shorter), shorter);
    const int column = index - row * (with_longer + with_shorter);
    if (column < with_longer) return {row, stage * in_group + column};
    return {longer + row, (stage - 1) * in_group + column - with_longer};
  }

  // Of tiles of queries. Those of one length run best one head after the other: the blocks at work then read the same
  // keys at the same time. A causal order needs many heads to fill the gaps with short tiles, if their keys and values
  // fit in the L2 cache or not; too many, and all long tiles come at once, which read each head's keys alone.
  static TileOrder of_queries(int heads, int heads_per_kv, bool causal, int sequences, int64_t bytes_a_head) {
    constexpr int64_t kGroupBytes = 32 << 20;  // of 50 MB
    constexpr int64_t kMinSequences = 16, kMaxSequences = 64;
    const int64_t least = std::max<int64_t>(kMinSequences / sequences, 1);
    const int64_t most = std::max<int64_t>(kMaxSequences / sequences, 1);
    const int64_t fitting = kGroupBytes / std::max<int64_t>(bytes_a_head, 1);
    const int64_t group = causal ? std::clamp(fitting, least, most) : 1;
    return {heads, Divisor::of(static_cast<int>(std::min<int64_t>(group * heads_per_kv, heads)))};
  }
};

// Whether the order of overlapping groups visits all tiles of all heads once, and those of a head in their order.
constexpr bool at_overlapping_is_an_order(int heads, int head_group, int tiles) {
  const TileOrder order{heads, Divisor::of(head_group)};
  int next[16] = {};  // of each head
  for (int index = 0; index < heads * tiles; ++index) {
    const TileOrder::Tile at = order.at_overlapping(index, tiles);
    if (at.head < 0 || at.head >= heads || at.tile != next[at.head]++) return false;
  }
  return true;
}
static_assert(at_overlapping_is_an_order(12, 3, 4) && at_overlapping_is_an_order(12, 4, 5) &&
              at_overlapping_is_an_order(11, 4, 5) && at_overlapping_is_an_order(13, 6, 8) &&
              at_overlapping_is_an_order(7, 3, 1) && at_overlapping_is_an_order(3, 3, 7) &&
              at_overlapping_is_an_order(5, 1, 2) && at_overlapping_is_an_order(1, 1, 1));

}  // namespace tilewright

#pragma once

#include "attention/host_device.h"

namespace tilewright {

// The order in which tiles of queries are worked off: group after group of heads, in a group the longest tiles first
// (the last rows of a causal sequence see the most keys), and of equally long tiles one of each head: heads that share
// keys and values run at the same time.
struct TileOrder {
  int heads;       // (head, batch) pairs; packed: heads
  int head_group;  // of them in a group

  struct Tile {
    int tile;  // 0 is the longest
    int head;
  };

  TILEWRIGHT_HOST_DEVICE Tile at(int index, int tiles) const {
    const int per_group = head_group * tiles;
    const int group = index / per_group;
    const int rest = index - group * per_group;
    const int size = min_of(head_group, heads - group * head_group);
    return {rest / size, group * head_group + rest % size};
  }
};

}  // namespace tilewright

#pragma once

#include "attention/host_device.h"

namespace tilewright {

// The order in which tiles of queries are worked off: longest first (the last rows of a causal sequence see the most
// keys) within a group of heads whose keys and values fit in the L2 cache; the heads of a group take turns, so that
// heads which share keys and values run at the same time. `tiles` counts the tiles of one head; in a packed batch, of
// one head of all sequences.
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

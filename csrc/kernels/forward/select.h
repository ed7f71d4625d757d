#pragma once

namespace tilewright {

// The tile of one compiled instance of the Hopper forward, which serves every problem that fits into its head
// dimensions.
struct ForwardTile {
  int head_dim;  // padded, by the copy engine's zeros
  int head_dim_v;
  bool softcap;
  int tile_m;    // queries a tile
  int tile_n;    // keys a block
  int stages_k;  // blocks of K in flight
  int stages_v;
};

// As many keys a block as registers and shared memory hold; docs/forward.md has the measurements. One row for each
// instance in CMakeLists.txt, smaller head dimensions first.
constexpr ForwardTile kForwardTiles[] = {
    {64, 64, false, 192, 96, 4, 3},   {64, 64, true, 128, 128, 3, 3},   {128, 128, false, 128, 128, 3, 2},
    {128, 128, true, 128, 128, 2, 2}, {192, 128, false, 128, 96, 2, 2}, {192, 128, true, 128, 96, 2, 2},
    {256, 256, false, 128, 80, 2, 2}, {256, 256, true, 128, 80, 2, 2},
};

// The first that holds the problem; all zero if none does.
constexpr ForwardTile forward_tile(int head_dim, int head_dim_v, bool softcap) {
  for (const ForwardTile& tile : kForwardTiles) {
    if (head_dim <= tile.head_dim && head_dim_v <= tile.head_dim_v && softcap == tile.softcap) return tile;
  }
  return {};
}

}  // namespace tilewright

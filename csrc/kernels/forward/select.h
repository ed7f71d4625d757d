#pragma once

#include <cstdint>

#include "attention/host_device.h"

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
  int block_cycles;  // what a block costs a multiprocessor, about, and a tile besides its blocks: measured, and only
  int tile_cycles;   // compared between tiles of the same head dimensions
};

// One row for each instance in CMakeLists.txt. docs/forward.md has the measurements.
constexpr ForwardTile kForwardTiles[] = {
    {64, 64, false, 192, 96, 4, 3, 1700, 3700}, {64, 64, false, 128, 128, 3, 3, 1780, 2950},
    {64, 64, true, 128, 128, 3, 3, 0, 0},       {96, 96, false, 128, 128, 3, 2, 0, 0},
    {128, 128, false, 128, 128, 3, 2, 0, 0},    {128, 128, true, 128, 96, 3, 2, 0, 0},
    {192, 128, false, 128, 128, 2, 2, 0, 0},    {192, 128, true, 128, 128, 2, 2, 0, 0},
    {256, 256, false, 128, 64, 3, 2, 0, 0},     {256, 256, true, 128, 64, 3, 2, 0, 0},
};
constexpr int kNumForwardTiles = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

// What the choice between tiles depends on.
struct ForwardProblem {
  int head_dim;
  int head_dim_v;
  bool softcap;
  int64_t heads;  // times batch
  int seqlen_q;
  int seqlen_k;
  int left;   // of the window; a bound at seqlen_k or beyond is none
  int right;  // 0 is causal
  int multiprocessors;
};

// The time of the whole problem in a tile, in cycles: as many rounds of tiles as the multiprocessors need, or, where
// tiles differ or fill gaps, the work divided by them, but no less than the longest tile. A block on an edge of the
// window costs kEdgeCycles more.
constexpr double estimated_cycles(const ForwardTile& tile, const ForwardProblem& problem) {
  constexpr double kEdgeCycles = 1000;
  const bool left = problem.left < problem.seqlen_k, right = problem.right < problem.seqlen_k;
  const int64_t window = int64_t{problem.left} + problem.right + tile.tile_m;
  const int keys = left && right && window < problem.seqlen_k ? static_cast<int>(window) : problem.seqlen_k;
  const int edge_blocks = ceil_div(tile.tile_m, tile.tile_n);
  const double blocks = ceil_div(keys, tile.tile_n);
  // Below one edge alone the tiles grow from a few blocks to all.
  const double mean_blocks = left != right ? (blocks + edge_blocks) / 2 : blocks;
  const double overhead = tile.tile_cycles + (left + right) * edge_blocks * kEdgeCycles;
  const double longest = blocks * tile.block_cycles + overhead;
  const int64_t tiles = ceil_div(problem.seqlen_q, tile.tile_m) * problem.heads;
  if (!left && !right) {
    return static_cast<double>((tiles + problem.multiprocessors - 1) / problem.multiprocessors) * longest;
  }
  const double work =
      static_cast<double>(tiles) * (mean_blocks * tile.block_cycles + overhead) / problem.multiprocessors;
  return work > longest ? work : longest;
}

// The index of the tile in kForwardTiles that serves the problem soonest, -1 if none holds it. Of several head
// dimensions that hold it the first, which are the smallest.
constexpr int select_forward_tile(const ForwardProblem& problem) {
  int best = -1;
  for (int i = 0; i < kNumForwardTiles; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (problem.head_dim > tile.head_dim || problem.head_dim_v > tile.head_dim_v) continue;
    if (problem.softcap != tile.softcap) continue;
    if (best < 0) {
      best = i;
    } else if (tile.head_dim == kForwardTiles[best].head_dim &&
               estimated_cycles(tile, problem) < estimated_cycles(kForwardTiles[best], problem)) {
      best = i;
    }
  }
  return best;
}

// The row of an instance, -1 if there is none.
constexpr int forward_tile_index(int head_dim, int head_dim_v, bool softcap, int tile_m) {
  for (int i = 0; i < kNumForwardTiles; ++i) {
    const ForwardTile& tile = kForwardTiles[i];
    if (tile.head_dim == head_dim && tile.head_dim_v == head_dim_v && tile.softcap == softcap &&
        tile.tile_m == tile_m) {
      return i;
    }
  }
  return -1;
}

}  // namespace tilewright

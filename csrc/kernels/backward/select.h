#pragma once

#include <cstdint>

#include "attention/host_device.h"

namespace tilewright {

// How a block adds its part of dQ to global memory.
enum class AddDq {
  kRegisters,  // red.v4 from the accumulators
  kBulk,       // through shared memory, by cp.reduce.async.bulk
};

// The tile of one compiled instance of the Hopper backward, which serves every problem that fits into its head
// dimensions.
struct BackwardTile {
  int head_dim;  // padded, by the copy engine's zeros
  int head_dim_v;
  bool softcap;
  int tile_m;  // queries a step
  int tile_n;  // keys a block keeps: 64 a warpgroup; above head_dim_v 128, 64 in all
  int stages;  // of Q and dO
  int stages_k;
  AddDq add_dq;
};

// One row for each instance in CMakeLists.txt.
constexpr BackwardTile kBackwardTiles[] = {
    {64, 64, false, 128, 128, 2, 2, AddDq::kBulk},       {128, 128, false, 80, 128, 2, 1, AddDq::kBulk},
    {128, 128, false, 64, 128, 2, 2, AddDq::kBulk},      {128, 128, true, 64, 128, 2, 2, AddDq::kBulk},
    {192, 128, false, 64, 128, 2, 1, AddDq::kRegisters}, {192, 128, true, 48, 128, 2, 1, AddDq::kRegisters},
    {256, 256, false, 64, 64, 2, 1, AddDq::kRegisters},  {256, 256, true, 64, 64, 2, 1, AddDq::kRegisters},
};
constexpr int kNumBackwardTiles = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

// The row of an instance, -1 if there is none.
constexpr int backward_tile_index(int head_dim, int head_dim_v, bool softcap, int tile_m) {
  for (int i = 0; i < kNumBackwardTiles; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (tile.head_dim == head_dim && tile.head_dim_v == head_dim_v && tile.softcap == softcap &&
        tile.tile_m == tile_m) {
      return i;
    }
  }
  return -1;
}

// What the choice between tiles depends on.
struct BackwardProblem {
  int head_dim;
  int head_dim_v;
  bool softcap;
  int seqlen_q;
  int seqlen_k;
  int left;   // of the window; a bound at seqlen_k or beyond is none
  int right;  // 0 is causal
};

// The queries a step takes where there is a choice: 64, with the finest edges and the least padding, or 80, with fewer
// reads of shared memory for a product.
constexpr int select_backward_tile_m(const BackwardProblem& problem) {
  const bool full = problem.left >= problem.seqlen_k && problem.right >= problem.seqlen_k;
  return max_of(problem.seqlen_q, problem.seqlen_k) <= (full ? 512 : 1024) ? 64 : 80;
}

// The index in kBackwardTiles of the tile for a problem, -1 if none holds it: of the smallest head dimensions that do.
constexpr int select_backward_tile(const BackwardProblem& problem) {
  for (int i = 0; i < kNumBackwardTiles; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (problem.head_dim > tile.head_dim || problem.head_dim_v > tile.head_dim_v) continue;
    if (problem.softcap != tile.softcap) continue;
    const int wanted =
        backward_tile_index(tile.head_dim, tile.head_dim_v, tile.softcap, select_backward_tile_m(problem));
    return wanted < 0 ? i : wanted;
  }
  return -1;
}

}  // namespace tilewright

#pragma once

#include <cstdint>

#include "attention/host_device.h"

namespace tilewright {

// How a block adds its part of dQ to global memory.
enum class AddDq {
  kRegisters,   // red.v4 from the accumulators
  kBulk,        // through shared memory, by cp.reduce.async.bulk
  kSecondPass,  // not at all: a kernel of its own computes it (sm90_second_pass.cuh)
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

  // dK and dV leave by the copy engine.
  constexpr bool stores_by_copy() const { return add_dq != AddDq::kRegisters && tile_n == 128; }
};

constexpr int kSecondTileM = 128;  // queries a tile of the second pass

// One row for each instance in CMakeLists.txt.
constexpr BackwardTile kBackwardTiles[] = {
    {64, 64, false, 128, 128, 2, 2, AddDq::kBulk},      {64, 64, false, 64, 128, 4, 2, AddDq::kSecondPass},
    {96, 96, false, 80, 128, 2, 1, AddDq::kBulk},       {96, 96, false, 64, 128, 3, 2, AddDq::kSecondPass},
    {128, 128, false, 80, 128, 2, 1, AddDq::kBulk},     {128, 128, false, 64, 128, 3, 2, AddDq::kSecondPass},
    {128, 128, true, 64, 128, 2, 2, AddDq::kBulk},      {192, 128, false, 64, 128, 2, 1, AddDq::kRegisters},
    {192, 128, true, 48, 128, 2, 1, AddDq::kRegisters}, {256, 256, false, 64, 64, 2, 1, AddDq::kSecondPass},
    {256, 256, true, 64, 64, 2, 1, AddDq::kSecondPass},
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
  int sink_tokens;
  bool deterministic;
  int64_t heads;     // of queries, times batch
  int64_t heads_kv;  // times batch
  bool packed;       // the lengths are means
  int multiprocessors;

  // Every query sees every key.
  constexpr bool full() const { return left >= seqlen_k && right >= seqlen_k; }
  // Queries that see a key, at most.
  constexpr int span() const {
    const int64_t window = int64_t{left} + right + 1;
    return sink_tokens == 0 && window < seqlen_q ? static_cast<int>(window) : seqlen_q;
  }
};

// Whether dQ has a second pass, where there is a choice: it costs more products, and nothing around them; additions
// wait for each other where their order is fixed. It is worth it where neither heads nor tiles fill the
// multiprocessors, at head_dim 64 only in short sequences; and above in short sequences always, in longer ones where
// few key heads have several query heads each. Where lengths vary, most of a packed batch's work is in sequences of
// about twice the mean. With a window a tile is about as long as in a causal sequence of twice its size.
constexpr bool select_second_pass(const BackwardProblem& problem, int head_dim) {
  const int length = max_of(problem.seqlen_q, problem.seqlen_k);
  const int64_t enough = int64_t{2} * problem.multiprocessors;
  const int64_t tiles = problem.heads * ceil_div(length, 128) * (problem.full() ? 2 : 1);
  const bool few = 2 * problem.heads <= problem.multiprocessors && tiles <= enough;
  if (head_dim <= 64) return few && length <= (problem.full() ? 512 : 1024);
  if (few) return true;
  const int64_t typical = int64_t{problem.packed ? 2 : 1} * length;
  if (problem.full()) return typical <= 512;
  const bool few_keys =
      problem.heads_kv < problem.heads && problem.heads_kv * ceil_div(problem.seqlen_k, 128) <= enough;
  const int longest = problem.deterministic || few_keys ? 2048 : 1536;
  return typical <= longest || 2 * (int64_t{problem.left} + problem.right) <= longest;
}

// The index in kBackwardTiles of the tile for a problem, -1 if none holds it: of the smallest head dimensions that do.
constexpr int select_backward_tile(const BackwardProblem& problem) {
  for (int i = 0; i < kNumBackwardTiles; ++i) {
    const BackwardTile& tile = kBackwardTiles[i];
    if (problem.head_dim > tile.head_dim || problem.head_dim_v > tile.head_dim_v) continue;
    if (problem.softcap != tile.softcap) continue;
    const bool second_pass = select_second_pass(problem, tile.head_dim);
    for (int j = i; j < kNumBackwardTiles; ++j) {
      const BackwardTile& other = kBackwardTiles[j];
      const bool same = other.head_dim == tile.head_dim && other.head_dim_v == tile.head_dim_v;
      if (same && other.softcap == tile.softcap && (other.add_dq == AddDq::kSecondPass) == second_pass) return j;
    }
    return i;  // no choice
  }
  return -1;
}

// What the choice of whole heads depends on: a block takes a key head with all its tiles of keys, keeps dQ's sums of
// the head in the L2 cache, and writes dQ itself (whole_heads.cuh).
struct BackwardHeads {
  bool packed;
  bool waits;        // blocks that share a head would wait for each other: a fixed order, and not every query sees
                     // every key
  int64_t heads_kv;  // times batch
  int group;         // query heads a key head
  int seqlen_q;
  int seqlen_k;
  int span;  // queries of a sequence that see a key, at most
  int multiprocessors;
};

// dQ's sums of the heads at work, which should stay in the L2 cache (50 MB). Beyond the smaller limit they no longer do
// all the time, which costs less than to wait.
constexpr int64_t kWholeHeadsBytes = 27 << 20;
constexpr int64_t kWholeHeadsBytesWaiting = 36 << 20;

// So many multiprocessors take heads at a time.
constexpr int64_t blocks_of_whole_heads(const BackwardHeads& heads) {
  return heads.heads_kv < heads.multiprocessors ? heads.heads_kv : heads.multiprocessors;
}

// Floats of dQ's sums for them.
constexpr int64_t sums_of_whole_heads(const BackwardTile& tile, const BackwardHeads& heads) {
  const int64_t rows = int64_t{ceil_div(heads.seqlen_q, tile.tile_m)} * tile.tile_m;
  return blocks_of_whole_heads(heads) * heads.group * rows * tile.head_dim;
}

// The sums must fit, and the last round of heads must leave few multiprocessors idle: at most 5% of all rounds, or as
// little as there can be with four rounds. A head of one tile is no more work than its tile.
constexpr bool takes_whole_heads(const BackwardTile& tile, const BackwardHeads& heads) {
  if (heads.packed || heads.heads_kv < 1 || heads.seqlen_q < 1 || heads.seqlen_k < 1) return false;
  if (tile.add_dq == AddDq::kSecondPass) return false;
  if (sums_of_whole_heads(tile, heads) > (heads.waits ? kWholeHeadsBytesWaiting : kWholeHeadsBytes) / 4) return false;
  if (heads.seqlen_k <= tile.tile_n || heads.heads_kv >= int64_t{4} * heads.multiprocessors) return true;
  const int64_t rounds = (heads.heads_kv + heads.multiprocessors - 1) / heads.multiprocessors;
  return rounds * heads.multiprocessors * 100 <= heads.heads_kv * 105;
}

// Into how many splits the query heads of a key head are cut, each with tiles of keys of its own (splits.cuh): few
// tiles leave multiprocessors idle. Where all tiles are alike, what counts is the rounds of tiles times the heads of
// one, and a tenth of them at least must be gained. Else the longest tile, twice as long as the mean, should take no
// longer than all of them on all multiprocessors; and many heads a tile are slower than few, unless it sees few queries
// of each. A second pass that has few tiles of queries itself does better beside the first one's longest tiles than
// after it.
constexpr int select_splits(const BackwardTile& tile, const BackwardHeads& heads, int64_t tiles, bool uneven) {
  constexpr int kHeadsATile = 4, kShort = 2048, kMostSplits = 64;
  const int64_t blocks = heads.multiprocessors;
  const int64_t query_tiles = heads.heads_kv * heads.group * ceil_div(heads.seqlen_q, kSecondTileM);
  const bool second_pass = tile.add_dq == AddDq::kSecondPass;
  const bool beside = second_pass && query_tiles <= 2 * blocks;
  const bool any_heads = second_pass || (!heads.packed && heads.span < kShort);
  int best = 1;
  int64_t least = (tiles + blocks - 1) / blocks * heads.group;
  for (int splits = 1; splits <= heads.group && splits <= kMostSplits; ++splits) {
    const int heads_a_tile = ceil_div(heads.group, splits);
    if (ceil_div(heads.group, heads_a_tile) != splits) continue;  // as many heads a tile in fewer splits
    if (uneven) {
      best = splits;
      if ((any_heads || heads_a_tile <= kHeadsATile) && 4 * tiles * splits >= (beside ? 3 : 7) * blocks) break;
      continue;
    }
    const int64_t heads_in_turn = (tiles * splits + blocks - 1) / blocks * heads_a_tile;
    if (10 * heads_in_turn > 9 * least) continue;
    best = splits;
    least = heads_in_turn;
  }
  return best;
}

}  // namespace tilewright

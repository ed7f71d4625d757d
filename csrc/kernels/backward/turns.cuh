#pragma once

#include "attention/query_range.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/load.h"
#include "ptx/reduce.h"
#include "ptx/tma.h"

namespace tilewright::backward {

// The order of dQ's sums where it is to be the same in every run (KernelParams::turns).
//
// Each part of a dQ tile that one warp adds to at a time (64 of its columns, 16 of these) has a counter: how many tiles
// of keys have added to it. Tile n of the keys adds when the counter says that all the tiles before it have which
// visit these queries (key_tiles_before), and counts itself. So a sum has its terms in the order of the keys.
//
// No race: a warp adds after its lane 0 has seen the counter (acquire), and counts (release) after its additions are
// done. One warp waits for one warp; warps of a block have nothing to agree on.
//
// No deadlock: blocks take tiles from a counter, in an order in which for each head n grows, and work them off in that
// order. Suppose some tiles never end. Take the first of them: its block has ended the tiles it took before, and is at
// work on it. It waits only for tiles before it, which have all ended, and counted themselves: a warp leaves nothing
// pending at the end of a tile. So it ends. That needs no two blocks on the GPU at the same time.
//
// No queue: every tile walks its queries from the last it sees to the first. When tile n comes to a tile of queries,
// n - 1 was there a step before (blocks that start together draw apart by a step, once), and has counted itself half a
// step later, when its addition is done: nobody waits for that either.
template <class C>
__device__ __forceinline__ int turn_of(const KernelParams& p, const TileWork& work, int tile) {
  const int first_query = (tile - work.first_tile) % p.head_tiles * C::kTileM;
  const int last_query = min_of(first_query + C::kTileM, work.seqlen_q) - 1;
  return key_tiles_before(VisibleKeys(p.window, work.seqlen_q, work.seqlen_k), first_query, last_query,
                          work.first_key / C::kTileN, C::kTileN);
}

// By lane 0 of a warp, before the warp adds. kBulk: by a bulk copy. `pending` is the warp's own, in shared memory: the
// counter of an addition that is not yet counted, or null.
template <bool kBulk>
__device__ __forceinline__ void begin_turn(int* counter, int turn, int*& pending) {
  while (ptx::load_acquire(counter) != turn) {
  }
  if constexpr (kBulk) ptx::fence_proxy_async_global();
  pending = counter;
}

// By lane 0, some time after; the warp has met since it added.
template <bool kBulk>
__device__ __forceinline__ void end_turn(int*& pending) {
  int* const counter = pending;
  if (!counter) return;
  if constexpr (kBulk) ptx::bulk_wait_group();
  ptx::reduce_add_release(counter, 1);
  pending = nullptr;
}

}  // namespace tilewright::backward

#pragma once

#include "attention/query_range.h"
#include "kernels/backward/sm90_config.cuh"
#include "ptx/load.h"
#include "ptx/mbarrier.h"
#include "ptx/reduce.h"

namespace tilewright::backward {

// The order of dQ's sums where it is to be the same in every run (KernelParams::turns).
//
// Each tile of dQ has a counter: how many tiles of keys have added to it. Tile n of the keys adds when the counter says
// that all the tiles before it have which visit these queries (key_tiles_before), and counts itself. So a sum has its
// terms in the order of the keys.
//
// Two warps beside the producer keep the counters, a thread each, so that no consumer waits for global memory: one sees
// that a step's turn has come (turn_full), the other waits until every consumer warp has done its share of the step's
// addition (added), counts it, and says so to the first (counted), which is never more than kTurnSlots steps ahead.
//
// No race: a consumer adds after turn_full, which the keeper completes after it has seen the counter (acquire), and
// arrives at `added` when its additions are done; the other keeper counts (release) after that.
//
// No deadlock: blocks take tiles from a counter, in an order in which for each head n grows, and work them off in that
// order. Suppose some tiles never end. Take the first of them: its block has ended the tiles it took before, and is at
// work on it. It waits only for tiles before it, which have all ended, and were counted: a warp leaves nothing pending
// at the end of a tile. So it ends. That needs no two blocks on the GPU at the same time.
//
// No queue: every tile walks its queries from the last it sees to the first. When tile n comes to a tile of queries,
// n - 1 was there a step before (blocks that start together draw apart, once).
template <class C>
__device__ __forceinline__ int turn_of(const KernelParams& p, const TileWork& work, int tile) {
  const int first_query = (tile - work.first_tile) % p.head_tiles * C::kTileM;
  const int last_query = min_of(first_query + C::kTileM, work.seqlen_q) - 1;
  return key_tiles_before(VisibleKeys(p.window, work.seqlen_q, work.seqlen_k), first_query, last_query,
                          work.first_key / C::kTileN, C::kTileN);
}

template <class C>
struct TurnKeeper {
  const KernelParams& p;
  SharedStorage<C>& shared;
  uint32_t step = 0;

  __device__ __forceinline__ void announce() {
    walk([&](const TileWork& work, int tile) {
      ptx::mbarrier_wait(&shared.counted[step % kTurnSlots], (step / kTurnSlots + 1) % 2);
      const int turn = turn_of<C>(p, work, tile);
      while (ptx::load_acquire(p.turns + tile) != turn) {
      }
      ptx::mbarrier_arrive(&shared.turn_full[step % kTurnSlots]);
    });
  }
  __device__ __forceinline__ void count() {
    walk([&](const TileWork&, int tile) {
      ptx::mbarrier_wait(&shared.added[step % kTurnSlots], step / kTurnSlots % 2);
      ptx::reduce_add_release(p.turns + tile, 1);
      ptx::mbarrier_arrive(&shared.counted[step % kTurnSlots]);
    });
  }

 private:
  // The steps of the consumers.
  template <class Visit>
  __device__ __forceinline__ void walk(const Visit& visit) {
    for (uint32_t number = 0;; ++number) {
      const int slot = number % C::kTileSlots;
      ptx::mbarrier_wait(&shared.tile_full[slot], number / C::kTileSlots % 2);
      const TileWork& work = shared.tile[slot];
      if (work.last) return;
      for (int head = 0; head < p.group; ++head) {
        for (int i = 0; i < work.walk.count; ++i, ++step) {
          visit(work, work.first_tile + head * p.head_tiles + work.walk.tile_at(i));
        }
      }
      ptx::mbarrier_arrive(&shared.tile_empty[slot]);
    }
  }
};

}  // namespace tilewright::backward

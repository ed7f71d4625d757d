#pragma once

#include "attention/query_range.h"
#include "kernels/backward/sm90_config.cuh"
#include "ptx/load.h"
#include "ptx/mbarrier.h"
#include "ptx/reduce.h"
#include "ptx/tma.h"

namespace tilewright::backward {

// The order of dQ's sums where it is to be the same in every run (KernelParams::turns).
//
// Each tile of dQ has two counters: how many tiles of keys have added to it, one for the part of each warpgroup. Tile n
// of the keys adds when the counter says that all the tiles before it have which visit these queries
// (key_tiles_before), and counts itself. So a sum has its terms in the order of the keys. The first tile stores instead
// (QueryRange::first_fresh): no zeros are needed, except in dQ where the counters stay 0.
//
// Three warps beside the producer do that, a thread each, so that no consumer waits for global memory:
//
//     announcer   waits until a step's turn has come, for each warpgroup's part; turn_full
//     adders      one for each warpgroup: waits for that and for what its warpgroup has staged of the step's dQ, and
//                 lets the copy engine add it; unstaged, when the place is free again. Counts the step when it has been
//                 added; counted, which the announcer waits for, kTurnSlots steps later
//
// Where the consumers add from their registers, as they do with the last step of a tile of keys, they wait for
// turn_full themselves, and what they stage is the word that they have added.
//
// No race: an addition comes after the announcer has read the counter (acquire), and is counted (release) when it is
// done.
//
// No deadlock: blocks take tiles from a counter, in an order in which for each head n grows, and work them off in that
// order. Suppose some tiles never end. Take the first of them: its block has ended the tiles it took before, and is at
// work on it. It waits only for tiles before it, which have all ended, and were counted. So it ends. That needs no two
// blocks on the GPU at the same time.
//
// No barrier two phases ahead of who waits for it: a warp stages a step only when it has seen the one before unstaged,
// and that comes only when all warps of its warpgroup have staged it; and nobody is kTurnSlots steps behind the
// announcer.
//
// No queue: every tile walks its queries from the last it sees to the first. When tile n comes to a tile of queries,
// n - 1 was there a few steps before (blocks that start together draw apart, once).
template <class C>
struct TurnRole {
  const KernelParams& p;
  SharedStorage<C>& shared;
  uint32_t step = 0;

 protected:
  // The steps of the consumers: visit(work, i, first_tile, last), tile i of the walk of a head whose tiles of dQ begin
  // with first_tile.
  template <class Visit>
  __device__ __forceinline__ void walk(const Visit& visit) {
    for (uint32_t number = 0;; ++number) {
      const int slot = number % C::kTileSlots;
      ptx::mbarrier_wait(&shared.tile_full[slot], number / C::kTileSlots % 2);
      const TileWork& work = shared.tile[slot];
      if (work.last) return;
      const int heads = p.heads_of(work.split);
      for (int head = 0; head < heads; ++head) {
        const bool last_head = head + 1 == heads;
        for (int i = 0; i < work.walk.count; ++i, ++step) {
          visit(work, i, work.first_tile + head * p.head_tiles, last_head && i + 1 == work.walk.count);
        }
      }
      ptx::mbarrier_arrive(&shared.tile_empty[slot]);
    }
  }
  __device__ __forceinline__ int slot() const { return step % kTurnSlots; }
  __device__ __forceinline__ uint32_t parity() const { return step / kTurnSlots % 2; }
};

template <class C>
struct TurnAnnouncer : TurnRole<C> {
  using Base = TurnRole<C>;
  using Base::p, Base::shared, Base::slot, Base::parity;

  __device__ __forceinline__ void run() {
    this->walk([&](const TileWork& work, int i, int first_tile, bool) {
      ptx::mbarrier_wait(&shared.counted[slot()], parity() ^ 1);
      const int tile = work.walk.tile_at(i), turn = turn_of(work, tile);
      bool waits[C::kWarpgroups] = {true, true};
      while (waits[0] || waits[1]) {
        const int2 added = ptx::load_acquire(p.turns + first_tile + tile);
        announce(0, added.x == turn, waits);
        announce(1, added.y == turn, waits);
      }
    });
  }

 private:
  __device__ __forceinline__ void announce(int warpgroup, bool its_turn, bool (&waits)[C::kWarpgroups]) const {
    if (!waits[warpgroup] || !its_turn) return;
    waits[warpgroup] = false;
    ptx::fence_proxy_async_global();
    ptx::mbarrier_arrive(&shared.turn_full[warpgroup][slot()]);
  }
  __device__ __forceinline__ int turn_of(const TileWork& work, int tile) const {
    const int first_query = tile * C::kTileM;
    const int last_query = min_of(first_query + C::kTileM, work.seqlen_q) - 1;
    return key_tiles_before(VisibleKeys(p.window, work.seqlen_q, work.seqlen_k), first_query, last_query,
                            work.first_key / C::kTileN, C::kTileN);
  }
};

template <class C, int kWarpgroup>
struct TurnAdder : TurnRole<C> {
  using Base = TurnRole<C>;
  using Base::p, Base::shared, Base::slot, Base::parity, Base::step;

  __device__ __forceinline__ void run() {
    this->walk([&](const TileWork& work, int i, int first_tile, bool last) {
      const int tile = work.walk.tile_at(i);
      if (!C::kBulk || last) {
        ptx::mbarrier_wait(&shared.staged[kWarpgroup], step % 2);
        ptx::mbarrier_arrive(&shared.unstaged[kWarpgroup]);
      } else if constexpr (C::kBulk) {
        ptx::mbarrier_wait(&shared.turn_full[kWarpgroup][slot()], parity());
        add(p.dq_sum + int64_t{first_tile + tile} * kFloats, tile >= work.first_fresh);
      }
      int2& counters = p.turns[first_tile + tile];
      ptx::reduce_add_release(kWarpgroup == 0 ? &counters.x : &counters.y, 1);
      ptx::mbarrier_arrive(&shared.counted[slot()]);
    });
  }

 private:
  static constexpr int kFloats = C::kTileM * C::kHeadDim;

  // The warpgroup's unit of dQ, which may be cut off.
  __device__ __forceinline__ void add(float* sums, bool fresh) {
    constexpr int kBegin = kWarpgroup * C::kUnitFloats;
    constexpr uint32_t kBytes = min_of(C::kUnitFloats, kFloats - kBegin) * sizeof(float);
    const float* from = shared.on_its_way.data + kBegin;
    ptx::mbarrier_wait(&shared.staged[kWarpgroup], step % 2);
    if (fresh) {
      ptx::bulk_store(sums + kBegin, from, kBytes);
    } else {
      ptx::bulk_reduce_add(sums + kBegin, from, kBytes);
    }
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read();
    ptx::mbarrier_arrive(&shared.unstaged[kWarpgroup]);
    ptx::bulk_wait_group();
  }
};

}  // namespace tilewright::backward

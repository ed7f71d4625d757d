#pragma once

#include "kernels/forward/sm90_config.cuh"
#include "ptx/grid_dependency.h"
#include "ptx/mbarrier.h"
#include "tile/load_shared.h"
#include "tile/pipeline.h"

namespace tilewright::forward {

// The one thread that schedules the tiles and loads Q, K and V.
template <class C>
struct Producer {
  const KernelParams& p;
  SharedStorage<C>& shared;
  PipelineState<C::kStagesK> k_at{};
  PipelineState<C::kStagesV> v_at{};
  PipelineState<C::kTileSlots> tile_at{};
  PipelineState<1> q_at{};

  static constexpr int kNone = -1;
  // V of a block is loaded after K of the next one, also across tiles that see keys: the order in which they are
  // consumed.
  int v_head = kNone;
  RowCoordinates v_rows;
  bool lent = false;  // the buffers behind the last V loaded, for O

  __device__ __forceinline__ void run() {
    // A packed batch's list is made by the kernel before this one; otherwise the first tile is known already.
    if (p.packed_tiles) ptx::wait_for_prerequisite_grids();
    const int tiles = p.packed_tiles ? *p.num_packed_tiles : p.tiles;
    const int count = tiles * p.order.heads;
    int index = blockIdx.x;
    for (int round = 1; index < count; ++round) {
      const TileWork work = work_at(index, tiles);
      // Memory is read from the first load on, and written when that has arrived, or as soon as a tile that sees no key
      // is announced.
      if (round == 1 && work.range.count() == 0) ptx::wait_for_prerequisite_grids();
      const TileWork& announced = announce(work);
      if (round == 1) ptx::wait_for_prerequisite_grids();
      index = load_tile(announced, round);
    }
    TileWork end{};
    end.last = true;
    load_tile(announce(end), 0);
  }

  // The static order goes back and forth over the blocks, so that no block always gets the longest of a round.
  __device__ __forceinline__ int next_index(int round) const {
    const int blocks = gridDim.x, block = blockIdx.x;
    if (p.next_tile) return atomicAdd(p.next_tile, 1) + blocks;
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
  }

  __device__ __forceinline__ TileWork work_at(int index, int tiles) const {
    const TileOrder::Tile at = p.order.at(index, tiles);
    TileWork work{};
    if (p.packed_tiles) {
      const PackedTile tile = p.packed_tiles[at.tile];
      work.first_query = tile.first_query;
      work.head = at.head;
      work.q_begin = tile.q_begin;
      work.seqlen_q = tile.seqlen_q;
      work.k_begin = tile.k_begin;
      work.seqlen_k = tile.seqlen_k;
    } else {
      work.first_query = (tiles - 1 - at.tile) * C::kTileM;
      work.batch = p.heads_q.divide(at.head);
      work.head = at.head - work.batch * static_cast<int>(p.heads_q.divisor);
      work.seqlen_q = p.seqlen_q;
      work.seqlen_k = p.seqlen_k;
    }
    const VisibleKeys keys(p.window, work.seqlen_q, work.seqlen_k);
    const int last_query = min_of(work.first_query + C::kTileM, work.seqlen_q) - 1;
    work.range = BlockRange::of(keys, work.first_query, last_query, C::kTileN);
    return work;
  }

  // Returns the announced copy: what stays in shared memory takes no registers, of which the producer has few.
  __device__ __forceinline__ const TileWork& announce(const TileWork& work) {
    ptx::mbarrier_wait(&shared.tile_empty[tile_at.stage], tile_at.parity ^ 1);
    TileWork& announced = shared.tile[tile_at.stage];
    announced = work;
    ptx::mbarrier_arrive(&shared.tile_full[tile_at.stage]);
    tile_at.advance();
    return announced;
  }

  // Returns the index of the next tile. The dynamic order takes it just before the last block: a tile that is taken
  // early waits while others have nothing to do, and after it the answer would be waited for.
  __device__ __forceinline__ int load_tile(const TileWork& work, int round) {
    const int head_kv = p.heads_per_kv.divide(work.head);
    const int blocks = work.range.count();
    if (blocks == 0) {
      if (v_head != kNone) load_v(true);
      v_head = kNone;
      return work.last ? 0 : next_index(round);
    }
    int next = 0;
    // A consumer with Q in registers frees its buffer early and asks for the next Q together with K_0; otherwise Q's
    // buffer becomes free only when the tile before ends, and K_1 must not wait behind it.
    for (int step = 0; step < blocks; ++step) {
      const int key = work.range.block_at(step) * C::kTileN;
      const RowCoordinates rows = p.packed_tiles ? RowCoordinates::packed(work.k_begin, work.seqlen_k, key)
                                                 : RowCoordinates::plain(key, work.batch);
      if (step + 1 == blocks) next = next_index(round);
      ptx::mbarrier_wait(&shared.k_empty[k_at.stage], k_at.parity ^ 1);
      load_shared(shared.k[k_at.stage], &p.k, &shared.k_full[k_at.stage], head_kv, rows);
      k_at.advance();
      if (step == 0 && C::kQInRegisters) load_q(work);
      if (v_head != kNone) load_v(step == 0);
      if (step == 0 && !C::kQInRegisters) load_q(work);
      v_head = head_kv;
      v_rows = rows;
    }
    return next;
  }

  __device__ __forceinline__ void load_q(const TileWork& work) {
    for (int i = 0; i < C::kWarpgroups; ++i) {
      const int query = work.first_query + 64 * i;
      const RowCoordinates rows = p.packed_tiles ? RowCoordinates::packed(work.q_begin, work.seqlen_q, query)
                                                 : RowCoordinates::plain(query, work.batch);
      ptx::mbarrier_wait(&shared.q_empty[i], q_at.parity ^ 1);
      load_shared(shared.q[i], &p.q, &shared.q_full[i], work.head, rows);
    }
    q_at.advance();
  }

  __device__ __forceinline__ void load_v(bool last_of_tile) {
    if constexpr (C::kOutInV) {
      // The consumers take the buffers behind a tile's last V for O by themselves; the ring goes on when they have. (To
      // wait for v_empty alone would not do: it may be two phases behind.)
      if (lent) {
        for (int i = 0; i < C::kOutInV; ++i) {
          ptx::mbarrier_wait(&shared.v_full[v_at.stage], v_at.parity);
          v_at.advance();
        }
      }
      lent = last_of_tile;
    }
    ptx::mbarrier_wait(&shared.v_empty[v_at.stage], v_at.parity ^ 1);
    load_shared(shared.v[v_at.stage], &p.v, &shared.v_full[v_at.stage], v_head, v_rows);
    v_at.advance();
  }
};

}  // namespace tilewright::forward

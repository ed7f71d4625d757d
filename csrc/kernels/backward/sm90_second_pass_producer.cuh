#pragma once

#include "kernels/backward/sm90_second_pass_config.cuh"
#include "ptx/mbarrier.h"
#include "tile/load_shared.h"

namespace tilewright::backward {

// The one thread that schedules the tiles and loads everything.
template <class C>
struct SecondPassProducer {
  const SecondPassParams& p;
  SecondPassStorage<C>& shared;
  // Registers are scarce: everything but this stays in shared memory.
  uint32_t steps = 0;  // blocks of K and V loaded

  __device__ __forceinline__ void run() {
    int index = blockIdx.x;
    uint32_t number = 0, loaded = 0;
    while (index < tiles_of_head() * p.order.heads) {
      QueryTileWork& work = next_slot(number);
      work.loaded = loaded;
      work.last = false;
      describe(work, index);
      publish(work.number);
      if (work.range.count() > 0) load_tile(work);
      unsigned blocks;  // not from gridDim: the compiler would keep it all the time
      asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
      index = atomicAdd(p.next_tile, 1) + static_cast<int>(blocks);
      number = work.number + 1;
      loaded = work.loaded + (work.range.count() > 0);
    }
    next_slot(number).last = true;
    publish(number);
  }

  __device__ __forceinline__ QueryTileWork& next_slot(uint32_t number) {
    ptx::mbarrier_wait(&shared.tile_empty[number % C::kTileSlots], (number / C::kTileSlots + 1) % 2);
    shared.tile[number % C::kTileSlots].number = number;
    return shared.tile[number % C::kTileSlots];
  }
  __device__ __forceinline__ void publish(uint32_t number) {
    ptx::mbarrier_arrive(&shared.tile_full[number % C::kTileSlots]);
  }

  __device__ __forceinline__ int tiles_of_head() const { return p.packed ? *p.num_packed : p.tiles; }

  __device__ __forceinline__ void describe(QueryTileWork& work, int index) const {
    const TileOrder::Tile at = p.order.at(index, tiles_of_head());
    if (p.packed) {
      const PackedPairTile& tile = p.packed[at.tile];
      work.first_query = tile.first_row;
      work.head = at.head;
      work.first_tile = at.head * p.first.head_tiles + tile.first_tile + tile.first_row / C::kRows;
      work.batch = 0;
      forget_values();
      work.q_begin = tile.q_begin;
      work.seqlen_q = tile.seqlen_q;
      work.k_begin = tile.k_begin;
      work.seqlen_k = tile.seqlen_k;
    } else {
      const int first_query = (p.tiles - 1 - at.tile) * C::kTileM;
      const int batch = p.heads_q.divide(at.head);
      work.first_query = first_query;
      work.head = at.head - batch * static_cast<int>(p.heads_q.divisor);
      work.first_tile = at.head * p.first.head_tiles + first_query / C::kRows;
      work.batch = batch;
      work.q_begin = 0;
      work.seqlen_q = p.first.seqlen_q;
      work.k_begin = 0;
      work.seqlen_k = p.first.seqlen_k;
    }
    forget_values();
    const VisibleKeys keys(p.first.window, work.seqlen_q, work.seqlen_k);
    const int last_query = min_of(work.first_query + C::kTileM, work.seqlen_q) - 1;
    work.range = BlockRange::of(keys, work.first_query, last_query, C::kTileN);
  }

  // What has been written so far is read again where it is used.
  __device__ __forceinline__ static void forget_values() { asm volatile("" ::: "memory"); }

  // K_0 Q dO V_0 K_1 V_1 …: in the order in which buffers become free, also across tiles.
  __device__ __forceinline__ void load_tile(const QueryTileWork& work) {
    const int head_kv = p.heads_per_kv.divide(work.head);
#pragma unroll 1
    for (int step = 0; step < work.range.count(); ++step, ++steps) {
      const int key = work.range.block_at(step) * C::kTileN;
      const int k = steps % C::kStagesK, v = steps % C::kStagesV;
      ptx::mbarrier_wait(&shared.k_empty[k], (steps / C::kStagesK + 1) % 2);
      load_shared(shared.k[k], &p.k, &shared.k_full[k], head_kv, work.key(p.packed, key));
      if (step == 0) load_rows(work);
      ptx::mbarrier_wait(&shared.v_empty[v], (steps / C::kStagesV + 1) % 2);
      load_shared(shared.v[v], &p.v, &shared.v_full[v], head_kv, work.key(p.packed, key));
    }
  }
  __device__ __forceinline__ void load_rows(const QueryTileWork& work) {
#pragma unroll 1
    for (int i = 0; i < C::kWarpgroups; ++i) {
      const RowCoordinates rows = work.query(p.packed, work.first_query + C::kRows * i);
      ptx::mbarrier_wait(&shared.q_empty[i], (work.loaded + 1) % 2);
      load_shared(shared.q[i], &p.first.q, &shared.q_full[i], work.head, rows);
      ptx::mbarrier_wait(&shared.dout_empty[i], (work.loaded + 1) % 2);
      load_shared(shared.dout[i], &p.first.dout, &shared.dout_full[i], work.head, rows);
    }
  }
};

}  // namespace tilewright::backward

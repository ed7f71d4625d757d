#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/zeros.cuh"
#include "ptx/grid_dependency.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "tile/load_shared.h"

namespace tilewright::backward {

// The one thread that schedules the tiles of keys and loads K, V and, for each, the queries' Q, dO, lse and delta.
template <class C>
struct Producer {
  const KernelParams& p;
  SharedStorage<C>& shared;
  // Registers are scarce: where the producer stands in the rings follows from this counter and the tile's work, which
  // stays in shared memory.
  uint32_t steps = 0;  // tiles of Q and dO loaded

  __device__ __forceinline__ void run() {
    // Where blocks wait for each other, each must be at work on what it has taken: even the first tile comes from the
    // counter. Else neighbours begin with neighbouring tiles, and read the same rows at the same time; and the first
    // tile of a plain batch is known before the kernel before has ended, and loaded but for what that one computes.
    const bool early = !waiting() && !p.packed;
    if (!early) start();
    const int first = static_cast<int>(blockIdx.x);
    int index = p.dq ? first * p.tiles : waiting() ? take() : first;
    uint32_t number = 0, loaded = 0;
    while (index < p.tiles_of_head() * p.order.heads) {
      TileWork& work = next_slot(number);
      work.loaded = loaded;
      work.index = index;
      work.last = false;
      describe(work, index);
      if (p.dq) describe_sums(work);
      const bool starts = early && number == 0;
      if (starts && work.walk.count == 0) start();  // its gradients are written at once
      publish(work.number);
      load_tile(work, starts);
      // Not before: with turns others wait for a tile from when it has been taken.
      index = p.dq ? work.next : take() + (waiting() ? 0 : blocks());
      number = work.number + 1;
      loaded = work.loaded + (work.walk.count > 0);
    }
    next_slot(number).last = true;
    publish(number);
  }

  // From here on memory is written, and read that the kernel before has written. A second pass may start as soon as all
  // blocks know that what both read is there.
  __device__ __forceinline__ static void start() {
    ptx::wait_for_prerequisite_grids();
    if constexpr (C::kSecondPass) ptx::launch_dependent_grids();
  }
  __device__ __forceinline__ bool waiting() const { return p.waiting; }
  __device__ __forceinline__ bool in_turns() const { return !C::kSecondPass && p.turns; }
  __device__ __forceinline__ int take() const { return atomicAdd(p.next_tile, 1); }

  // The slot of a block's tile `number`, once the tile that was there is done.
  __device__ __forceinline__ TileWork& next_slot(uint32_t number) {
    const int slot = number % C::kTileSlots;
    ptx::mbarrier_wait(&shared.tile_empty[slot], (number / C::kTileSlots + 1) % 2);
    shared.tile[slot].number = number;
    return shared.tile[slot];
  }
  __device__ __forceinline__ void publish(uint32_t number) {
    ptx::mbarrier_arrive(&shared.tile_full[number % C::kTileSlots]);
  }

  __device__ __forceinline__ void describe(TileWork& work, int index) const {
    const TileOrder::Tile at = in_turns() && p.overlapping ? p.order.at_overlapping(index, p.tiles_of_head())
                                                           : p.order.at(index, p.tiles_of_head());
    // Of the heads of the order all key heads with their first split come first, then with their second, …
    int head = at.head, split = 0;
    for (; head >= p.all_kv; head -= p.all_kv) ++split;
    work.split = static_cast<uint16_t>(split);
    work.split_tile = head * p.tiles + at.tile;
    work.first_tile = (head * p.group + p.first_head(split)) * p.head_tiles;
    if (p.packed) {
      const PackedPairTile& tile = p.packed[at.tile];
      work.first_tile += tile.first_tile;
      work.head_kv = head;
      work.q_begin = tile.q_begin;
      work.seqlen_q = tile.seqlen_q;
      forget_values();
      work.first_key = tile.first_row;
      work.k_begin = tile.k_begin;
      work.seqlen_k = tile.seqlen_k;
      work.batch = 0;
    } else {
      const int batch = p.heads_kv.divide(head);
      work.first_key = at.tile * C::kTileN;
      work.head_kv = head - batch * static_cast<int>(p.heads_kv.divisor);
      work.batch = batch;
      work.q_begin = 0;
      work.seqlen_q = p.seqlen_q;
      work.k_begin = 0;
      work.seqlen_k = p.seqlen_k;
    }
    forget_values();
    const QueryRange range =
        QueryRange::of(p.window, work.seqlen_q, work.seqlen_k, work.first_key, C::kTileN, C::kTileM);
    // Downwards and with a fixed order of the sums, blocks follow each other over the queries a step apart.
    work.walk = in_turns() ? QueryWalk::downwards(range) : QueryWalk::upwards(range, work.first_key / C::kTileN);
    work.first_sum = work.first_tile;
    work.first_fresh = range.end;
    if (in_turns()) work.first_fresh = first_fresh(work, range);
  }
  // Whole heads: after a tile of keys comes the next of its head, after the last the first of the block's next head.
  // The tiles walk the queries upwards and downwards in turn: what one has read and added to last is still in the L2
  // cache when the next one begins.
  __device__ __forceinline__ void describe_sums(TileWork& work) const {
    const QueryRange range =
        QueryRange::of(p.window, work.seqlen_q, work.seqlen_k, work.first_key, C::kTileN, C::kTileM);
    work.walk = work.first_key / C::kTileN % 2 ? QueryWalk::downwards(range) : QueryWalk::upwards(range, 0);
    work.first_fresh = first_fresh(work, range);
    forget_values();
    unsigned block;  // not from blockIdx: the compiler would keep it all the time
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    work.first_sum = static_cast<int>(block) * p.group * p.head_tiles;
    work.next = work.index + 1;
    if (work.first_key + C::kTileN >= work.seqlen_k) work.next += (blocks() - 1) * p.tiles;
  }
  __device__ __forceinline__ int first_fresh(const TileWork& work, const QueryRange& range) const {
    return range.first_fresh(p.window, work.seqlen_q, work.seqlen_k, work.first_key, C::kTileM);
  }
  __device__ __forceinline__ static int blocks() {
    unsigned count;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
    return static_cast<int>(count);
  }
  // What has been written so far is read again where it is used: all of it at once would take too many registers.
  __device__ __forceinline__ static void forget_values() { asm volatile("" ::: "memory"); }

  // Q_0 V dO_0 K Q_1 dO_1 …: the buffers of Q, dO and V become free before the tile of keys in work is done, K's only
  // with its last product. Where K has two buffers, or is free as early, it goes first.
  // `starts`: behind the first loads, of what the call was given. It is there: the kernel before has let this one begin
  // when all before it had ended.
  __device__ __forceinline__ void load_tile(const TileWork& work, bool starts) {
    const int heads = p.heads_of(work.split);
    const int first_head = work.head_kv * p.group + p.first_head(work.split);
    for (int head = 0; head < heads; ++head) {
      for (int step = 0; step < work.walk.count; ++step) {
        const bool first = head == 0 && step == 0;
        const int stage = steps % C::kStages;
        const uint32_t empty_parity = (steps / C::kStages + 1) % 2;
        const int tile = work.walk.tile_at(step);
        const int number = work.first_tile + head * p.head_tiles + tile;
        const int sum = work.first_sum + head * p.head_tiles + tile;
        StepWork& of = shared.step[steps % C::kStepSlots];
        of.sums = p.dq_sum + int64_t{sum} * (C::kTileM * C::kHeadDim);
        of.masked = work.walk.is_full(step) ? -1 : tile * C::kTileM;
        of.fresh = tile >= work.first_fresh;

        // The consumers add to the sums in their second step, or after the only one.
        if constexpr (!C::kSecondPass) {
          if (head * work.walk.count + step == (heads * work.walk.count > 1)) wait_for_zeros(p, work);
        }
        if (first && kEarlyK) load_k(work);
        ptx::mbarrier_wait(C::kWide ? &shared.dout_empty[stage] : &shared.q_empty[stage], empty_parity);
        load_shared(shared.q_of(steps), &p.q, &shared.q_full[stage], first_head + head,
                    work.query(p.packed, tile * C::kTileM), kStatBytes);
        if (!starts) load_stat(shared.lse2[stage], p.lse2, number, &shared.q_full[stage]);

        if (first) load_v(work);

        ptx::mbarrier_wait(C::kWide ? &shared.q_empty[stage] : &shared.dout_empty[stage], empty_parity);
        load_shared(shared.dout_of(steps), &p.dout, &shared.dout_full[stage], first_head + head,
                    work.query(p.packed, tile * C::kTileM), kStatBytes);
        if (!starts) load_stat(shared.delta[stage], p.delta, number, &shared.dout_full[stage]);

        if (first && !kEarlyK) load_k(work);
        if (starts) {
          start();
          load_stat(shared.lse2[stage], p.lse2, number, &shared.q_full[stage]);
          load_stat(shared.delta[stage], p.delta, number, &shared.dout_full[stage]);
          starts = false;
        }
        ++steps;
      }
    }
  }
  static constexpr bool kEarlyK = C::kStagesK > 1 || C::kWide;
  __device__ __forceinline__ void load_v(const TileWork& work) {
    ptx::mbarrier_wait(&shared.v_empty, (work.loaded + 1) % 2);
    load_shared(shared.v, &p.v, &shared.v_full, work.head_kv, work.key(p.packed, work.first_key));
  }
  __device__ __forceinline__ void load_k(const TileWork& work) {
    const int stage = work.loaded % C::kStagesK;
    ptx::mbarrier_wait(&shared.k_empty[stage], (work.loaded / C::kStagesK + 1) % 2);
    load_shared(shared.k[stage], &p.k, &shared.k_full[stage], work.head_kv, work.key(p.packed, work.first_key));
  }

  static constexpr uint32_t kStatBytes = C::kTileM * sizeof(float);

  __device__ __forceinline__ void load_stat(float* to, const float* from, int number, uint64_t* full) {
    ptx::bulk_load(to, from + int64_t{number} * C::kTileM, kStatBytes, full);
  }
};

}  // namespace tilewright::backward

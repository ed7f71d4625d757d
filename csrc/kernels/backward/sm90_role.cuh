#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/splits.cuh"
#include "kernels/backward/turns.cuh"
#include "ptx/elect.h"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/reduce.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/pipeline.h"
#include "tile/store_rows.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// What all consumer warpgroups have in common: where they stand, and their way out to global memory.
template <class C>
struct ConsumerRole {
  using Element = typename C::Element;
  using Scores = Accumulator<C::kTileM>;

  const KernelParams& p;
  SharedStorage<C>& shared;
  const int warpgroup;

  // Registers are scarce: where a warpgroup stands in the rings follows from the tile's work and the steps done.
  const TileWork* current;
  uint32_t steps = 0;

  __device__ __forceinline__ const TileWork& work() const { return *current; }
  __device__ __forceinline__ int stage() const { return steps % C::kStages; }
  __device__ __forceinline__ uint32_t parity() const { return steps / C::kStages % 2; }
  __device__ __forceinline__ int stage_k() const { return work().loaded % C::kStagesK; }
  // Of the warpgroup. Read anew for each use: what is computed from it would otherwise take registers all the time.
  __device__ __forceinline__ static int thread() { return thread_of_all() % 128; }
  // Of all consumers.
  __device__ __forceinline__ static int thread_of_all() {
    const unsigned x = unhoisted_thread();
    __builtin_assume(x >= 128 && x < 512);
    return static_cast<int>(x) - 128;
  }
  __device__ __forceinline__ static int warp_of_all() { return thread_of_all() / 32; }
  // As if the consumers that hold rows of a tile were one: row() of an accumulator is then that of the tile.
  __device__ __forceinline__ static int thread_of_tile() { return C::kWide ? thread() : thread_of_all(); }

  // All steps of a tile of keys. The shuffle tells the compiler that the number is the same in a warp: what follows
  // from the steps stays in uniform registers.
  __device__ __forceinline__ int count() const {
    return __shfl_sync(~0u, p.heads_of(work().split) * work().walk.count, 0);
  }

  __device__ __forceinline__ void first_tile() { wait_tile(0); }
  __device__ __forceinline__ void next_tile() {
    const uint32_t number = work().number;
    __syncwarp();
    release(shared.tile_empty[number % C::kTileSlots]);
    wait_tile(number + 1);
  }
  __device__ __forceinline__ void wait_tile(uint32_t number) {
    ptx::mbarrier_wait(&shared.tile_full[number % C::kTileSlots], number / C::kTileSlots % 2);
    current = &shared.tile[number % C::kTileSlots];
  }
  __device__ __forceinline__ void wait_k() {
    const uint32_t loaded = work().loaded;
    ptx::mbarrier_wait(&shared.k_full[loaded % C::kStagesK], loaded / C::kStagesK % 2);
  }

  using DqUnit = Accumulator<C::kUnitFloats / 64>;

  // dQᵀ = Kᵀ dSᵀ over all keys of the tile: the columns [64 unit, 64 unit + 64) of Q × the tile's queries from
  // first_query on. Or, by rows, dQ = dS K: the queries [64 unit, 64 unit + 64) × all columns.
  template <int kColumns>
  __device__ __forceinline__ void issue_dQ(Accumulator<kColumns>& dQ, int unit, int first_query, int buffer) {
    using Product = ptx::Wgmma<Element, kColumns>;
    constexpr int kRowBytes = 128;
    if constexpr (C::kDqByRows) {
      const uint32_t k = unhoisted(shared.k[stage_k()].address());
      const uint32_t ds = unhoisted(shared.ds[buffer].address() + unit * 64 * kRowBytes);
#pragma unroll
      for (int i = 0; i < C::kTileN / 16; ++i) {
        Product::template ss<ptx::Major::kMN>(dQ.values, shared.ds[0].k_major(ds, i), shared.k[0].mn_major(k, i),
                                              i > 0);
      }
    } else {
      const uint32_t k = unhoisted(shared.k[stage_k()].address() + unit * shared.k[0].kChunkBytes);
      const uint32_t ds = unhoisted(shared.ds[buffer].address() + first_query * kRowBytes);
#pragma unroll
      for (int i = 0; i < C::kTileN / 16; ++i) {
        Product::template ss<ptx::Major::kK, ptx::Major::kMN>(dQ.values, shared.k[0].mn_major(k, i),
                                                              shared.ds[0].k_major(ds, i), i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // dS of a tile of queries → shared memory, a row a query: the transpose of the fragments. A fence must follow.
  __device__ __forceinline__ void write_dS(const OperandA<Element, C::kTileM>& dS, int buffer) {
    const int t = thread_of_tile();
    const int row = t % 32 / 16 * 8 + t % 8;
    const int piece = t / 32 * 2 + t / 8 % 2;
    const uint32_t to = shared.ds[buffer].address() + shared.ds[0].piece_offset(row, piece);
#pragma unroll
    for (int i = 0; i < dS.kSteps; ++i) {
      const auto& x = dS.steps[i];
      ptx::stmatrix_x4_trans(to + i * 16 * 128, x[0], x[1], x[2], x[3]);
    }
  }

  // A unit's sums lie in the order of the accumulators, warp after warp: what a thread holds in row(thread) + i / 2 * 8
  // and column 8 j + column(thread) + i % 2 is at (unit, warp, j, lane, i).
  static constexpr int kWarpFloats = C::kUnitFloats / 4;
  // This warp's part of a unit of a tile's sums.
  __device__ __forceinline__ static float* part_of_sum(float* sums, int unit) {
    return sums + (unit * 4 + thread() / 32) * kWarpFloats;
  }
  // Whether this warp's 16 rows of its warpgroup's unit are columns of dQ. The shuffle: see count().
  __device__ __forceinline__ static bool has_part() {
    return !C::kPartialUnit || __shfl_sync(~0u, warp_of_all() * 16, 0) < C::kHeadDim;
  }
  // An accumulator that starts at first_column of its unit; stored where nothing has been added up yet.
  template <int kColumns>
  __device__ __forceinline__ void add_from_registers(const Accumulator<kColumns>& dQ, float* part, bool fresh,
                                                     int first_column = 0) {
    float* to = part + first_column * 16 + thread() % 32 * 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* x = &dQ.values[4 * j];
      if (fresh) {
        *reinterpret_cast<float4*>(to + j * 128) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        ptx::reduce_add(to + j * 128, x[0], x[1], x[2], x[3]);
      }
    }
  }

  // --- turns.cuh ----------------------------------------------------------------------------------------------------

  // Until what this warpgroup staged, or added from its registers, in the step before is done with.
  __device__ __forceinline__ void wait_unstaged(uint32_t of_step) {
    if (p.turns) ptx::mbarrier_wait(&shared.unstaged[warpgroup], (of_step + 1) % 2);
  }
  // To add from registers.
  __device__ __forceinline__ void wait_turn(uint32_t of_step) {
    if (!p.turns) return;
    if constexpr (!C::kBulk) wait_unstaged(of_step);
    ptx::mbarrier_wait(&shared.turn_full[warpgroup][of_step % kTurnSlots], of_step / kTurnSlots % 2);
  }
  // This warp's part of a step is staged, or its additions are done.
  __device__ __forceinline__ void end_turn() {
    __syncwarp();
    release(shared.staged[warpgroup]);
  }

  // --- epilogue -----------------------------------------------------------------------------------------------------

  // The gradients of the tile's keys, when all splits of the group of heads are in them: dV, then dK.
  __device__ __forceinline__ void store_dV(Accumulator<C::kHeadDimV>& dV) {
    if (p.splits > 1 && !splits().add_up_dV(dV)) return;
    if constexpr (C::kTile.stores_by_copy()) {
      store(dV, 1.f, &p.dv);
    } else {
      store(dV, 1.f, p.dv_rows, p.dv_stride, p.head_dim_v);
    }
  }
  __device__ __forceinline__ void store_dK(Accumulator<C::kHeadDim>& dK) {
    if (p.splits > 1 && !splits().add_up_dK(dK)) return;
    if constexpr (C::kTile.stores_by_copy()) {
      store(dK, p.scale, &p.dk);
    } else {
      store(dK, p.scale, p.dk_rows, p.dk_stride, p.head_dim);
    }
  }

  // factor × an accumulator → the rows of the tile's keys, of a tensor of heads_kv × columns.
  template <int kColumns>
  __device__ __forceinline__ void store(const Accumulator<kColumns>& from, float factor, void* to,
                                        const Strides& stride, int columns) {
    const int t = thread_of_tile();
    const int key = work().first_key + from.row(t);
    const int left = work().seqlen_k - key;
    const int rows = left <= 0 ? 0 : left <= 8 ? 1 : 2;
    store_rows(from, factor, row_of(to, stride, key), 8 * stride.row, rows, columns, t);
  }
  // Each warp has its own place for what leaves by the copy engine, and the lane that it elects, always the same, knows
  // when it has been read.
  __device__ __forceinline__ float* staging() { return shared.on_its_way.data + warp_of_all() * kWarpFloats; }
  __device__ __forceinline__ void free_staging() {
    if (ptx::elect_one()) ptx::bulk_wait_group_read();
    __syncwarp();
  }
  // The same by the copy engine.
  template <int kColumns>
  __device__ __forceinline__ void store(const Accumulator<kColumns>& from, float factor, const CUtensorMap* to) {
    free_staging();
    using Rows = SharedTile<Element, 16, kColumns>;
    static_assert(sizeof(Rows) <= kWarpFloats * sizeof(float) && kWarpFloats * sizeof(float) % alignof(Rows) == 0);
    Rows& rows = *reinterpret_cast<Rows*>(staging());
    const int lane = thread() % 32;
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &from.values[8 * i + 2 * j];
        x[j] = ptx::pack<Element>(pair[0] * factor, pair[1] * factor);
      }
      ptx::stmatrix_x4(rows.address() + rows.piece_offset(lane % 16, 2 * i + lane / 16), x[0], x[1], x[2], x[3]);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (!ptx::elect_one()) return;
    const int key = work().first_key + thread_of_tile() / 32 * 16;
    const RowCoordinates at = work().key(p.packed, key);
    if (key < work().seqlen_k) {
      for (int i = 0; i < rows.kChunks; ++i) {
        ptx::tma_store_5d(to, rows.chunk(i), i * 64, work().head_kv, at.row, at.outer, at.wrap);
      }
    }
    ptx::bulk_commit_group();
  }

 private:
  __device__ __forceinline__ Splits<C> splits() const { return {p, work(), thread_of_all()}; }
  __device__ __forceinline__ Element* row_of(void* tensor, const Strides& stride, int key) const {
    return static_cast<Element*>(tensor) + work().batch * stride.batch + int64_t{work().k_begin + key} * stride.row +
           work().head_kv * stride.head;
  }
};

}  // namespace tilewright::backward

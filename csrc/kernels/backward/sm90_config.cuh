#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "kernels/backward/select.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/mbarrier.h"
#include "tile/shared_tile.h"

namespace tilewright::backward {

// kIndex: a row of kBackwardTiles.
template <class Element_, int kIndex>
struct Config {
  using Element = Element_;
  static constexpr BackwardTile kTile = kBackwardTiles[kIndex];
  static constexpr bool kSoftcap = kTile.softcap;
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kHeadDimV = kTile.head_dim_v;
  static constexpr int kTileM = kTile.tile_m;
  static constexpr int kTileN = kTile.tile_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kStagesK = kTile.stages_k;
  static constexpr int kDsBuffers = 2;
  static constexpr int kTileSlots = 2;
  static constexpr int kStepSlots = 8;  // a step is read of until two steps later; the producer is up to two ahead
  // dK and dV of 64 keys fill two warpgroups: then each has one of them, else both of 64 keys (sm90.cuh).
  static constexpr bool kWide = kTileN == 64;
  static constexpr bool kSecondPass = kTile.add_dq == AddDq::kSecondPass;  // of dQ
  static constexpr int kSharedP = 2;  // wide: steps whose P is on its way to the other warpgroup, at most
  // Wide: so many columns of K, and of V, stay in registers as the operand of S and dP: less to read from shared
  // memory, for which these products wait.
  static constexpr int kHeldColumns = 128;
  // Of dS, see differentiate(). With softcap dS is rounded once more anyway; the wide kernel has the time not to.
  static constexpr bool kPackedProduct = std::is_same_v<Element, __nv_bfloat16> && !kWide && !kSoftcap;
  static constexpr bool kBulk = kTile.add_dq == AddDq::kBulk;

  static constexpr int kWarpgroups = 2;
  static constexpr int kWarps = kConsumerWarps;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // setmaxnreg: what the producer gives up, the consumers get. The register file gives out 504, not 512.
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  // dQ of a step comes in units, one a warpgroup; of a third each takes a half.
  static constexpr bool kDqByRows = dq_by_rows(kHeadDim, kTileM);
  static constexpr int kUnitFloats = 64 * dq_unit_columns(kHeadDim, kTileM);
  static constexpr int kUnits = ceil_div(kTileM * kHeadDim, kUnitFloats);
  // Half of the second unit is no column of dQ, at head_dim 96: zeros, which are not added. The sums have no room for
  // them.
  static constexpr bool kPartialUnit = kTileM * kHeadDim < kUnits * kUnitFloats;
  static constexpr bool kSplitUnit = kUnits == 3;

  // Are there registers for S and dP at once, and for dQ while dV is on its way?
  static constexpr bool kTogether = kHeadDim + kHeadDimV <= 256;

  static_assert(kWarps == 4 * kWarpgroups);
  static_assert(kTileN == (kWide ? 64 : 64 * kWarpgroups) && kTileM % 16 == 0);
  static_assert(kSecondPass || kUnits == kWarpgroups || (kSplitUnit && !kBulk));
  static_assert(!kWide || (kSecondPass && kHeadDim == kHeadDimV));
  static_assert(!kPartialUnit || (!kDqByRows && kHeadDim % 16 == 0 && !kSplitUnit));
};

enum NamedBarrier { kTurn = 1 };  // and kTurn + 1

template <class C>
struct SharedStorage {
  using Element = typename C::Element;
  // Each warp's part of dQ on its way out, or its rows of dK or dV; in the wide kernel P on its way to the other
  // warpgroup, thread to thread.
  struct alignas(1024) Staging {
    float data[C::kTile.stores_by_copy() ? C::kWarpgroups * C::kUnitFloats : 4];
  };
  struct alignas(128) SharedP {
    uint4 steps[C::kSharedP][C::kTileM / 16][128];
  };
  using TileQ = SharedTile<Element, C::kTileM, C::kHeadDim>;
  using TileDout = SharedTile<Element, C::kTileM, C::kHeadDimV>;

  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDimV> v;
  TileQ q[C::kStages];
  TileDout dout[C::kStages];
  std::conditional_t<C::kWide, SharedP, Staging> on_its_way;
  // A row a query. Not needed where dQ has a second pass.
  std::conditional_t<C::kSecondPass, char, SharedTile<Element, C::kTileM, C::kTileN>> ds[C::kDsBuffers];
  alignas(16) float lse2[C::kStages][C::kTileM];
  alignas(16) float delta[C::kStages][C::kTileM];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full, v_empty;
  uint64_t q_full[C::kStages], q_empty[C::kStages];        // Q and lse2
  uint64_t dout_full[C::kStages], dout_empty[C::kStages];  // dO and delta
  uint64_t ds_full[C::kDsBuffers], ds_empty[C::kDsBuffers];
  uint64_t p_full[C::kSharedP], p_empty[C::kSharedP];
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  uint64_t turn_full[C::kWarpgroups][kTurnSlots], counted[kTurnSlots];  // see turns.cuh
  uint64_t staged[C::kWarpgroups], unstaged[C::kWarpgroups];
  TileWork tile[C::kTileSlots];
  StepWork step[C::kStepSlots];
  alignas(128) float4 zeros[C::kSecondPass ? 1 : kZeros];

  // Of a step. Wide: dO of a step is done with half a step before Q, and needed half a step after it. So Q goes where
  // dO of the step kStages before was, and dO where Q was.
  __device__ __forceinline__ TileQ& q_of(uint32_t step) {
    if constexpr (C::kWide) {
      return step / C::kStages % 2 ? dout[step % C::kStages] : q[step % C::kStages];
    } else {
      return q[step % C::kStages];
    }
  }
  __device__ __forceinline__ TileDout& dout_of(uint32_t step) {
    if constexpr (C::kWide) {
      return step / C::kStages % 2 ? q[step % C::kStages] : dout[step % C::kStages];
    } else {
      return dout[step % C::kStages];
    }
  }

  // By one thread. What a ring's consumers release, every warp of theirs does. `helpers` threads beside the producer
  // follow its tiles, too.
  __device__ __forceinline__ void init_barriers(int helpers) {
    constexpr int kOneOrAll = C::kWide ? C::kWarps / 2 : C::kWarps;
    init_ring(k_full, k_empty, 1, kOneOrAll);
    ptx::mbarrier_init(&v_full, 1);
    ptx::mbarrier_init(&v_empty, kOneOrAll);
    init_ring(q_full, q_empty, 1, C::kWarps);
    init_ring(dout_full, dout_empty, 1, C::kWarps);
    init_ring(ds_full, ds_empty, kOneOrAll, C::kWarps);
    init_ring(p_full, p_empty, kOneOrAll, kOneOrAll);
    init_ring(tile_full, tile_empty, 1, C::kWarps + helpers);
    init_all(counted, C::kWarpgroups);
    for (auto& of_warpgroup : turn_full) init_all(of_warpgroup, 1);
    init_ring(staged, unstaged, C::kWarps / C::kWarpgroups, 1);
    ptx::fence_mbarrier_init();
  }

 private:
  template <int kSlots>
  __device__ __forceinline__ static void init_all(uint64_t (&barriers)[kSlots], int arrivals) {
    for (uint64_t& barrier : barriers) ptx::mbarrier_init(&barrier, arrivals);
  }
  template <int kSlots>
  __device__ __forceinline__ static void init_ring(uint64_t (&full)[kSlots], uint64_t (&empty)[kSlots], int writers,
                                                   int readers) {
    init_all(full, writers);
    init_all(empty, readers);
  }
};

}  // namespace tilewright::backward

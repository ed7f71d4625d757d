#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "kernels/backward/select.h"
#include "kernels/backward/sm90_params.h"
#include "tile/shared_tile.h"

namespace tilewright::backward {

// kIndex: a row of kBackwardTiles with head_dim 256, where dK and dV of 64 keys fill a warpgroup's registers each.
template <class Element_, int kIndex>
struct WideConfig {
  using Element = Element_;
  static constexpr BackwardTile kTile = kBackwardTiles[kIndex];
  static constexpr bool kSoftcap = kTile.softcap;
  static constexpr bool kPackedProduct = std::is_same_v<Element, __nv_bfloat16>;  // of dS, see differentiate()
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kHeadDimV = kTile.head_dim_v;
  static constexpr int kTileM = kTile.tile_m;
  static constexpr int kTileN = kTile.tile_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kStagesK = kTile.stages_k;
  static constexpr int kDsBuffers = 2;
  static constexpr int kTileSlots = 2;
  static constexpr int kStepSlots = 8;

  static constexpr int kThreads = 384;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  // dQ of a step comes in units of all queries × 128 columns of Q, one for each warpgroup.
  static constexpr bool kDqByRows = dq_by_rows(kHeadDim, kTileM);
  static constexpr int kUnitFloats = 64 * dq_unit_columns(kHeadDim, kTileM);
  static constexpr int kUnits = kTileM * kHeadDim / kUnitFloats;

  static_assert(kTileN == 64 && kTileM % 16 == 0 && kUnits == 2);
};

template <class C>
struct WideStorage {
  using Element = typename C::Element;
  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDimV> v;
  SharedTile<Element, C::kTileM, C::kHeadDim> q[C::kStages];
  SharedTile<Element, C::kTileM, C::kHeadDimV> dout[C::kStages];
  SharedTile<Element, C::kTileM, C::kTileN> ds[C::kDsBuffers];  // a row a query
  uint4 probabilities[C::kTileM / 16][128];                     // P on its way to the other warpgroup, thread to thread
  alignas(16) float lse2[C::kStages][C::kTileM];
  alignas(16) float delta[C::kStages][C::kTileM];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full, v_empty;
  uint64_t q_full[C::kStages], q_empty[C::kStages];        // Q and lse2
  uint64_t dout_full[C::kStages], dout_empty[C::kStages];  // dO and delta
  uint64_t ds_full[C::kDsBuffers], ds_empty[C::kDsBuffers];
  uint64_t p_full;
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  uint64_t turn_full[kTurnSlots], added[kTurnSlots], counted[kTurnSlots];  // see turns.cuh
  TileWork tile[C::kTileSlots];
  StepWork step[C::kStepSlots];
  uint32_t pending[8];  // a warp; see end_pending_turn
};

}  // namespace tilewright::backward

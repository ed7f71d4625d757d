#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "kernels/backward/select.h"
#include "kernels/backward/sm90_params.h"
#include "tile/shared_tile.h"

namespace tilewright::backward {

// kIndex: a row of kBackwardTiles with head_dim < 256.
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
  // Of dS, see differentiate(). With softcap dS is rounded once more anyway.
  static constexpr bool kPackedProduct = std::is_same_v<Element, __nv_bfloat16> && !kSoftcap;
  static constexpr bool kBulk = kTile.add_dq == AddDq::kBulk;

  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // setmaxnreg: what the producer gives up, the consumers get. The register file gives out 504, not 512.
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  static constexpr bool kDqByRows = dq_by_rows(kHeadDim, kTileM);
  static constexpr int kUnits = kDqByRows ? kTileM / 64 : kHeadDim / 64;  // of dQ
  static constexpr bool kSplitUnit = kUnits == 3;                         // of the third each warpgroup takes a half
  static constexpr int kUnitFloats = kTileM * kHeadDim / kUnits;

  // Are there registers for S and dP at once, and for dQ while dV is on its way?
  static constexpr bool kTogether = kHeadDim + kHeadDimV <= 256;

  static_assert(kTileN == 64 * kWarpgroups && kTileM % 16 == 0);
  static_assert(kUnits == kWarpgroups || (kSplitUnit && !kBulk));
};

template <class C>
struct SharedStorage {
  using Element = typename C::Element;
  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDimV> v;
  SharedTile<Element, C::kTileM, C::kHeadDim> q[C::kStages];
  SharedTile<Element, C::kTileM, C::kHeadDimV> dout[C::kStages];
  SharedTile<Element, C::kTileM, C::kTileN> ds[C::kDsBuffers];  // a row a query
  struct alignas(128) {
    float data[C::kBulk ? C::kWarpgroups * C::kUnitFloats : 4];
  } dq;  // each warp's part of a unit on its way out
  alignas(16) float lse2[C::kStages][C::kTileM];
  alignas(16) float delta[C::kStages][C::kTileM];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full, v_empty;
  uint64_t q_full[C::kStages], q_empty[C::kStages];        // Q and lse2
  uint64_t dout_full[C::kStages], dout_empty[C::kStages];  // dO and delta
  uint64_t ds_full[C::kDsBuffers], ds_empty[C::kDsBuffers];
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  uint64_t turn_full[kTurnSlots], added[kTurnSlots], counted[kTurnSlots];  // see turns.cuh
  TileWork tile[C::kTileSlots];
  StepWork step[C::kStepSlots];
  uint32_t pending[8];  // a warp; see end_pending_turn
};

}  // namespace tilewright::backward

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
  static constexpr int kDsBuffers = 2;  // so many steps dQ comes after dS
  static constexpr int kTileSlots = 2;
  // Of dS, see differentiate(). With softcap dS is rounded once more anyway.
  static constexpr bool kPackedProduct = std::is_same_v<Element, __nv_bfloat16> && !kSoftcap;
  // Without the packed product there are too few registers for it at head_dim_v 128.
  static constexpr bool kVInRegisters = kTile.v_in_registers && (kPackedProduct || kHeadDimV < 128);
  static constexpr bool kBulk = kTile.add_dq == AddDq::kBulk;

  static constexpr int kWarpgroups = kTileN / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // setmaxnreg: what the producer gives up, the consumers get; 65,536 in all.
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 240 : 160;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 24 : 32;

  static constexpr bool kDqByRows = dq_by_rows(kHeadDim, kTileM);
  static constexpr int kUnits = kDqByRows ? kTileM / 64 : kHeadDim / 64;          // of dQ
  static constexpr int kDsReaders = kUnits < kWarpgroups ? kUnits : kWarpgroups;  // warpgroups a step
  static constexpr int kUnitsEach = (kUnits + kWarpgroups - 1) / kWarpgroups;     // at most, of a warpgroup in a step
  static constexpr int kUnitFloats = kTileM * kHeadDim / kUnits;
  // With one unit a warpgroup dQ's product covers exponentials of the warpgroup itself, if there are registers for
  // both. Three warpgroups cover each other's: there its place between the other products costs more than it brings.
  static constexpr bool kOverlapDq = kUnits == kWarpgroups && !kVInRegisters;

  static_assert(kTileN % 64 == 0 && kWarpgroups >= 2 && kWarpgroups <= 3 && kTileM % 16 == 0);
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= (kWarpgroups == 2 ? 504 : 512));
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
  uint64_t turn_full[2], added[2], counted[2];  // see turns.cuh
  TileWork tile[C::kTileSlots];
  WarpNotes<C::kDsBuffers> notes[C::kWarpgroups * 4];
};

}  // namespace tilewright::backward

#pragma once

#include "attention/fragment_softmax.h"
#include "kernels/forward/select.h"
#include "kernels/forward/sm90_params.h"
#include "tile/shared_tile.h"

namespace tilewright::forward {

// kIndex: a row of kForwardTiles.
template <class Element_, int kIndex>
struct Config {
  using Element = Element_;
  static constexpr ForwardTile kTile = kForwardTiles[kIndex];
  static constexpr bool kSoftcap = kTile.softcap;
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kHeadDimV = kTile.head_dim_v;
  static constexpr int kTileM = kTile.tile_m;
  static constexpr int kTileN = kTile.tile_n;
  static constexpr int kStagesK = kTile.stages_k;
  static constexpr int kStagesV = kTile.stages_v;
  static constexpr int kTileSlots = 4;

  static constexpr int kWarpgroups = kTileM / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // setmaxnreg: what the producer gives up, the consumers get; 65,536 in all.
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;

  // Q as the register operand of S = Q Kᵀ saves a third of the reads of shared memory and frees Q's buffer at once; at
  // head_dim 256 O takes the registers, at 192 a longer block is worth more.
  static constexpr bool kQInRegisters = kHeadDim < 192;
  // Where shared memory has no room for O on its way out, so many buffers of V serve at the end of a tile.
  static constexpr int kOutInV = kHeadDim < 192 ? 0 : ceil_div(kTileM, kTileN);
  // Columns that a warp does not see are left out of the exponentials, so many steps of 16 at a time. One, where the
  // exponentials take as long as the products; elsewhere each question costs more than a step.
  static constexpr int kSkippedSteps = kHeadDim < 128 ? 1 : kTileN / 32;
  // l and lse of a tile while its last product runs, although the next S waits for it.
  static constexpr bool kEarlyEndRows = kHeadDim < 128;

  static_assert(kTileM % 64 == 0 && kWarpgroups >= 2 && kWarpgroups <= 3 && kTileN % 16 == 0);
  static_assert(kOutInV == 0 || (kTileN % 64 == 0 && kOutInV <= kStagesV));
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= 512);
};

enum NamedBarrier { kTurn = 1, kEpilogue = kTurn + 3 };

template <class C>
struct SharedStorage {
  using Element = typename C::Element;
  SharedTile<Element, 64, C::kHeadDim> q[C::kWarpgroups];
  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDimV> v[C::kStagesV];
  SharedTile<Element, C::kOutInV ? 8 : C::kTileM, C::kOutInV ? 64 : C::kHeadDimV> out;
  uint64_t q_full[C::kWarpgroups], q_empty[C::kWarpgroups];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full[C::kStagesV], v_empty[C::kStagesV];
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  TileWork tile[C::kTileSlots];
};

}  // namespace tilewright::forward

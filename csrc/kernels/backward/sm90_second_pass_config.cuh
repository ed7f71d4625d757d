#pragma once

#include "attention/block_range.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/mbarrier.h"
#include "tile/shared_tile.h"

// The compile-time choices and shared memory of the second pass (sm90_second_pass.cuh).
namespace tilewright::backward {

template <class Element_, int kHeadDim_, bool kSoftcap_>
struct SecondPassConfig {
  using Element = Element_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kHeadDim = kHeadDim_;  // and head_dim_v
  static constexpr int kRows = 64;            // of a warpgroup: tile_m, in which lse2 and delta lie
  static constexpr int kTileM = kSecondTileM;
  static constexpr int kTileN = kSecondTileN;
  static constexpr int kStagesK = kHeadDim > 128 ? 2 : 4;
  static constexpr int kStagesV = kHeadDim > 128 ? 1 : 4;
  static constexpr int kTileSlots = 2;
  static constexpr bool kRowsInRegisters = kHeadDim <= 128;
  static constexpr int kWarpgroups = kTileM / kRows;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;
};

// A tile of work, as the producer announces it to the consumers.
struct QueryTileWork : Sequences {
  int first_query;
  int head;
  int first_tile;   // of lse2 and delta: the number of the first of its two
  uint32_t number;  // tiles announced before
  uint32_t loaded;  // those of them with keys
  bool last;        // no work: the end
  BlockRange range;
};

template <class C>
struct SecondPassStorage {
  using Element = typename C::Element;
  SharedTile<Element, C::kRows, C::kHeadDim> q[C::kWarpgroups];
  SharedTile<Element, C::kRows, C::kHeadDim> dout[C::kWarpgroups];
  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDim> v[C::kStagesV];
  uint64_t q_full[C::kWarpgroups], q_empty[C::kWarpgroups];
  uint64_t dout_full[C::kWarpgroups], dout_empty[C::kWarpgroups];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full[C::kStagesV], v_empty[C::kStagesV];
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  QueryTileWork tile[C::kTileSlots];

  __device__ __forceinline__ void init_barriers() {
    for (int i = 0; i < C::kWarpgroups; ++i) {
      init(q_full[i], q_empty[i], 4);
      init(dout_full[i], dout_empty[i], 4);
    }
    for (int i = 0; i < C::kStagesK; ++i) init(k_full[i], k_empty[i], C::kWarps);
    for (int i = 0; i < C::kStagesV; ++i) init(v_full[i], v_empty[i], C::kWarps);
    for (int i = 0; i < C::kTileSlots; ++i) init(tile_full[i], tile_empty[i], C::kWarps);
    ptx::fence_mbarrier_init();
  }

 private:
  __device__ __forceinline__ static void init(uint64_t& full, uint64_t& empty, int readers) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init(&empty, readers);
  }
};

}  // namespace tilewright::backward

#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_consumer.cuh"
#include "kernels/backward/sm90_producer.cuh"
#include "ptx/grid_dependency.h"
#include "ptx/mbarrier.h"
#include "ptx/registers.h"
#include "ptx/tma.h"

// Attention backward on Hopper, one persistent block a multiprocessor, for head dimensions where dK and dV of 64 keys
// fit in the registers of a warpgroup.
//
// A tile of work is tile_n keys of one key head: a consumer warpgroup owns 64 of them, with their dK and dV, and walks
// the queries of all heads of the group in tiles of tile_m. Everything is transposed, a row a key, so that P and dS
// feed dV and dK from registers:
//
//     producer (one thread)   Q_0 lse_0 V dO_0 delta_0 K Q_1 lse_1 dO_1 …   one tile after the other
//     consumer, step n        dQ_{n-1} = dS_{n-1} K → added to its sums in global memory (a share of the columns)
//                             S = K Qᵀ, P = exp(S - lse) | dP = V dOᵀ, dV += P dO | dS = P ∘ (dP - delta) → shared
//                             memory | dK += dS Q
//
// dQ is what couples the warpgroups: it needs the dS of all of them. It comes one or two steps late, so that nobody
// waits for it. docs/backward.md says what this order is worth. Where heads are short a block takes all tiles of a key
// head and converts the sums itself (whole_heads.cuh).
namespace tilewright::backward {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_sm90(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<C>*>(memory);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&p.q);
    ptx::tma_prefetch_map(&p.dout);
    ptx::tma_prefetch_map(&p.k);
    ptx::tma_prefetch_map(&p.v);
    constexpr int kWarps = 4 * C::kWarpgroups;
    for (int i = 0; i < C::kStagesK; ++i) {
      ptx::mbarrier_init(&shared.k_full[i], 1);
      ptx::mbarrier_init(&shared.k_empty[i], kWarps);
    }
    ptx::mbarrier_init(&shared.v_full, 1);
    ptx::mbarrier_init(&shared.v_empty, kWarps);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&shared.q_full[i], 1);
      ptx::mbarrier_init(&shared.q_empty[i], kWarps);
      ptx::mbarrier_init(&shared.dout_full[i], 1);
      ptx::mbarrier_init(&shared.dout_empty[i], kWarps);
    }
    for (int i = 0; i < C::kDsBuffers; ++i) {
      ptx::mbarrier_init(&shared.ds_full[i], kWarps);
      ptx::mbarrier_init(&shared.ds_empty[i], kWarps);
    }
    for (int i = 0; i < C::kTileSlots; ++i) {
      ptx::mbarrier_init(&shared.tile_full[i], 1);
      ptx::mbarrier_init(&shared.tile_empty[i], p.turns ? kWarps + 2 : kWarps);
    }
    for (int i = 0; i < kTurnSlots; ++i) {
      ptx::mbarrier_init(&shared.turn_full[i], 1);
      ptx::mbarrier_init(&shared.added[i], kWarps);
      ptx::mbarrier_init(&shared.counted[i], 1);
    }
    ptx::fence_mbarrier_init();
  }
  // Up to here nothing that another kernel may still write has been read: it overlaps the end of the kernel before.
  ptx::launch_dependent_grids();
  ptx::wait_for_prerequisite_grids();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) {
      Producer<C, SharedStorage<C>>{p, shared}.run();
    } else if (p.turns && threadIdx.x == 32) {
      TurnKeeper<C, SharedStorage<C>>{p, shared}.announce();
    } else if (p.turns && threadIdx.x == 64) {
      TurnKeeper<C, SharedStorage<C>>{p, shared}.count();
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    // The shuffle tells the compiler that the index is the same in a warp: matrix descriptors stay in uniform
    // registers.
    const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0);
    Consumer<C>{{p, shared, warpgroup}}.run();
  }
}

}  // namespace tilewright::backward

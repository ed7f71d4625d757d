#pragma once

#include "kernels/forward/sm90_config.cuh"
#include "kernels/forward/sm90_consumer.cuh"
#include "kernels/forward/sm90_producer.cuh"
#include "ptx/elect.h"
#include "ptx/grid_dependency.h"
#include "ptx/mbarrier.h"
#include "ptx/registers.h"
#include "ptx/tma.h"

// Attention forward on Hopper: out = softmax(scale Q Kᵀ, masked) V and lse, one persistent block a multiprocessor.
//
// A tile is tile_m queries of one head; a consumer warpgroup owns 64 of its rows and walks the keys in blocks of
// tile_n, from right to left. Block n needs S_n = Q K_nᵀ, P_n = exp(S_n) and O += P_n V_n:
//
//     producer (one thread)   K_0 Q K_1 V_0 K_2 V_1 …   of one tile after the other, as buffers become free
//     consumer, step n        S_n and O += P_{n-1} V_{n-1} on the tensor cores | softmax of S_n → P_n
//
// The tensor cores take products from a warpgroup only while they execute them, so a warpgroup's softmax overlaps the
// products of the other warpgroups, which take turns (kTurn). The last product of a tile runs with the first of the
// next: tiles follow each other without a gap. Where Q stays in shared memory, the next Q comes too late for that:
// there the last product is a step of its own, what the warpgroup does not see of the first blocks is left out, and O
// leaves through buffers of V.
//
// Most blocks need no maximum (attention/fragment_softmax.h): the exponentials start as soon as S is there. Where a
// block overflows, the warp computes its 16 rows of S_n again, by itself and with mma.sync, and searches the maximum:
// K_n stays in its buffer until that is decided.
namespace tilewright::forward {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) forward_sm90(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<C>*>(memory);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&p.q);
    ptx::tma_prefetch_map(&p.k);
    ptx::tma_prefetch_map(&p.v);
    constexpr int kWarps = 4 * C::kWarpgroups;
    for (int i = 0; i < C::kWarpgroups; ++i) {
      ptx::mbarrier_init(&shared.q_full[i], 1);
      ptx::mbarrier_init(&shared.q_empty[i], 4);
    }
    for (int i = 0; i < C::kStagesK; ++i) {
      ptx::mbarrier_init(&shared.k_full[i], 1);
      ptx::mbarrier_init(&shared.k_empty[i], kWarps);
    }
    for (int i = 0; i < C::kStagesV; ++i) {
      ptx::mbarrier_init(&shared.v_full[i], 1);
      ptx::mbarrier_init(&shared.v_empty[i], kWarps);
    }
    for (int i = 0; i < C::kTileSlots; ++i) {
      ptx::mbarrier_init(&shared.tile_full[i], 1);
      ptx::mbarrier_init(&shared.tile_empty[i], kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  // Up to here nothing that another kernel may still write has been read: it overlaps the end of the kernel before.
  ptx::launch_dependent_grids();
  // The producer itself has made the barriers and need not wait for the rest of the block.
  constexpr int kStart = kEpilogue + C::kWarpgroups;
  if (threadIdx.x < 128) {
    __syncwarp();
    if (threadIdx.x < 32) ptx::named_barrier_arrive(kStart, C::kThreads - 96);
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x < 32 && ptx::elect_one()) Producer<C>{p, shared}.run();
  } else {
    ptx::named_barrier_sync(kStart, C::kThreads - 96);
    ptx::registers_increase<C::kConsumerRegisters>();
    // The shuffle tells the compiler that the index is the same in a warp: matrix descriptors stay in uniform
    // registers.
    const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0);
    Consumer<C>{p, shared, warpgroup, static_cast<int>(threadIdx.x % 128)}.run();
  }
}

}  // namespace tilewright::forward

#pragma once

#include "kernels/backward/sm90_producer.cuh"
#include "kernels/backward/sm90_wide_consumer.cuh"
#include "ptx/grid_dependency.h"
#include "ptx/mbarrier.h"
#include "ptx/registers.h"
#include "ptx/tma.h"

// Attention backward on Hopper at head_dim 256, where dK and dV of 64 keys fill two warpgroups. So the warpgroups do
// different work on the same 64 keys, each with one operand in registers, instead of both half of everything:
//
//     producer (one thread)     Q_0 lse_0 V dO_0 delta_0 K Q_1 lse_1 dO_1 …   one tile after the other
//     probabilities, step n     S = K Qᵀ, P = exp(S - lse) → the other warpgroup | half of dQ_{n-1}, dV += P dO
//     gradients, step n         dP = V dOᵀ, dS = P ∘ (dP - delta) → shared memory | half of dQ_{n-1}, dK += dS Q
//
// The additions to dQ's sums set the pace: a warp that adds waits until the level 2 cache takes more. So it has a
// product under way meanwhile, and each warpgroup adds in two parts, under its two products.
namespace tilewright::backward {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_sm90_wide(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<WideStorage<C>*>(memory);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&p.q);
    ptx::tma_prefetch_map(&p.dout);
    ptx::tma_prefetch_map(&p.k);
    ptx::tma_prefetch_map(&p.v);
    constexpr int kOne = 4, kBoth = 8;  // warps of one warpgroup, of both
    for (int i = 0; i < C::kStagesK; ++i) {
      ptx::mbarrier_init(&shared.k_full[i], 1);
      ptx::mbarrier_init(&shared.k_empty[i], kBoth);
    }
    ptx::mbarrier_init(&shared.v_full, 1);
    ptx::mbarrier_init(&shared.v_empty, kOne);
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&shared.q_full[i], 1);
      ptx::mbarrier_init(&shared.q_empty[i], kBoth);
      ptx::mbarrier_init(&shared.dout_full[i], 1);
      ptx::mbarrier_init(&shared.dout_empty[i], kBoth);
    }
    ptx::mbarrier_init(&shared.p_full, kOne);
    for (int i = 0; i < C::kDsBuffers; ++i) {
      ptx::mbarrier_init(&shared.ds_full[i], kOne);
      ptx::mbarrier_init(&shared.ds_empty[i], kBoth);
    }
    for (int i = 0; i < C::kTileSlots; ++i) {
      ptx::mbarrier_init(&shared.tile_full[i], 1);
      ptx::mbarrier_init(&shared.tile_empty[i], p.turns ? kBoth + 2 : kBoth);
    }
    for (int i = 0; i < kTurnSlots; ++i) {
      ptx::mbarrier_init(&shared.turn_full[i], 1);
      ptx::mbarrier_init(&shared.added[i], kBoth);
      ptx::mbarrier_init(&shared.counted[i], 1);
    }
    ptx::fence_mbarrier_init();
  }
  // Up to here nothing that another kernel may still write has been read: it overlaps the end of the kernel before.
  ptx::launch_dependent_grids();
  ptx::wait_for_prerequisite_grids();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) {
      Producer<C, WideStorage<C>>{p, shared}.run();
    } else if (p.turns && threadIdx.x == 32) {
      TurnKeeper<C, WideStorage<C>>{p, shared}.announce();
    } else if (p.turns && threadIdx.x == 64) {
      TurnKeeper<C, WideStorage<C>>{p, shared}.count();
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    if (warpgroup == 1) {
      ProbabilityConsumer<C>{{{p, shared, 0}}}.run();
    } else {
      GradientConsumer<C>{{{p, shared, 1}}}.run();
    }
  }
}

}  // namespace tilewright::backward

#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_consumer.cuh"
#include "kernels/backward/sm90_first_pass_consumer.cuh"
#include "kernels/backward/sm90_producer.cuh"
#include "kernels/backward/sm90_wide_consumer.cuh"
#include "kernels/backward/turns.cuh"
#include "kernels/backward/zeros.cuh"
#include "ptx/elect.h"
#include "ptx/grid_dependency.h"
#include "ptx/registers.h"
#include "ptx/tma.h"

// Attention backward on Hopper, one persistent block a multiprocessor: a producer warpgroup and two of consumers.
//
// A tile of work is tile_n keys of one key head. The consumers keep dK and dV of them in registers and walk the queries
// of all heads of the group, or of a split of it (splits.cuh), in tiles of tile_m. Everything is transposed, a row a
// key, so that P and dS feed dV and dK from registers. dQ is what couples the warpgroups: it needs the dS of all keys
// of the tile. It comes a step late, so that nobody waits for it. docs/backward.md says what this order is worth.
//
//     producer (one thread)     Q_0 lse_0 V dO_0 delta_0 K Q_1 lse_1 dO_1 …   one tile after the other
//
// Where dK and dV of 64 keys fit in the registers of a warpgroup, each has its own 64 keys:
//
//     consumers, step n         S = K Qᵀ, dP = V dOᵀ, P = exp(S - lse) | dV += P dO, dS = P ∘ (dP - delta) → shared
//                               memory | a share of dQ_{n-1} = dS_{n-1} K, dK += dS Q
//
// At head_dim 256 they do not: both work on the same 64. There additions to dQ's sums would set the pace, and at
// head_dim 128 short sequences would wait for what is around the sums: dQ has a kernel of its own
// (sm90_second_pass.cuh). The gradients of a step come with the scores of the next:
//
//     consumers, step n         dV += P_{n-1} dO_{n-1}, dK += dS_{n-1} Q_{n-1} | S = K Qᵀ, dP = V dOᵀ, P_n, dS_n
//
// or, at head_dim 256, each warpgroup with one operand in registers:
//
//     probabilities, step n     dV += P_{n-1} dO_{n-1} | S = K Qᵀ, P_n = exp(S - lse) → the other warpgroup
//     gradients, step n         dK += dS_{n-1} Q_{n-1} | dP = V dOᵀ, dS_n = P_n ∘ (dP - delta)
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
    if (C::kTile.stores_by_copy()) {
      ptx::tma_prefetch_map(&p.dk);
      ptx::tma_prefetch_map(&p.dv);
    }
    shared.init_barriers(C::kSecondPass || p.dq ? 0 : p.turns ? 3 : 1);
  }
  // The end of the kernel before is waited for by the threads beside the consumers. These write nothing before lse,
  // which that kernel computes, has been loaded; and a tile that no query sees is announced after the wait.
  if constexpr (!C::kSecondPass) ptx::launch_dependent_grids();
  __syncthreads();
  // The shuffle tells the compiler that the index is the same in a warp: matrix descriptors stay in uniform registers.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0);
  if (warpgroup < 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (!ptx::elect_one()) return;
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      Producer<C>{p, shared}.run();
    } else if constexpr (!C::kSecondPass) {
      ptx::wait_for_prerequisite_grids();
      if (p.turns && warp == 1) {
        TurnAnnouncer<C>{{p, shared}}.run();
      } else if (p.turns && warp == 2) {
        TurnAdder<C, 0>{{p, shared}}.run();
      } else if (p.turns && warp == 3) {
        TurnAdder<C, 1>{{p, shared}}.run();
      } else if (!p.turns && !p.dq && warp == 3) {
        ZeroWriter<C>{p, shared}.run();
      }
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    if constexpr (!C::kSecondPass) {
      Consumer<C>{{p, shared, warpgroup}}.run();
    } else if constexpr (!C::kWide) {
      FirstPassConsumer<C>{{p, shared, warpgroup}}.run();
    } else if (warpgroup == 0) {
      ProbabilityConsumer<C>{{{p, shared, 0}}}.run();
    } else {
      GradientConsumer<C>{{{p, shared, 1}}}.run();
    }
  }
}

}  // namespace tilewright::backward

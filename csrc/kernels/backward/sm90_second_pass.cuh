#pragma once

#include "kernels/backward/sm90_second_pass_consumer.cuh"
#include "kernels/backward/sm90_second_pass_producer.cuh"
#include "ptx/elect.h"
#include "ptx/grid_dependency.h"
#include "ptx/registers.h"
#include "ptx/tma.h"

// The second pass: dQ alone. S and dP are computed again, and dQ stays in registers. At head_dim 256 that takes less
// time than float32 additions from every tile of keys in the level 2 cache, and in short sequences of head_dim 128 less
// than zeros before and a conversion after. The sums have one order.
//
// A persistent block a multiprocessor takes tiles of 128 queries of one head. A consumer warpgroup owns 64 of them,
// with their Q and dO in shared memory, and walks the keys in blocks of 64, from right to left:
//
//     producer (one thread)   K_0 Q dO V_0 K_1 V_1 …   of one tile after the other, as buffers become free
//     consumer, step n        dQ += dS_{n-1} K_{n-1} | S = Q K_nᵀ, dP = dO V_nᵀ | P = exp(S - lse) | dS_n
//
// dQ comes first: K_{n-1} is free early in step n, and two buffers of K are enough. V has one at head_dim 256: so the
// second warpgroup takes dP before S, and the next V has half a step more to come. That also keeps the warpgroups half
// a step apart: one has products under way while the other computes dS.
//
// It starts where the first pass leaves multiprocessors idle: it reads nothing of that pass, which itself has waited
// for what both read. Only the end of each block waits for the end of the first pass.
namespace tilewright::backward {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) second_pass_sm90(const __grid_constant__ SecondPassParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SecondPassStorage<C>*>(memory);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&p.k);
    ptx::tma_prefetch_map(&p.first.q);
    ptx::tma_prefetch_map(&p.first.dout);
    ptx::tma_prefetch_map(&p.v);
    shared.init_barriers();
  }
  ptx::launch_dependent_grids();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0);
  if (warpgroup < 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      SecondPassProducer<C>{p, shared}.run();
      ptx::wait_for_prerequisite_grids();
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    if (warpgroup == 0) {
      SecondPassConsumer<C, true>{p, shared, 0}.run();
    } else {
      SecondPassConsumer<C, false>{p, shared, 1}.run();
    }
  }
}

}  // namespace tilewright::backward

#pragma once

#include "kernels/backward/rows.cuh"

namespace tilewright::backward {

// dsinks = - Σ exp(sink - lse) delta, over the rows of a head: a block a head, always in the same order. Rows that see
// nothing, not even a sink, have lse2 +inf, and so have those of no sequence.
constexpr int kSinkThreads = 1024;

struct SinkParams {
  RowParams rows;
  int tile_m;
};

inline __global__ void __launch_bounds__(kSinkThreads) sum_dsinks(const __grid_constant__ SinkParams params) {
  const RowParams& p = params.rows;
  __shared__ double sums[kSinkThreads / 32];
  ptx::launch_dependent_grids();
  ptx::wait_for_prerequisite_grids();
  constexpr float kLog2e = 1.44269504088896f;
  const int head = blockIdx.x;
  const float sink2 = p.sinks[head] * kLog2e;
  const int64_t rows = int64_t{p.head_tiles} * params.tile_m;
  double sum = 0;
  for (int batch = 0; batch < p.batch; ++batch) {
    const int64_t first = (int64_t{batch} * p.heads_q + head) * rows;
    for (int64_t i = threadIdx.x; i < rows; i += kSinkThreads) {
      const float lse2 = p.lse2[first + i];
      if (lse2 != INFINITY) sum -= static_cast<double>(ptx::exp2(sink2 - lse2)) * p.delta[first + i];
    }
  }
#pragma unroll
  for (int x = 16; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = sums[threadIdx.x];
#pragma unroll
  for (int x = 16; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
  if (threadIdx.x == 0) p.dsinks[head] = static_cast<float>(sum);
}

}  // namespace tilewright::backward

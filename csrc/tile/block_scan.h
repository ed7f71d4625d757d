#pragma once

namespace tilewright {

struct Sum {
  __device__ static int of(int a, int b) { return a + b; }
};
struct Maximum {
  __device__ static int of(int a, int b) { return max(a, b); }
};

// Inclusive scan of one number a thread over a block of kThreads; `carry` is the result before this piece and becomes
// the one behind it.
template <class Op, int kWarps>
__device__ int block_scan(int value, int (&warp_results)[kWarps], int& carry) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value = Op::of(value, before);
  }
  if (lane == 31) warp_results[warp] = value;
  __syncthreads();
  int before = carry, all = carry;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before = Op::of(before, warp_results[i]);
    all = Op::of(all, warp_results[i]);
  }
  __syncthreads();
  carry = all;
  return Op::of(before, value);
}

}  // namespace tilewright

#pragma once

// bar.sync / bar.arrive on one of the 16 hardware barriers of a block; 0 is __syncthreads.
namespace tilewright::ptx {

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Waits like named_barrier_sync and says whether `predicate` holds in any of the threads.
__device__ __forceinline__ bool named_barrier_any(int barrier, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred p, any;\n"
      "setp.ne.s32 p, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, p;\n"
      "selp.s32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any;
}

}  // namespace tilewright::ptx

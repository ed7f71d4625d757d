#pragma once

// ld: loads from global memory with an order.
namespace tilewright::ptx {

// The other end of reduce_add_release.
__device__ __forceinline__ int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

}  // namespace tilewright::ptx

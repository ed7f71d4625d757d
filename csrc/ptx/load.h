#pragma once

// ld: loads from global memory with an order.
namespace tilewright::ptx {

// The other end of reduce_add_release.
__device__ __forceinline__ int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Two counters, 8-byte aligned, each by itself.
__device__ __forceinline__ int2 load_acquire(const int2* from) {
  int2 x;
  asm volatile("ld.acquire.gpu.global.v2.s32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  return x;
}

// Four float32, 16-byte aligned, from where red and the copy engine put them: not from this multiprocessor's L1 cache.
__device__ __forceinline__ float4 load_relaxed(const float* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

}  // namespace tilewright::ptx

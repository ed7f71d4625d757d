#pragma once

// red: additions in global memory that return nothing.
namespace tilewright::ptx {

// Four float32, 16-byte aligned; each is added by itself.
__device__ __forceinline__ void reduce_add(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Whoever sees the sum by load_acquire also sees what this thread, and the threads that it has met at a barrier, wrote
// before.
__device__ __forceinline__ void reduce_add_release(int* to, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

}  // namespace tilewright::ptx

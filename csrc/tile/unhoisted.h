#pragma once

namespace tilewright {

// The same number, but what is computed from it is computed where it stands: addresses used once a tile would otherwise
// take registers from the loop over the blocks.
__device__ __forceinline__ int unhoisted(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// threadIdx.x, read anew for each use.
__device__ __forceinline__ unsigned unhoisted_thread() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace tilewright

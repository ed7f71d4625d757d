#pragma once

// The ideas in csrc/attention are plain C++; under nvcc they are compiled for the GPU as well.
#ifdef __CUDACC__
#define TILEWRIGHT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TILEWRIGHT_HOST_DEVICE inline
#endif

namespace tilewright {

TILEWRIGHT_HOST_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
TILEWRIGHT_HOST_DEVICE constexpr int max_of(int a, int b) { return a > b ? a : b; }
TILEWRIGHT_HOST_DEVICE constexpr int clamp(int x, int low, int high) { return min_of(max_of(x, low), high); }
TILEWRIGHT_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace tilewright
